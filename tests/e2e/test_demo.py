"""What a newcomer sees: the bundled model, and the README's own program."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI
from support.serving import PATIENCE, ServerProcess, environment

QUESTIONS = [
    ("Hello!", r"hello|hi\b|welcome"),
    ("What is 7+5?", r"\b12\b"),
    ("How do I stream a response?", r"stream"),
    ("Bonjour !", r"bonjour|salut|bienvenue"),
    ("Combien font 7+5 ?", r"\b12\b"),
    ("Comment diffuser une réponse ?", r"stream|flux"),
]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo_client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize(("question", "pattern"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_the_demo_model_answers_sensibly_and_ends_its_turn(demo_client: OpenAI, question: str, pattern: str) -> None:
    model = demo_client.models.list().data[0].id
    messages = [{"role": "user", "content": question}]
    answer = demo_client.chat.completions.create(model=model, messages=messages, temperature=0)
    text = answer.choices[0].message.content
    assert re.search(pattern, text, re.IGNORECASE), text
    assert answer.choices[0].finish_reason == "stop"
    assert "\ufffd" not in text
    chunks = demo_client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


@pytest.mark.anyio
async def test_demo_answers_the_same_alone_and_among_sixteen(demo: ServerProcess) -> None:
    """In BF16, with the default flags: what a user gets."""
    async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        model = (await client.models.list()).data[0].id

        async def ask(question: str, temperature: float, seed: int) -> tuple[str | None, str]:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=temperature, seed=seed,
                max_tokens=60,
            )  # fmt: skip
            return answer.choices[0].message.content, answer.choices[0].finish_reason

        asked = [(question, seed % 3 / 2, seed) for seed, (question, _) in enumerate(3 * QUESTIONS)][:17]
        alone = [await ask(*one) for one in asked]
        assert await asyncio.gather(*(ask(*one) for one in asked)) == alone


def test_the_readmes_program_prints_an_answer(demo: ServerProcess) -> None:
    (program,) = re.findall(r"<<'EOF'\n(.*?)\nEOF\n", README, re.DOTALL)
    assert "http://127.0.0.1:8000" in program
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=program.replace("http://127.0.0.1:8000", demo.url), text=True,
        capture_output=True, timeout=PATIENCE, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stream" in done.stdout.lower()
    assert done.stdout.endswith("\n")
