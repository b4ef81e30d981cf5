"""OpenAI's Codex CLI with the server as a custom provider."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import attempts
from attempts import MODEL, V1
from commands import FOLDER, run

CONFIG = f"""
model = "{MODEL}"
model_provider = "pyllm"
[model_providers.pyllm]
name = "PyLLM"
base_url = "{V1}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""
PROGRAM = FOLDER / "node_modules" / ".bin" / "codex"


def codex(folder: str, *arguments: str) -> list[dict[str, Any]]:
    Path(folder, "config.toml").write_text(CONFIG)
    command = [str(PROGRAM), "exec", *arguments]
    said = run(command, folder, CODEX_HOME=folder)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def check(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The usage of a turn that ended with a message."""
    assert not [event for event in events if event["type"] in ("error", "turn.failed")], events
    assert [e for e in events if e["type"] == "item.completed" and e["item"]["type"] == "agent_message"], events
    usage: dict[str, Any] = next(event for event in events if event["type"] == "turn.completed")["usage"]
    assert usage["output_tokens"] > 0
    return usage


def try_exec() -> None:
    """codex exec: a turn with its 20,000-character prompt and all its tools; resumed, the prompt has grown"""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--skip-git-repo-check", "--json")
        first = check(codex(folder, *options, "Hello!"))
        assert first["input_tokens"] > 1000
        second = check(codex(folder, "resume", "--last", *options, "What is 7+5?"))
        assert second["input_tokens"] > first["input_tokens"]


if __name__ == "__main__":
    attempts.main()
