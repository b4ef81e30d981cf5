"""The CPU's compiled kernels against plain torch, and against themselves in other company."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import HASH, TINY, TR_HASH, random_model
from support.closeness import Closeness

from pyllm.model import Architecture, AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.cpu.backend import NativeBackend, available
from pyllm.model.cpu.library import VARIABLE, find_obstacle, usable_sets

USABLE = usable_sets() if available(TINY) else []  # not with kernels of other sources

WIDE = replace(TINY, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
ODD = replace(
    TINY, vocab_size=333, hidden_size=88, num_attention_heads=4, num_key_value_heads=1, intermediate_size=150,
    num_experts=3, dynamics_controller_hidden=10,
)  # fmt: skip
VARIANTS = {
    "routed": TINY,
    "wide": WIDE,
    "odd-sizes": ODD,
    "dense": replace(TINY, use_token_routed_mlp=False),
    "dense-relu": replace(TINY, use_token_routed_mlp=False, hidden_act="relu"),
    "gelu": replace(TINY, hidden_act="gelu"),
    "sliding-window": replace(TINY, sliding_window=5),
    "long-window": replace(TINY, sliding_window=40),
    "no-qk-norm": replace(TINY, use_qk_norm=False),
    "untied": replace(TINY, tie_word_embeddings=False),
    "other-constants": replace(TINY, rms_norm_eps=0.01, rope_theta=500.0, dynamics_dt=0.3),
}
LATEST = Architecture.latest(TINY)
ERAS = {
    "mu in attention, no highway": replace(LATEST, mu_highway=False),
    "mu from the attention output, not in attention": replace(LATEST, mu_attention=False, mu_highway=False),
    "mu the same for all tokens": replace(
        LATEST, contextual_mu=False, mu_attention=False, mu_highway=False, mu_router=False
    ),
    "no router": replace(LATEST, mu_router=False),
    "mu after the MLP, a shared expert": replace(
        LATEST, contextual_mu=False, mu_highway=False, mu_guidance=True, shared_expert_size=48
    ),
}
HASHES = {
    "all": (replace(WIDE, **TR_HASH), HASH),
    "one expert, plain, no shared one": (
        ODD, replace(HASH, routes=1, shared_expert_size=0, output_gates=False, channel_modulation=False)
    ),
    "three of three, odd sizes": (replace(ODD, **TR_HASH), replace(HASH, routes=3)),
}  # fmt: skip
Step = list[tuple[int, int]]
"""(sequence, number of its next tokens), those with one token first."""


SKIPPED = pytest.param("none", marks=pytest.mark.skip(find_obstacle("avx2") or "the kernels are of other sources"))


@pytest.fixture(autouse=True, params=USABLE or [SKIPPED])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the kernels of each instruction set that this processor has."""
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def make(config: DeepConfig, dtype: torch.dtype = torch.float32) -> DeepForCausalLM:
    exact = random_model(config, seed=11)
    if dtype == torch.float32:
        return exact
    model = DeepForCausalLM(config, exact.architecture, dtype=dtype)
    with torch.no_grad():
        for target, source in zip(model.parameters(), exact.parameters(), strict=True):
            target.copy_(source)
        for target, source in zip(model.buffers(), exact.buffers(), strict=True):
            target.copy_(source)
    return model


def native(config: DeepConfig, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> DeepForCausalLM:
    model = make(config, dtype)
    model.ops = NativeBackend(model, int8=int8)
    return model


def both(config: DeepConfig, architecture: Architecture) -> tuple[DeepForCausalLM, DeepForCausalLM]:
    """A network of another era on the compiled kernels, and on plain torch."""
    fast, plain = (random_model(config, seed=11, architecture=architecture) for _ in range(2))
    fast.ops = NativeBackend(fast)
    return fast, plain


def prompts(config: DeepConfig, lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, config.vocab_size, (length,), generator=generator) for length in lengths]


