"""Completions through the official client: every kind of prompt, the order of choices, the older log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from checkpoints import byte_tokenizer
from openai import OpenAI

GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1.1, "top_p": 0.9, "seed": 2**63 - 2}
TEXTS = ["Once upon a time", "Il était une fois", "1 2 3"]


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def complete(client: OpenAI, prompt: Any, *, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    body = {"ignore_eos": True, "return_token_ids": True} | (extra or {})
    return client.completions.create(model="tiny", prompt=prompt, extra_body=body, **options)


def test_text_and_its_token_ids_are_the_same_prompt(client: OpenAI) -> None:
    by_text, by_ids = (complete(client, prompt, **GREEDY) for prompt in (TEXTS[1], ids(TEXTS[1])))
    assert by_text.choices == by_ids.choices
    assert by_text.choices[0].prompt_token_ids == ids(TEXTS[1])
    assert by_text.usage.prompt_tokens == len(TEXTS[1].encode())
    assert by_text.object == "text_completion"


def test_max_tokens_is_16_unless_given(client: OpenAI) -> None:
    assert complete(client, "Hi").usage.completion_tokens == 16
    assert complete(client, "Hi", max_tokens=None).usage.completion_tokens == 16
    assert complete(client, "Hi", max_tokens=17).usage.completion_tokens == 17


def test_the_first_token_of_the_model_comes_before_a_text_only_if_asked_for(client: OpenAI) -> None:
    answer = complete(client, "Hi", extra={"add_special_tokens": True})
    assert answer.choices[0].prompt_token_ids == [2, *ids("Hi")]
    assert complete(client, "<s>Hi</s>").usage.prompt_tokens == 9, "spelled special tokens are text"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "ids"])
def test_choices_are_ordered_by_prompt_and_then_by_sample(
    client: OpenAI, sampling: dict[str, Any], as_ids: bool
) -> None:
    prompts = [ids(text) for text in TEXTS] if as_ids else TEXTS
    together = complete(client, prompts, n=2, **sampling)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert together.usage.prompt_tokens == sum(len(ids(text)) for text in TEXTS), "each prompt counts once"
    assert together.usage.completion_tokens == 6 * 16
    for place, prompt in enumerate(prompts):
        alone = complete(client, prompt, n=2, **sampling)
        pair = together.choices[2 * place : 2 * place + 2]
        assert [choice.token_ids for choice in pair] == [choice.token_ids for choice in alone.choices]
        assert [choice.text for choice in pair] == [choice.text for choice in alone.choices]
        assert all(choice.prompt_token_ids == ids(TEXTS[place]) for choice in pair)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI, sampling: dict[str, Any]) -> None:
    options = sampling | {"n": 2, "logprobs": 3, "max_tokens": 30}
    whole = complete(client, TEXTS[:2], **options)
    chunks = list(complete(client, TEXTS[:2], **options, stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    assert (last.choices, last.usage) == ([], whole.usage)
    for expected in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [token for piece in pieces for token in getattr(piece, "token_ids", [])] == expected.token_ids
        assert pieces[0].prompt_token_ids == expected.prompt_token_ids
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        shown = [piece.logprobs for piece in pieces if piece.logprobs]
        for name in ("tokens", "text_offset"):
            assert [one for part in shown for one in getattr(part, name)] == getattr(expected.logprobs, name)
        scores = [score for part in shown for score in part.token_logprobs]
        assert scores == pytest.approx(expected.logprobs.token_logprobs, abs=1e-4)


def test_a_stream_without_tokens_is_only_text_and_ends_with_done(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "Hi", "stream": True, "temperature": 0, "ignore_eos": True}
    events = [line.removeprefix("data: ") for line in http.post("/v1/completions", json=body).text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    chunks = [json.loads(event) for event in events[:-2]]
    assert {frozenset(chunk) for chunk in chunks} == {frozenset(("id", "object", "created", "model", "choices"))}
    assert all(chunk["choices"][0]["text"] for chunk in chunks[:-1]), "no chunk is empty"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_logprobs_have_one_entry_for_each_token(client: OpenAI) -> None:
    answer = complete(client, "Hi", logprobs=2, max_tokens=20, extra={"skip_special_tokens": False}, **SEEDED)
    choice = answer.choices[0]
    shown = choice.logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == 20
    for token, score, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert top[token] >= score - 1e-6
        assert 1 <= len(top) <= 3, "the two likeliest and the chosen one; pieces of characters look the same"
    assert shown.text_offset[0] == 0
    assert shown.text_offset == sorted(shown.text_offset)
    for offset, token in zip(shown.text_offset, shown.tokens, strict=True):
        # Bytes of a character that is never finished become a mark of their own, before the token that ends the wait.
        assert token in choice.text[offset : offset + 2] or "\ufffd" in token


def test_logprobs_zero_shows_the_chosen_tokens_alone(client: OpenAI) -> None:
    shown = complete(client, "Hi", logprobs=0, **GREEDY).choices[0].logprobs
    assert all(len(top) == 1 for top in shown.top_logprobs)
    assert complete(client, "Hi", **GREEDY).choices[0].logprobs is None


def test_a_stop_string_is_left_out(client: OpenAI) -> None:
    text = complete(client, "Hi", **SEEDED).choices[0].text
    stop = text[5:8]
    stopped = complete(client, "Hi", stop=stop, **SEEDED).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
