"""What a request says does not depend on its company, on how its prompt is cut, or on preemption."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.reference import full_forward

from pyllm import LLM, SamplingParams
from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import EngineRequest
from pyllm.engine.step.core import EngineCore

VOCAB = 272


def make_core(folder: Path, dtype: str = "float32", **settings: int) -> EngineCore:
    defaults = {"num_kv_blocks": 400}
    return build_engine(EngineConfig(model=str(folder), dtype=dtype, device="cpu", quiet=True, **(defaults | settings)))


def run(core: EngineCore, messages: list[EngineRequest], gaps: list[int] | None = None) -> list[list[int]]:
    """Ids of each request; request i arrives `gaps[i]` steps after the one before it."""
    outputs: dict[str, list[int]] = {message.request_id: [] for message in messages}

    def step() -> None:
        for output in core.step().outputs:
            outputs[output.request_id] += output.token_ids

    for message, gap in zip(messages, gaps or [0] * len(messages), strict=True):
        for _ in range(gap):
            step()
        core.add_request(message)
    while core.has_work:
        step()
    core.check_idle()
    return list(outputs.values())


def random_request(rng: random.Random, name: str, *, longest: int = 60) -> EngineRequest:
    """A prompt and params of any kind, a third of them greedy."""
    prompt = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, longest))]
    params: dict[str, object] = {"temperature": 0.0, "max_tokens": rng.randint(8, 32), "seed": 0}
    params["ignore_eos"] = rng.random() < 0.8
    if rng.random() < 0.7:
        params |= {"temperature": rng.choice([0.5, 1.0, 1.4]), "seed": rng.getrandbits(63)}
        params |= {"top_k": rng.choice([0, 0, 5, 50]), "top_p": rng.choice([1.0, 0.9])}
        params["min_p"] = rng.choice([0.0, 0.05])
    params |= {"repetition_penalty": rng.choice([1.0, 1.0, 1.2]), "presence_penalty": rng.choice([0.0, 0.0, 0.5])}
    params["logprobs"] = rng.choice([None, None, 3])
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trial", range(4))
def test_a_request_says_the_same_alone_and_among_sixteen_others(tiny_checkpoint, dtype, trial):
    rng = random.Random(trial)
    core = make_core(tiny_checkpoint, dtype)
    requests = [random_request(rng, str(i)) for i in range(17)]
    alone = [run(core, [request])[0] for request in requests]
    assert run(core, requests) == alone, "all at once"
    assert run(core, requests, [rng.randint(0, 5) for _ in requests]) == alone, "one after the other"
    order = rng.sample(requests, len(requests))
    shuffled = dict(zip((request.request_id for request in order), run(core, order), strict=True))
    assert [shuffled[request.request_id] for request in requests] == alone, "in another order"


@pytest.fixture(scope="module")
def nine_alone(tiny_checkpoint) -> tuple[list[EngineRequest], list[list[int]]]:
    """Nine requests, and what each says alone."""
    rng = random.Random(5)
    requests = [random_request(rng, str(i), longest=50) for i in range(9)]
    plain = make_core(tiny_checkpoint)
    return requests, [run(plain, [request])[0] for request in requests]


@pytest.mark.parametrize("sizes", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7, "block_size": 5}, {"max_num_batched_tokens": 33},
    {"block_size": 1, "num_kv_blocks": 3000}, {"max_num_seqs": 3}, {"block_size": 64},
], ids=str)  # fmt: skip
def test_the_answer_does_not_depend_on_chunks_pages_or_seats(tiny_checkpoint, nine_alone, sizes):
    requests, alone = nine_alone
    assert run(make_core(tiny_checkpoint, **sizes), requests) == alone


def test_bf16_prompts_are_chunk_invariant_in_a_crowd(tiny_checkpoint):
    """BF16 rounds coarsely, so it shows at once when a token is computed in another way than alone."""
    rng = random.Random(9)
    requests = [random_request(rng, str(i), longest=900) for i in range(12)]
    sizes = {"max_model_len": 1024, "allow_long_max_model_len": True, "max_num_seqs": 16, "num_kv_blocks": 1000}
    roomy = make_core(tiny_checkpoint, "bfloat16", max_num_batched_tokens=2048, **sizes)
    alone = [run(roomy, [request])[0] for request in requests]
    for budget in (2048, 700, 16 + 256):
        core = make_core(tiny_checkpoint, "bfloat16", max_num_batched_tokens=budget, **sizes)
        assert run(core, requests) == alone, budget


@pytest.mark.parametrize("trial", range(3))
def test_the_answer_does_not_depend_on_preemption(tiny_checkpoint, trial):
    rng = random.Random(100 + trial)
    requests = [random_request(rng, str(i), longest=70) for i in range(24)]
    plain = make_core(tiny_checkpoint)
    alone = [run(plain, [request])[0] for request in requests]
    cramped = make_core(tiny_checkpoint, block_size=4, num_kv_blocks=29, max_model_len=110, max_num_batched_tokens=40)
    assert run(cramped, requests, [rng.randint(0, 2) for _ in requests]) == alone
    assert cramped.scheduler.num_preemptions > 3


def test_late_request_starts_while_earlier_ones_run(tiny_checkpoint):
    core = make_core(tiny_checkpoint, max_num_batched_tokens=24)
    for i in range(4):
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        core.add_request(EngineRequest(request_id=f"early-{i}", prompt_token_ids=[9 + i] * 6, params=params))
    for _ in range(5):
        core.step()
    params = SamplingParams(max_tokens=2, seed=1)
    core.add_request(EngineRequest(request_id="late", prompt_token_ids=list(range(10, 60)), params=params))
    steps = 0
    while True:
        step = core.step()
        steps += 1
        assert step.stats.step_tokens <= 24
        names = [output.request_id for output in step.outputs]
        assert names[:4] == [f"early-{i}" for i in range(4)], "the early ones get a token in every step"
        if "late" in names:
            break
        assert step.stats.step_tokens == 24, "its prompt fills what four decodes leave"
    assert steps == 3, "50 tokens of prompt, 20 a step"
    assert step.stats.num_running == 5
    core.abort([f"early-{i}" for i in range(4)] + ["late"])
    core.check_idle()


@pytest.mark.parametrize("budget", [2048, 6])
def test_greedy_tokens_are_those_of_the_cache_free_network(tiny_checkpoint, budget):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    rng = random.Random(8)
    prompts = [[rng.randrange(4, VOCAB) for _ in range(length)] for length in (1, 9, 21)]
    llm = LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, max_num_batched_tokens=budget)
    completions = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        # One full forward over prompt and answer says what greedy would have chosen at each place.
        logits, _ = full_forward(weights, config, prompt + completion.token_ids)
        assert completion.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
