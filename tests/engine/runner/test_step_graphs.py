"""Recorded steps, with a stand-in that does the recorded work again on the same buffers."""

from __future__ import annotations

import pytest
import torch
from support.reruns import Reruns

from pyllm import LLM, SamplingParams
from pyllm.engine.llm import Completion
from pyllm.engine.messages import EngineRequest
from pyllm.engine.runner import step_graphs
from pyllm.engine.runner.step_graphs import batch_sizes

PROMPTS = ["What is recorded?", "b", "A longer prompt, that takes more than one page of the cache", "dd", "e?"]
FIELDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 9},
    {"temperature": 1.2, "seed": 3, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
]
PLAIN = [SamplingParams(max_tokens=14 + n, ignore_eos=True, **fields) for n, fields in enumerate(FIELDS)]


def open_llm(folder, **settings: object) -> LLM:
    sizes = {"num_kv_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 4}
    return LLM(str(folder), dtype="float32", device="cpu", quiet=True, **(sizes | settings))


@pytest.fixture(scope="module")
def plain(tiny_checkpoint) -> LLM:
    return open_llm(tiny_checkpoint, enable_prefix_caching=False)


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def recorded(request, tiny_checkpoint, monkeypatch) -> tuple[LLM, Reruns]:
    # The compiled kernels need the lengths on the host, where no recorded step can find them.
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=request.param)
    maker = Reruns()
    llm.core.runner.capture(maker, [1, 2, 4, 6])
    return llm, maker


def answers(completions: list[Completion]) -> list[tuple[list[int], str | None]]:
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_answers_are_the_same_with_and_without_graphs(plain, recorded, count):
    llm, maker = recorded
    got = llm.generate(PROMPTS[:count], PLAIN[:count])
    assert answers(got) == answers(plain.generate(PROMPTS[:count], PLAIN[:count]))
    assert maker.count >= 13, "and the decode steps were replayed"


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 3},
        {"presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"logit_bias": {70: 5.0}, "min_tokens": 4},
        {"bad_words": ((80,), (90, 91))},
        {"grammar": 'start: /[a-z]{3,9}/'},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_what_the_host_has_a_hand_in_is_the_same_too(plain, recorded, fields):
    llm, maker = recorded
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True, **fields), *PLAIN[1:3]]
    got, wanted = llm.generate(PROMPTS[:3], params), plain.generate(PROMPTS[:3], params)
    assert answers(got) == answers(wanted)
    for own, other in zip(got[0].logprobs, wanted[0].logprobs, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert maker.count > 0


def test_who_is_looked_into_is_computed_without_a_graph(plain, recorded):
    llm, maker = recorded
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, return_dynamics=True)
    got, wanted = llm.generate(["Look"], params)[0], plain.generate(["Look"], params)[0]
    assert [(d.input_token_id, d.experts) for d in got.dynamics] == [
        (d.input_token_id, d.experts) for d in wanted.dynamics
    ]
    assert maker.count == 0


def test_experts_are_counted_in_graphs_and_padding_is_not(plain, recorded):
    llm, _ = recorded
    for engine in (llm, plain):
        engine.core.observer.reset()
        engine.generate(["Count my experts", "and mine", "mine"], PLAIN[:3])
    got, wanted = llm.core.stats(), plain.core.stats()
    assert got.expert_tokens == wanted.expert_tokens
    assert got.expert_reroutes == wanted.expert_reroutes


def test_padding_touches_no_page_that_is_anybodys(recorded):
    llm, _ = recorded
    runner = llm.core.runner
    llm.core.add_request(EngineRequest(request_id="r", prompt_token_ids=[5, 6, 7, 8, 9], params=PLAIN[0]))
    llm.core.add_request(EngineRequest(request_id="s", prompt_token_ids=[7, 6, 5], params=PLAIN[1]))
    llm.core.add_request(EngineRequest(request_id="t", prompt_token_ids=[8], params=PLAIN[1]))
    llm.core.step()
    held = {block for request in llm.core.scheduler.running for block in request.block_ids}
    others = [block for block in range(64) if block not in held | {b + 1 for b in held}]
    before = runner.kv_cache[:, :, others].clone()
    for _ in range(3):
        llm.core.step()  # three sequences in a graph of four rows
    assert torch.equal(runner.kv_cache[:, :, others], before)
    llm.core.abort(["r", "s", "t"])
    llm.core.check_idle()


def test_preemption_and_abort_leave_other_sequences_unchanged(plain, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    llm = open_llm(tiny_checkpoint, overlap_scheduling=True, num_kv_blocks=20, max_model_len=80)
    llm.core.runner.capture(Reruns())
    params = [SamplingParams(max_tokens=30, temperature=1.0, seed=n, ignore_eos=True) for n in range(5)]
    got = llm.generate(PROMPTS[:2] + PROMPTS[3:], params[:4])
    assert llm.core.scheduler.num_preemptions > 0
    assert answers(got) == answers(plain.generate(PROMPTS[:2] + PROMPTS[3:], params[:4]))


@pytest.mark.parametrize("limit", ["CAPTURE_SECONDS", "CAPTURE_BYTES"])
def test_capture_stops_at_its_budget_and_batches_are_padded(plain, tiny_checkpoint, monkeypatch, limit):
    monkeypatch.setenv("PYLLM_NATIVE", "0")
    monkeypatch.setattr(step_graphs, limit, 0)
    llm = open_llm(tiny_checkpoint)
    graphs = llm.core.runner.capture(Reruns(bytes_each=1))
    assert graphs.sizes == (6,), "the largest is first"
    assert answers(llm.generate(PROMPTS[:1], PLAIN[:1])) == answers(plain.generate(PROMPTS[:1], PLAIN[:1]))


def test_batch_sizes_reach_up_to_the_largest_batch():
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    for most in (100, 256, 1000):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        assert all(next(size for size in sizes if size >= n) <= max(2 * n, n + 64) for n in range(1, most + 1))
