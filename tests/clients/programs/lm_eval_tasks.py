"""lm-evaluation-harness on the two tasks in tests/clients/tasks: capitals that the demo model learned."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import attempts
from attempts import MODEL, V1
from commands import FOLDER, run

TASKS = Path(__file__).resolve().parents[1] / "tasks"
ROOT = TASKS.parents[2]


def score(model: str, path: str, task: str, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(FOLDER / "bin" / "lm-eval"), "run", "--model", model,
            "--model_args", f"model={MODEL},base_url={V1}{path}", "--include_path", str(TASKS), "--tasks", task,
            "--output_path", folder, *options,
        ]  # fmt: skip
        run(command, str(ROOT))
        (report,) = Path(folder).rglob("results_*.json")
        found: dict[str, Any] = json.loads(report.read_text())["results"][task]
    return found


def try_log_likelihoods() -> None:
    """local-completions: log-likelihoods of four cities, with the server's own tokenizer"""
    assert score("local-completions", "/completions", "capitals_choice")["acc,none"] >= 0.9


def try_chat() -> None:
    """local-chat-completions: generated answers, compared word for word"""
    found = score("local-chat-completions", "/chat/completions", "capitals_chat", "--apply_chat_template")
    assert found["exact_match,none"] >= 0.9


if __name__ == "__main__":
    attempts.main()
