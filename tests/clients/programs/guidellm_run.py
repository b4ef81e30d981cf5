"""GuideLLM: a benchmark over chat and over completions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import attempts
from attempts import URL
from commands import FOLDER, run

TOKENIZER = Path(__file__).resolve().parents[3] / "model" / "demo"


def measure(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(FOLDER / "bin" / "guidellm"), "run",
            "--backend", f"kind=openai_http,target={URL},request_format={path}",
            "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=8",
            "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
            "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
            "--output", "kind=json,path=report.json", "--disable-console-interactive",
        ]  # fmt: skip
        run(command, folder)
        (benchmark,) = json.loads(Path(folder, "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] | {"total": 8} == {"successful": 8, "errored": 0, "incomplete": 0, "total": 8}
    assert metrics["output_token_count"]["successful"]["mean"] == 16
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


def try_chat() -> None:
    """/v1/chat/completions: 8 requests without an error, 16 tokens each, as asked"""
    measure("/v1/chat/completions")


def try_completions() -> None:
    """/v1/completions: 8 requests without an error, 16 tokens each, as asked"""
    measure("/v1/completions")


if __name__ == "__main__":
    attempts.main()
