"""Embeddings through the official client, against the hidden states of a full forward pass."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI
from support.checkpoints import byte_tokenizer
from support.hostile import same
from support.serving import ServerProcess

from pyllm.model import DeepForCausalLM
from pyllm.model.network import AttentionMetadata

TEXTS = ["Once upon a time", "Il était une fois", "a", "A long one. " * 30]


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def embed(client: OpenAI, given: Any, *, extra: dict[str, Any] | None = None, **options: Any) -> list[list[float]]:
    answer = client.embeddings.create(model="tiny", input=given, extra_body=extra, **options)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


@pytest.fixture(scope="module")
def states(checkpoint: Path) -> dict[str, np.ndarray]:
    """The final hidden states [T, H] of each text."""
    model = DeepForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)
    found = {}
    with torch.inference_mode():
        for text in TEXTS:
            tokens = torch.tensor(ids(text))
            attention = AttentionMetadata.without_cache([len(tokens)])
            found[text] = model(tokens, torch.arange(len(tokens)), attention).double().numpy()
    return found


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_vectors_are_the_normalised_hidden_states(
    client: OpenAI, states: dict[str, np.ndarray], pooling: str | None
) -> None:
    """The longest text is computed in several steps, together with the others."""
    found = embed(client, TEXTS, extra={"pooling": pooling})
    for text, vector in zip(TEXTS, found, strict=True):
        pooled = states[text][-1] if pooling == "last" else states[text].mean(axis=0)
        assert vector == pytest.approx(pooled / np.linalg.norm(pooled), abs=1e-4)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_equal_inputs_have_equal_vectors(client: OpenAI) -> None:
    first = embed(client, [TEXTS[0], TEXTS[1], TEXTS[0]])
    assert first[0] == same(first[2])
    assert first[0] != first[1]
    assert np.dot(first[0], first[1]) < 1 - 1e-4
    assert embed(client, [TEXTS[0], TEXTS[1], TEXTS[0]]) == list(map(same, first))
    alone = [embed(client, text)[0] for text in TEXTS]
    assert embed(client, TEXTS) == [pytest.approx(vector, abs=1e-5) for vector in alone]
    assert embed(client, [ids(text) for text in TEXTS]) == [pytest.approx(vector, abs=1e-5) for vector in alone]


def test_base64_holds_the_same_numbers(client: OpenAI) -> None:
    as_floats = embed(client, TEXTS[0], encoding_format="float")[0]
    as_text: Any = embed(client, TEXTS[0], encoding_format="base64")[0]
    assert np.frombuffer(base64.b64decode(as_text), "<f4").tolist() == as_floats
    assert embed(client, TEXTS[0])[0] == as_floats, "the client asks for base64 by itself"


def test_usage_counts_the_inputs(client: OpenAI) -> None:
    usage = client.embeddings.create(model="tiny", input=TEXTS).usage
    assert usage.prompt_tokens == usage.total_tokens == sum(len(ids(text)) for text in TEXTS)


def test_many_inputs_at_once_leave_the_engine_idle(client: OpenAI, server: ServerProcess) -> None:
    before = server.wait_until_idle()
    found = embed(client, [f"number {n % 50}" for n in range(300)])
    assert found[:50] == [pytest.approx(vector, abs=1e-5) for vector in found[250:]]
    after = server.wait_until_idle()
    assert after.generation_tokens_total == before.generation_tokens_total
    assert after.time_to_first_token_seconds_count == before.time_to_first_token_seconds_count


@pytest.mark.parametrize(
    ("given", "options", "param"),
    [("", {}, "input"), (["a", ""], {}, "input"), ([], {}, "input"), ([[5], [272]], {}, "input"),
     ("a", {"dimensions": 8}, "dimensions")],
)  # fmt: skip
def test_a_refusal_names_the_field(client: OpenAI, given: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        embed(client, given, **options)
    assert caught.value.param == param
    assert embed(client, "a", dimensions=64)
