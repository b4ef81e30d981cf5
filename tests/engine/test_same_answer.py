"""A request's tokens are its own: no cache, chunk, block, preemption or neighbour changes one of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from support.checkpoints import TINY, random_model

from pyllm.engine.build import build_engine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import EngineRequest, Pooling, SamplingParams
from pyllm.engine.step.core import EngineCore
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.cpu.backend import available

MODEL = replace(TINY, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)
MAX_LEN = 128
MIXES = 200


@dataclass(frozen=True)
class Asked:
    """A request, and how many steps after the first it comes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int = 0
    priority: int = 0
    cache_salt: str | None = None
    pooling: Pooling | None = None

    def message(self, name: str) -> EngineRequest:
        return EngineRequest(
            request_id=name, prompt_token_ids=list(self.prompt), params=self.params, priority=self.priority,
            cache_salt=self.cache_salt, pooling=self.pooling,
        )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(random_model(MODEL, seed=4), folder, dtype=torch.float32)
    return str(folder)


Answer = tuple[list[int], list[float]]


def answer(core: EngineCore, asked: list[Asked]) -> list[Answer]:
    """Of each request's output the token ids, and the numbers that were read of its prompt."""
    outputs: list[Answer] = [([], []) for _ in asked]
    step = 0
    while core.has_work or step <= max(request.arrival for request in asked):
        for i, request in enumerate(asked):
            if request.arrival == step:
                core.add_request(request.message(str(i)))
        step += 1
        for output in core.step().outputs:
            tokens, numbers = outputs[int(output.request_id)]
            tokens += output.token_ids
            numbers += output.embedding or [entry.logprob for entry in output.prompt_logprobs]
    core.check_idle()
    return outputs


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    """Not one token may differ; the sum of a prompt's states may, in what the order of its pieces rounds off."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, mine), (_, wanted) in zip(found, expected, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def random_rules(rng: random.Random) -> dict[str, object]:
    """Rules for single tokens, of a request that has any."""
    tokens = range(4, MODEL.vocab_size)
    return {
        "logit_bias": {token: rng.uniform(-9, 9) for token in rng.sample(tokens, rng.choice((0, 1, 30)))},
        "allowed_token_ids": rng.choice((None, tuple(tokens), tuple(rng.sample(tokens, rng.choice((1, 5, 60)))))),
        "bad_words": tuple(tuple(rng.choices(tokens, k=rng.choice((1, 1, 2)))) for _ in range(rng.choice((0, 3, 50)))),
        "min_tokens": 1, "stop_token_ids": (rng.choice(tokens),),
    }  # fmt: skip


def random_mix(rng: random.Random) -> list[Asked]:
    """Requests that share beginnings, greedy and seeded, long and short."""
    beginnings = [tuple(rng.randrange(4, MODEL.vocab_size) for _ in range(rng.randrange(1, 70))) for _ in range(3)]
    mix = []
    for _ in range(rng.randrange(1, 9)):
        beginning = rng.choice(beginnings)
        prompt = beginning[: rng.randrange(1, len(beginning) + 1)]
        prompt += tuple(rng.randrange(4, MODEL.vocab_size) for _ in range(rng.choice((0, 0, 3, 20))))
        params = SamplingParams(
            max_tokens=rng.randrange(1, min(40, MAX_LEN - len(prompt) + 1)),
            temperature=rng.choice((0.0, 0.0, 0.7, 1.5)), top_k=rng.choice((0, 5)), top_p=rng.choice((1.0, 0.8)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.2)), seed=rng.randrange(2**40), ignore_eos=True,
            prompt_logprobs=rng.choice((None,) * 7 + (2,)), **(random_rules(rng) if rng.random() < 0.3 else {}),
        )  # fmt: skip
        arrival = rng.choice((0, 0, rng.randrange(12)))
        pooling: Pooling | None = rng.choice((None,) * 14 + ("mean", "last"))
        mix.append(Asked(prompt, params, arrival, rng.randrange(3), rng.choice((None, None, "a")), pooling))
    return mix


@pytest.mark.skipif(
    not available(MODEL), reason="plain torch rounds by the shape of the step, the compiled kernels never"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_equal_in_200_random_mixes(checkpoint, dtype):
    def core(**settings: object) -> EngineCore:
        config = EngineConfig(model=checkpoint, dtype=dtype, max_model_len=MAX_LEN, quiet=True, **settings)
        return build_engine(config)

    plain = core(enable_prefix_caching=False, num_kv_blocks=200)
    rng = random.Random(dtype)
    hits = preemptions = 0
    for _ in range(MIXES):
        mix = random_mix(rng)
        block_size = rng.choice((1, 4, 16, 32))
        one_request = -(-MAX_LEN // block_size)
        engine = core(
            enable_prefix_caching=rng.random() < 0.7, block_size=block_size,
            num_kv_blocks=one_request + rng.choice((0, one_request // 2, 8 * one_request)),
            max_num_seqs=rng.choice((1, 3, 16)), max_num_batched_tokens=rng.choice((1, 7, 64, 2048)),
            max_num_prefill_tokens=rng.choice((None, 5, 50)), scheduling_policy=rng.choice(("fcfs", "priority")),
        )  # fmt: skip
        expected = [answer(plain, [replace(request, arrival=0)])[0] for request in mix]
        assert_same(answer(engine, mix), expected)
        assert_same(answer(engine, mix), expected)  # once more, with what the first time left in the cache
        hits += engine.scheduler.num_prefix_hits
        preemptions += engine.scheduler.num_preemptions
    assert hits > 1000
    assert preemptions > 20  # or the mixes would not have shown what they are for
