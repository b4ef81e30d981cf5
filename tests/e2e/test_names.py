"""The names under which clients may ask for the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from anthropic import Anthropic
from huggingface_hub import InferenceClient
from openai import OpenAI
from support.serving import PATIENCE, ServerProcess

NAME = "Pacific-Prime/pacific-prime"


@pytest.fixture(scope="module")
def named(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a folder that is named like a hub id, which also takes some names of other models."""
    root = tmp_path_factory.mktemp("names")
    shutil.copytree(checkpoint, root / NAME)
    with ServerProcess(root / "log", NAME, "--dtype", "float32", "--served-model-name", "claude-*") as process:
        yield process


@pytest.mark.parametrize("name", [NAME, "pacific-prime", "claude-opus-4", None, "", "dummy", "unknown"])
def test_the_model_answers_to_each_of_its_names(named: ServerProcess, name: str | None) -> None:
    body = {"model": name, "prompt": "Hi", "max_tokens": 1}
    answer = httpx.post(f"{named.url}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (name if name not in (None, "", "dummy", "unknown") else "pacific-prime")


@pytest.mark.parametrize("name", ["gpt-4o", "Claude-opus", "pacific", "Pacific-Prime", "dummy-2"])
def test_other_models_are_not_found(named: ServerProcess, name: str) -> None:
    for answer in (
        httpx.post(f"{named.url}/v1/completions", json={"model": name, "prompt": "Hi"}),
        httpx.get(f"{named.url}/v1/models/{name}"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_the_list_has_the_real_names(named: ServerProcess) -> None:
    with OpenAI(base_url=f"{named.url}/v1", api_key="none") as client:
        assert {model.id for model in client.models.list()} == {NAME, "pacific-prime"}
        assert client.models.retrieve("claude-opus-4").id == "claude-opus-4"


def test_clients_that_name_other_models_or_none_are_answered(named: ServerProcess) -> None:
    with Anthropic(base_url=named.url, api_key="none") as client:
        messages = [{"role": "user", "content": "Hi"}]
        assert client.messages.create(model="claude-test", max_tokens=2, messages=messages).content  # type: ignore[arg-type]
    hub = InferenceClient(base_url=f"{named.url}/v1", api_key="none")
    answer = hub.chat_completion([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert answer.usage.completion_tokens == 2
