"""What is read of the prompt itself: log-probabilities of its tokens, and its final hidden states."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from support.checkpoints import TINY
from support.paged_runner import finish, tokens_of

from pyllm import LLM, SamplingParams
from pyllm.engine.errors import RequestError
from pyllm.engine.messages import EngineRequest, TokenOutput
from pyllm.model import DeepForCausalLM
from pyllm.model.backend import AttentionMetadata
from pyllm.model.cpu.backend import available

MAX_LEN = 128
BACKENDS = ["native", "torch"] if available(TINY) else ["torch"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
ASKING = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=3)


@pytest.fixture(scope="module")
def make(tiny_checkpoint):
    def llm(backend: str = BACKENDS[0], **settings: object) -> LLM:
        sizes = {"num_kv_blocks": 200, "max_model_len": MAX_LEN} | settings
        with pytest.MonkeyPatch.context() as patch:
            if backend == "torch":
                patch.setattr("pyllm.engine.build.native_available", lambda config: False)
            return LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, **sizes)

    return llm


@pytest.fixture(scope="module")
def forward(tiny_checkpoint):
    """Final hidden states [T, H] and scores [T, vocab] of a whole sequence, without a cache."""
    model = DeepForCausalLM.from_pretrained(str(tiny_checkpoint))

    @functools.cache
    @torch.inference_mode()
    def run(ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), AttentionMetadata.without_cache([len(ids)]))
        return hidden, model.logits(hidden).log_softmax(-1)

    return lambda ids: run(tuple(ids))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(4, 260) for _ in range(length)] for length in (1, 2, 40, 97, 120)]


def check_prompt_logprobs(found, prompt: list[int], scores: torch.Tensor, count: int) -> None:
    assert [entry.token_id for entry in found] == prompt[1:]
    for entry, row in zip(found, scores[:-1], strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
        assert [score for _, score in entry.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-3)
        assert all(row[token].item() == pytest.approx(score, abs=1e-3) for token, score in entry.top)
        likelier, unsure = row > row[entry.token_id] + 1e-4, row > row[entry.token_id] - 1e-4
        assert int(likelier.sum()) + 1 <= entry.rank <= max(int(unsure.sum()), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 1, "block_size": 4},
        {"max_num_batched_tokens": 7, "block_size": 1},
        {"max_num_batched_tokens": 64, "block_size": 32, "num_kv_blocks": 20},
        {"max_num_seqs": 1, "max_num_prefill_tokens": 5},
    ],
    ids=str,
)
def test_prompt_logprobs_are_those_of_a_full_forward(make, forward, prompts, backend, settings):
    llm = make(backend, **settings)
    expected = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    for _ in range(2):  # the second time with a warm prefix cache
        completions = llm.generate(prompts, ASKING)
        assert [completion.token_ids for completion in completions] == expected
        for prompt, completion in zip(prompts, completions, strict=True):
            check_prompt_logprobs(completion.prompt_logprobs, prompt, forward(prompt)[1], 3)


def test_prompt_logprobs_may_be_without_the_most_likely_tokens(make, forward, prompts):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found = make().generate([prompts[2]], params)[0].prompt_logprobs
    check_prompt_logprobs(found, prompts[2], forward(prompts[2])[1], 0)
    assert all(entry.top == [] for entry in found)


def test_more_scores_than_are_held_at_once_are_read_in_pieces(make, forward, prompts, monkeypatch):
    monkeypatch.setattr("pyllm.engine.runner.prompt_reader.ROWS", 11)
    llm = make(max_num_batched_tokens=50)
    rows = []
    plain = llm.core.runner.model.logits
    monkeypatch.setattr(llm.core.runner.model, "logits", lambda hidden: rows.append(len(hidden)) or plain(hidden))
    completion = llm.generate([prompts[4]], ASKING)[0]
    check_prompt_logprobs(completion.prompt_logprobs, prompts[4], forward(prompts[4])[1], 3)
    assert max(rows) == 11


def test_prompt_logprobs_come_with_the_first_token(make, prompts):
    core = make(max_num_batched_tokens=16).core
    core.add_request(EngineRequest(request_id="r", prompt_token_ids=prompts[3], params=ASKING))
    outputs = finish(core)["r"]
    assert [len(output.token_ids) for output in outputs] == [1] * 6
    assert [len(output.prompt_logprobs) for output in outputs] == [len(prompts[3]) - 1, 0, 0, 0, 0, 0]


def test_a_prompt_may_be_read_and_nothing_generated(make, forward, prompts):
    whole = prompts[1] * (MAX_LEN // 2)
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    completion = make(max_num_batched_tokens=50).generate([whole], params)[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "length")
    check_prompt_logprobs(completion.prompt_logprobs, whole, forward(whole)[1], 3)


def test_prompt_reader_skips_the_prefix_cache_but_fills_it(make, prompts):
    core = make().core
    for params, pooling, cached in [(ASKING, None, 0), (GREEDY, None, 112), (ASKING, None, 0), (GREEDY, "mean", 0)]:
        core.add_request(EngineRequest(request_id="r", prompt_token_ids=prompts[4], params=params, pooling=pooling))
        assert finish(core)["r"][0].num_cached_tokens == cached
    assert core.scheduler.num_prefix_queries == len(prompts[4])


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_preempted_prompt_reader_loses_and_repeats_nothing(make, forward, prompts, pooling):
    core = make(
        max_num_batched_tokens=16, max_num_prefill_tokens=16, num_kv_blocks=9, scheduling_policy="priority"
    ).core  # the chunks of 16 tokens are whole blocks
    prompt = prompts[4]
    request = EngineRequest(request_id="r", prompt_token_ids=prompt, params=ASKING, priority=5, pooling=pooling)
    core.add_request(request)
    for _ in range(4):
        assert core.step().outputs == []
    urgent = EngineRequest(request_id="urgent", prompt_token_ids=prompts[3], params=GREEDY)
    core.add_request(urgent)
    output = finish(core)["r"][0]
    assert core.scheduler.num_preemptions >= 1
    hidden, scores = forward(prompt)
    if pooling is None:
        check_prompt_logprobs(output.prompt_logprobs, prompt, scores, 3)
    else:
        wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(torch.tensor(output.embedding), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 1, "block_size": 4},
        {"max_num_batched_tokens": 7},
        {"max_num_prefill_tokens": 5, "max_num_seqs": 2, "num_kv_blocks": 9},
    ],
    ids=str,
)
def test_pooling_is_mean_or_last_final_hidden_state(make, forward, prompts, backend, pooling, settings):
    llm = make(backend, **settings)
    whole = [*prompts, prompts[0] * MAX_LEN]
    for _ in range(2):
        for prompt, found in zip(whole, llm.embed(whole, pooling), strict=True):
            hidden = forward(prompt)[0]
            wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
            assert len(found) == llm.core.info.hidden_size == TINY.hidden_size
            torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompt_readers_run_together_with_other_requests(make, forward, prompts, backend):
    plain = make(backend).generate(prompts, GREEDY)
    core = make(backend, max_num_batched_tokens=33, block_size=4, num_kv_blocks=80).core
    outputs: dict[str, list[TokenOutput]] = {}
    waiting = list(enumerate(prompts))
    while core.has_work or waiting:
        if waiting:  # one prompt more in each step, asked in three ways
            i, prompt = waiting.pop()
            for name, params, pooling in [("mean", GREEDY, "mean"), ("plain", GREEDY, None), ("asking", ASKING, None)]:
                core.add_request(
                    EngineRequest(request_id=f"{name} {i}", prompt_token_ids=prompt, params=params, pooling=pooling)
                )
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    core.check_idle()
    for i, prompt in enumerate(prompts):
        hidden, scores = forward(prompt)
        (mean,) = outputs[f"mean {i}"]
        torch.testing.assert_close(torch.tensor(mean.embedding), hidden.mean(0), atol=1e-5, rtol=1e-5)
        assert tokens_of(outputs[f"plain {i}"]) == tokens_of(outputs[f"asking {i}"]) == plain[i].token_ids
        check_prompt_logprobs(outputs[f"asking {i}"][0].prompt_logprobs, prompt, scores, 3)


def test_a_pooled_request_has_one_output_without_tokens(make, prompts):
    core = make().core
    core.add_request(EngineRequest(request_id="r", prompt_token_ids=prompts[3], params=GREEDY, pooling="last"))
    step = core.step()
    (output,) = step.outputs
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ([], "stop", None)
    assert output.scheduled_time > 0
    assert step.stats.step_tokens == len(prompts[3])
    core.check_idle()


def test_a_pooled_prompt_may_fill_the_context_and_the_cache(make):
    llm = make(num_kv_blocks=8)
    assert llm.core.info.kv_capacity_tokens == MAX_LEN
    assert len(llm.embed([[5] * MAX_LEN])) == 1
    with pytest.raises(RequestError, match="129 tokens") as error:
        llm.embed(["fine", [5] * (MAX_LEN + 1)])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="pooling"):
        llm.embed(["fine"], "max")
    with pytest.raises(RequestError, match="empty"):
        llm.embed([[]])
    assert not llm.core.has_work
    assert llm.embed([]) == []


def test_texts_and_token_ids_are_embedded_alike(make):
    llm = make()
    by_text, by_ids = llm.embed(["Hello", llm.tokenizer.encode("Hello")])
    assert by_text == by_ids


def test_an_aborted_reader_leaves_nothing(make, prompts):
    core = make(max_num_batched_tokens=16, max_num_prefill_tokens=16).core
    core.add_request(EngineRequest(request_id="a", prompt_token_ids=prompts[4], params=ASKING))
    core.add_request(EngineRequest(request_id="b", prompt_token_ids=prompts[4], params=GREEDY, pooling="mean"))
    core.step()
    core.abort(["a", "b"])
    core.check_idle()


def test_the_engine_tells_the_sizes_of_its_network(make):
    info = make().core.info
    assert (info.hidden_size, info.num_layers, info.num_experts) == (64, 3, 4)