def run(
    model: DeepForCausalLM, sequences: list[torch.Tensor], steps: list[Step], block_size: int = 4
) -> list[torch.Tensor]:
    """Logits [length, vocab] of each sequence, computed in these steps over shuffled pages full of other numbers."""
    widest = max(-(-len(ids) // block_size) for ids in sequences)
    cache = model.new_kv_cache(len(sequences) * widest + 2, block_size)
    cache.fill_(1e4)
    order = torch.randperm(cache.shape[2], generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = order[: len(sequences) * widest].view(len(sequences), widest)
    computed = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in steps:
        ids, positions, slots = [], [], []
        for n, count in step:
            at = torch.arange(computed[n], computed[n] + count)
            ids.append(sequences[n][at])
            positions.append(at)
            slots.append(tables[n][at // block_size].long() * block_size + at % block_size)
            computed[n] += count
        metadata = AttentionMetadata(
            query_lens=[count for _, count in step], seq_lens=[computed[n] for n, _ in step],
            num_decodes=sum(count == 1 for _, count in step), slot_mapping=torch.cat(slots),
            block_tables=tables[[n for n, _ in step]],
        )  # fmt: skip
        with torch.inference_mode():
            out = model.logits(model(torch.cat(ids), torch.cat(positions), metadata, cache))
        for (n, _), part in zip(step, out.split(metadata.query_lens), strict=True):
            logits[n].append(part)
    return [torch.cat(parts) for parts in logits]


def mixed_steps(lengths: list[int], seed: int) -> list[Step]:
    """Random chunks of random sequences until all are computed."""
    generator = torch.Generator().manual_seed(seed)
    left, steps = list(lengths), []
    while any(left):
        step = []
        for n in range(len(left)):
            if left[n] and torch.rand((), generator=generator) < 0.7:
                count = min(left[n], int(torch.randint(1, 20, (), generator=generator)))
                left[n] -= count
                step.append((n, count))
        if step:
            steps.append(sorted(step, key=lambda item: item[1] > 1))
    return steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_logits_equal_plain_torch(variant):
    config = VARIANTS[variant]
    sequences = prompts(config, [70, 33, 5])
    steps = mixed_steps([70, 33, 5], seed=2)
    for ours, expected in zip(run(native(config), sequences, steps), run(make(config), sequences, steps), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("era", ERAS)
def test_networks_of_other_eras_equal_plain_torch(era):
    """An era whose attention takes no mu once wrote the mu that it was handed behind its rows."""
    sequences, steps = prompts(WIDE, [300, 33, 5]), [[(0, 300), (1, 33), (2, 5)]]
    fast, plain = both(WIDE, ERAS[era])
    for ours, expected in zip(run(fast, sequences, steps), run(plain, sequences, steps), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", HASHES)
def test_networks_of_the_tr_hash_line_equal_plain_torch(name):
    config, architecture = HASHES[name]
    sequences, steps = prompts(config, [70, 33, 5]), mixed_steps([70, 33, 5], seed=2)
    fast, plain = (random_model(config, seed=11, architecture=architecture) for _ in range(2))
    fast.ops = NativeBackend(fast)
    for ours, expected in zip(run(fast, sequences, steps), run(plain, sequences, steps), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("int8", [False, True])
def test_experts_of_other_tokens_change_no_bit(int8):
    """Columns of experts that no token of a step uses are skipped."""
    config, architecture = HASHES["all"]
    model = random_model(config, seed=11, dtype=torch.bfloat16, architecture=architecture)
    model.ops = NativeBackend(model, int8=int8)
    sequences = prompts(config, [40, 17, 3])
    alone = [run(model, [ids], [[(0, 1)] for _ in ids])[0] for ids in sequences]
    together = run(model, sequences, mixed_steps([40, 17, 3], seed=3))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("variant", ["routed", "wide", "odd-sizes", "dense", "sliding-window", "untied"])
def test_bf16_stays_as_near_to_fp32_as_plain_torch_does(variant):
    config = VARIANTS[variant]
    sequences, steps = prompts(config, [200]), [[(0, 200)]]
    true = run(make(config), sequences, steps)[0].log_softmax(-1)

    def divergence(model: DeepForCausalLM) -> float:
        ours = run(model, sequences, steps)[0].log_softmax(-1)
        return float((true.exp() * (true - ours)).sum(-1).median())

    assert divergence(native(config, torch.bfloat16)) <= 1.5 * divergence(make(config, torch.bfloat16)) + 1e-6


def test_keys_and_values_are_rounded_to_the_nearest():
    """Cut off instead, they are smaller by 1.4e-3 on average, which no logits show."""
    ids, slots = prompts(WIDE, [64])[0], torch.arange(64)
    metadata = AttentionMetadata(
        query_lens=[64], seq_lens=[64], num_decodes=0, slot_mapping=slots,
        block_tables=torch.arange(4, dtype=torch.int32)[None],
    )  # fmt: skip

    def size(model: DeepForCausalLM) -> float:
        cache = model.new_kv_cache(4, 16)
        with torch.inference_mode():
            model(ids, slots, metadata, cache)
        return float(cache[0].double().abs().sum())

    assert size(native(WIDE, torch.bfloat16)) == pytest.approx(size(make(WIDE, torch.bfloat16)), rel=4e-4)


@pytest.mark.parametrize(("int8", "budget", "share"), [(False, 2e-2, 0.92), (True, 5e-2, 0.88)])
def test_published_hash_line_stays_within_the_error_budget(int8, budget, share):
    """Over all fixtures together, which a single flip in one would exceed."""
    from conftest import golden_folders

    if not golden_folders("golden-tr-hash"):
        pytest.skip("the published fixtures are not next to this checkout")
    closeness = Closeness()
    for folder in golden_folders("golden-tr-hash"):
        expected = load_file(folder / "golden.safetensors")
        model = DeepForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.ops = NativeBackend(model, int8=int8)
        ids = expected["input_ids"]
        closeness.add(expected["logits"], run(model, [ids], [[(0, len(ids))]])[0])
    closeness.check(budget, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("variant", ["wide", "odd-sizes", "sliding-window"])
def test_token_bits_do_not_depend_on_batch_chunk_or_page(variant, dtype, int8):
    model = native(VARIANTS[variant], dtype, int8=int8)
    lengths = [150, 64, 37, 9, 1]
    sequences = prompts(VARIANTS[variant], lengths)
    alone = [run(model, [ids], [[(0, len(ids))]], block_size=16)[0] for ids in sequences]
    for seed, block_size in ((3, 1), (4, 7), (5, 32)):
        together = run(model, sequences, mixed_steps(lengths, seed), block_size)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_cacheless_forward_equals_paged_bits():
    model = native(TINY, torch.bfloat16)
    lengths = [40, 7, 23]
    sequences = prompts(TINY, lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.inference_mode():
        hidden = model(torch.cat(sequences), positions, AttentionMetadata.without_cache(lengths))
        together = model.logits(hidden).split(lengths)
    paged = run(model, sequences, [[(0, 40), (1, 7), (2, 23)]])
    assert all(torch.equal(a, b) for a, b in zip(together, paged, strict=True))


def test_int8_stays_close_to_the_weights_it_was_made_of():
    sequences, steps = prompts(WIDE, [200]), [[(0, 200)]]
    true = run(make(WIDE), sequences, steps)[0]
    ours = run(native(WIDE, int8=True), sequences, steps)[0]
    assert 1e-3 < (ours - true).norm() / true.norm() < 0.1  # rounded, and no more than that


def test_generate_gives_the_same_tokens_with_either_backend():
    prompt = prompts(WIDE, [12])[0]
    texts = [model.generate(prompt, max_new_tokens=40, temperature=0.0, eos_token_id=-1)
             for model in (make(WIDE), native(WIDE))]  # fmt: skip
    assert torch.equal(*texts)


def test_the_number_of_threads_does_not_change_a_bit(tmp_path):
    save_checkpoint(make(WIDE), tmp_path, dtype=torch.float32)
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2]))\n"
        "from pyllm.model import DeepForCausalLM; from pyllm.model.cpu.backend import NativeBackend\n"
        "model = DeepForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16); model.ops = NativeBackend(model)\n"
        "out = model.generate(torch.arange(4, 90), max_new_tokens=30, temperature=0.0, eos_token_id=-1)\n"
        "print(out.tolist())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program, str(tmp_path), str(threads)], check=True, capture_output=True,
                       text=True).stdout
        for threads in (1, 2, 5)
    }  # fmt: skip
    assert len(outputs) == 1


def test_numbers_that_are_none_are_not_hidden_by_int8():
    model = native(WIDE, int8=True)
    hidden = torch.randn(3, WIDE.hidden_size)
    hidden[1, 5] = float("nan")
    logits = model.logits(hidden)
    assert logits.isnan().all(dim=1).tolist() == [False, True, False]


def test_a_binary_of_other_sources_is_not_used():
    program = (
        "import ctypes; from pyllm.model import DeepConfig; from pyllm.model.cpu import backend as native\n"
        "native.Step = type('Step', (ctypes.Structure,), {'_fields_': [('other', ctypes.c_int32)]})\n"
        "print(native.available(DeepConfig()))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "value"), [(VARIABLE, "none"), ("PYLLM_NATIVE", "0")])
def test_the_environment_turns_them_off(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not available(TINY)


def test_the_environment_chooses_them(instruction_set):
    assert NativeBackend(make(TINY)).instruction_set == instruction_set


def test_unsupported_shapes_fall_back_to_plain_torch():
    assert not available(replace(TINY, hidden_size=1024, num_attention_heads=2, num_key_value_heads=1))
    assert not available(replace(TINY, hidden_size=1024, num_attention_heads=32, num_key_value_heads=1))
