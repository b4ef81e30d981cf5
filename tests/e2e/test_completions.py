"""Completions through the official client: every kind of prompt, the order of choices, the older log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from support.checkpoints import byte_tokenizer

from pyllm.model import DeepForCausalLM
from pyllm.model.network import AttentionMetadata

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


def test_bos_is_added_only_on_request(client: OpenAI) -> None:
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


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DeepForCausalLM:
    return DeepForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)


def score(model: DeepForCausalLM, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first, by a full forward pass."""
    with torch.inference_mode():
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), AttentionMetadata.without_cache([len(tokens)]))
        scores = torch.log_softmax(model.logits(hidden).double(), -1)
    return scores[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


LONG = "Il était une fois, " * 15


@pytest.mark.parametrize("prompt", [TEXTS, [LONG, "a"], ids(LONG)], ids=["texts", "long", "ids"])
def test_echoed_logprobs_are_those_of_a_full_forward_pass(client: OpenAI, model: DeepForCausalLM, prompt: Any) -> None:
    answer = complete(client, prompt, echo=True, logprobs=3, max_tokens=4, n=2, **SEEDED)
    for choice in answer.choices:
        tokens = choice.prompt_token_ids + choice.token_ids
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(score(model, tokens), abs=1e-3)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(tokens)
        assert choice.text.startswith(byte_tokenizer().decode(choice.prompt_token_ids))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_continuation_scoring_for_evaluation_harnesses(client: OpenAI, model: DeepForCausalLM, max_tokens: int) -> None:
    """They send context and continuation as ids, and read the positions of the continuation."""
    context, endings = ids("The capital of France is"), [ids(" Paris"), ids(" a cat"), ids(" Rome")]
    prompts = [context + ending for ending in endings]
    answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=max_tokens, **GREEDY)
    assert answer.usage.completion_tokens == max_tokens * len(prompts)
    for choice, tokens in zip(answer.choices, prompts, strict=True):
        shown = choice.logprobs.token_logprobs[len(context) : len(tokens)]
        assert sum(shown) == pytest.approx(sum(score(model, tokens)[len(context) - 1 :]), abs=1e-2)
        assert len(choice.logprobs.tokens) == len(tokens) + max_tokens
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == max_tokens


def test_a_scored_prompt_may_fill_the_context(client: OpenAI) -> None:
    prompt = (ids("All work and no play. ") * 400)[:8192]
    answer = complete(client, prompt, echo=True, logprobs=0, max_tokens=0)
    assert len(answer.choices[0].logprobs.token_logprobs) == 8192
    with pytest.raises(BadRequestError, match="8192"):
        complete(client, prompt, echo=True, logprobs=0, max_tokens=1)


def test_default_max_tokens_fits_the_context(client: OpenAI) -> None:
    answer = complete(client, [(ids("Again. ") * 1200)[: 8192 - 5], ids("Hi")])
    assert [len(choice.token_ids) for choice in answer.choices] == [5, 16]


@pytest.mark.parametrize("max_tokens", [0, 20])
def test_an_echoing_stream_adds_up_to_the_whole_answer(client: OpenAI, max_tokens: int) -> None:
    extra = {"prompt_logprobs": 2, "return_dynamics": True}
    options = {"n": 2, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "extra": extra, **GREEDY}
    whole = complete(client, [LONG, "né"], **options)
    chunks = list(complete(client, [LONG, "né"], **options, stream=True))
    for expected in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [token for piece in pieces for token in getattr(piece, "token_ids", [])] == expected.token_ids
        experts = [entry["experts"] for piece in pieces for entry in getattr(piece, "dynamics", [])]
        assert experts == [entry["experts"] for entry in expected.dynamics]
        assert len(experts) == max_tokens
        (prompt_logprobs,) = [piece.prompt_logprobs for piece in pieces if hasattr(piece, "prompt_logprobs")]
        assert [sorted(entry or {}) for entry in prompt_logprobs] == [sorted(e or {}) for e in expected.prompt_logprobs]
        shown = [piece.logprobs for piece in pieces if piece.logprobs]
        for name in ("tokens", "text_offset"):
            assert [one for part in shown for one in getattr(part, name)] == getattr(expected.logprobs, name)
        scores = [one for part in shown for one in part.token_logprobs]
        assert scores[0] is expected.logprobs.token_logprobs[0] is None
        assert scores[1:] == pytest.approx(expected.logprobs.token_logprobs[1:], abs=1e-4)


def test_a_prompt_is_cut_to_its_last_tokens(client: OpenAI) -> None:
    cut = complete(client, LONG, extra={"truncate_prompt_tokens": 7}, **GREEDY)
    assert cut.choices[0].prompt_token_ids == ids(LONG)[-7:]
    assert cut.choices[0].text == complete(client, ids(LONG)[-7:], **GREEDY).choices[0].text
    filled = complete(client, LONG * 400, extra={"truncate_prompt_tokens": -1}, max_tokens=3)
    assert (filled.usage.prompt_tokens, filled.usage.completion_tokens) == (8189, 3)


def test_only_allowed_ids_are_generated(client: OpenAI) -> None:
    allowed = ids("abc")
    choice = complete(client, "Hi", extra={"allowed_token_ids": allowed}, **SEEDED).choices[0]
    assert set(choice.token_ids) <= set(allowed)
