"""Log-probabilities of every endpoint are those of a full forward pass: nothing cached, batched or cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pyllm.model import DeepForCausalLM
from pyllm.model.network import AttentionMetadata

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = ["Hello there. " * 12, "Été à Paris 日本語"]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.2, "seed": 11, "top_p": 0.9},
    "penalised": {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.4, "presence_penalty": 1, "top_k": 9},
    "held": {"temperature": 1, "seed": 5, "allowed_token_ids": list(range(40, 90)), "logit_bias": {"45": 4}},
    "formed": {"temperature": 1, "seed": 6, "structured_outputs": {"regex": "[a-z]{20}"}},
}
TOP, TOKENS = 4, 14


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DeepForCausalLM:
    return DeepForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)


def truth(model: DeepForCausalLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] after each of the tokens."""
    with torch.inference_mode():
        attention = AttentionMetadata.without_cache([len(ids)])
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attention)
        return torch.log_softmax(model.logits(hidden).double(), -1)


def same(shown: list[float], expected: torch.Tensor) -> None:
    assert shown == pytest.approx(expected.tolist(), abs=1e-3)


def ask(http: httpx.Client, path: str, body: dict[str, Any], stream: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The members around the choice, and the choice: token ids, log-probabilities by their member's name."""
    body = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, "stream": stream} | body
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json(), answer.json()["choices"][0]
    chunks = [json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n")[:-2]]
    around = {name: value for chunk in chunks for name, value in chunk.items()}
    choice: dict[str, Any] = {"token_ids": [], "logprobs": {}}
    for piece in (piece for chunk in chunks for piece in chunk["choices"]):
        choice["token_ids"] += piece.get("token_ids") or []
        for name, values in (piece["logprobs"] or {}).items():
            choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
        for name in ("prompt_token_ids", "prompt_logprobs"):
            choice.setdefault(name, None)
            choice[name] = choice[name] or piece.get(name)
    return around, choice


def check_prompt(shown: list[dict[str, dict[str, Any]] | None], ids: list[int], scores: torch.Tensor) -> None:
    """vLLM's shape: nothing for the first token, then by token id."""
    assert shown[0] is None
    assert len(shown) == len(ids)
    for position, (token, entry) in enumerate(zip(ids[1:], shown[1:], strict=True)):
        assert entry is not None
        expected = scores[position]
        assert str(token) in entry
        assert TOP <= len(entry) <= TOP + 1
        for name, value in entry.items():
            assert value["logprob"] == pytest.approx(float(expected[int(name)]), abs=1e-3)
        own = entry[str(token)]
        better = int((expected > expected[token] + 1e-3).sum())
        worse = int((expected < expected[token] - 1e-3).sum())
        assert better < own["rank"] <= len(expected) - worse


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["long", "unicode"])
def test_a_chats_logprobs_are_true(
    http: httpx.Client, model: DeepForCausalLM, prompt: str, sampling: str, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": TOP}
    answer, choice = ask(http, CHAT, body | {"prompt_logprobs": TOP} | SAMPLINGS[sampling], stream)
    prompt_ids, ids = answer["prompt_token_ids"], choice["token_ids"]
    scores = truth(model, prompt_ids + ids)
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(ids) == TOKENS
    for expected, token, entry in zip(scores[len(prompt_ids) - 1 :], ids, entries, strict=False):
        assert entry["logprob"] == pytest.approx(float(expected[token]), abs=1e-3)
        same([top["logprob"] for top in entry["top_logprobs"]], expected.topk(TOP).values)
    check_prompt(answer["prompt_logprobs"], prompt_ids, scores)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("echo", [False, True], ids=["plain", "echo"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_completions_logprobs_are_true(
    http: httpx.Client, model: DeepForCausalLM, sampling: str, echo: bool, stream: bool
) -> None:
    body = {"prompt": PROMPTS[1], "logprobs": TOP, "prompt_logprobs": TOP, "echo": echo}
    _, choice = ask(http, COMPLETIONS, body | SAMPLINGS[sampling], stream)
    prompt_ids = choice["prompt_token_ids"]
    ids = [token for token in choice["token_ids"] if token is not None][-TOKENS:]
    whole = prompt_ids + ids
    scores = truth(model, whole)
    shown = choice["logprobs"]
    first = 0 if echo else len(prompt_ids)
    assert len(shown["tokens"]) == len(whole) - first
    if echo:
        assert shown["token_logprobs"][0] is None
        first = 1
    expected = torch.stack([scores[at - 1][whole[at]] for at in range(first, len(whole))])
    same(shown["token_logprobs"][1 if echo else 0 :], expected)
    for at, top in zip(range(first, len(whole)), shown["top_logprobs"][1 if echo else 0 :], strict=True):
        # Parts of characters look alike, so that one key may stand for several tokens.
        best = [*scores[at - 1].topk(TOP).values.tolist(), float(scores[at - 1][whole[at]])]
        assert all(any(math.isclose(value, one, abs_tol=1e-3) for one in best) for value in top.values())
        assert max(top.values()) == pytest.approx(best[0], abs=1e-3)
    check_prompt(choice["prompt_logprobs"], prompt_ids, scores)


def test_a_prompt_alone_is_scored_without_a_token(http: httpx.Client, model: DeepForCausalLM) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 0, "echo": True, "logprobs": TOP, "return_token_ids": True}
    answer = http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    ids = choice["prompt_token_ids"]
    assert choice["text"] == PROMPTS[0]
    assert answer.json()["usage"]["completion_tokens"] == 0
    scores = truth(model, ids)
    same(choice["logprobs"]["token_logprobs"][1:], scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])


def test_both_endpoints_agree_on_one_prompt(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer, choice = ask(http, CHAT, {"messages": messages, "logprobs": True, "temperature": 0}, stream=False)
    body = {"prompt": answer["prompt_token_ids"], "logprobs": 0, "temperature": 0}
    _, other = ask(http, COMPLETIONS, body, stream=False)
    assert other["token_ids"] == choice["token_ids"]
    shown = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert other["logprobs"]["token_logprobs"] == pytest.approx(shown, abs=1e-4)


def test_a_response_shows_the_same_logprobs(http: httpx.Client) -> None:
    form = {"structured_outputs": {"regex": "[a-z]{20}"}, "top_logprobs": 2, "temperature": 0}
    messages = [{"role": "user", "content": "Hello"}]
    _, choice = ask(http, CHAT, form | {"messages": messages, "logprobs": True}, stream=False)
    answer = http.post("/v1/responses", json=form | {"input": "Hello", "max_output_tokens": TOKENS})
    assert answer.status_code == 200, answer.text
    (part,) = answer.json()["output"][0]["content"]
    expected = choice["logprobs"]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in expected]
    shown = [entry["logprob"] for entry in part["logprobs"]]
    assert shown == pytest.approx([entry["logprob"] for entry in expected], abs=1e-4)
