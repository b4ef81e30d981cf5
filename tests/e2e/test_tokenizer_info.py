"""`GET /tokenizer_info`, through the calls that lm-evaluation-harness makes for `tokenizer_backend=remote`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jinja2
import pytest
from support.serving import PATIENCE, ServerProcess

TALK = [{"role": "user", "content": "What is 7+5?"}]


@pytest.fixture(scope="module")
def remote(demo: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=demo.url, headers=headers, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def info(remote: httpx.Client) -> dict[str, Any]:
    return remote.get("/tokenizer_info").raise_for_status().json()


def encode(remote: httpx.Client, text: str) -> list[int]:
    return (
        remote.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).raise_for_status().json()["tokens"]
    )


def decode(remote: httpx.Client, tokens: list[int]) -> str:
    return remote.post("/detokenize", json={"tokens": tokens}).raise_for_status().json()["prompt"]


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token"])
def test_each_special_token_is_one_id_both_ways(remote: httpx.Client, info: dict[str, Any], role: str) -> None:
    ids = encode(remote, info[role])
    assert ids == [info[f"{role}_id"]]
    assert decode(remote, ids) == info[role]
    assert info["added_tokens_decoder"][str(ids[0])]["content"] == info[role]


def test_a_special_token_inside_a_text_stays_text(remote: httpx.Client, info: dict[str, Any]) -> None:
    text = f"a {info['eos_token']} b"
    ids = encode(remote, text)
    assert info["eos_token_id"] not in ids
    assert decode(remote, ids) == text


def test_the_end_token_ends_an_answer(remote: httpx.Client, info: dict[str, Any]) -> None:
    body = {"messages": TALK, "temperature": 0, "return_token_ids": True}
    choice = remote.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["finish_reason"], choice["token_ids"][-1]) == ("stop", info["eos_token_id"])


def test_the_template_renders_what_a_chat_reads(remote: httpx.Client, info: dict[str, Any]) -> None:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        info["chat_template"]
    )
    text = template.render(messages=TALK, add_generation_prompt=True)
    ids = remote.post("/tokenize", json={"messages": TALK}).json()["tokens"]
    assert decode(remote, ids).endswith(text)


def test_it_has_the_names_of_vllm_and_transformers(remote: httpx.Client, info: dict[str, Any]) -> None:
    card = remote.get("/v1/models").json()["data"][0]
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert info["model_max_length"] == card["max_model_len"]
