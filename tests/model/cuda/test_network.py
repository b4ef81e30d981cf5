"""The whole network on Triton kernels: the published fixtures, plain torch in every era, and what a graph demands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import HASH, TINY, TR_HASH, random_model
from support.closeness import Closeness
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from pyllm.model import Architecture, AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.cuda import backend as cuda

SMALL = replace(TINY, vocab_size=96, hidden_size=32, intermediate_size=72, num_hidden_layers=2)
LATEST = Architecture.latest(SMALL)
ERAS = {
    "mu in attention, no highway": replace(LATEST, mu_highway=False),
    "mu the same for all tokens": replace(
        LATEST, contextual_mu=False, mu_attention=False, mu_highway=False, mu_router=False
    ),
    "mu after the MLP, a shared expert": replace(
        LATEST, contextual_mu=False, mu_highway=False, mu_guidance=True, shared_expert_size=48
    ),
    "TR-Hash": replace(HASH, output_gates=False, channel_modulation=False),
    "TR-Hash with gates and modulated channels": HASH,
}
VARIANTS: dict[str, DeepConfig] = {
    "routed": SMALL,
    "dense": replace(SMALL, use_token_routed_mlp=False),
    "sliding window, untied": replace(SMALL, sliding_window=5, tie_word_embeddings=False),
}
PAGE = 4


class Sequence:
    """One text, its pages, and how much of it is computed."""

    def __init__(self, ids: torch.Tensor, table: torch.Tensor) -> None:
        self.ids, self.table, self.computed = ids, table, 0


def step(model: DeepForCausalLM, cache: torch.Tensor, parts: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """Logits of the next tokens of some sequences, those with one token first."""
    ids, positions, slots = [], [], []
    for sequence, count in parts:
        at = torch.arange(sequence.computed, sequence.computed + count)
        ids.append(sequence.ids[at])
        positions.append(at)
        slots.append(sequence.table[at // PAGE].long() * PAGE + at % PAGE)
        sequence.computed += count
    metadata = AttentionMetadata(
        query_lens=[count for _, count in parts], seq_lens=[sequence.computed for sequence, _ in parts],
        num_decodes=sum(count == 1 for _, count in parts), slot_mapping=torch.cat(slots),
        block_tables=torch.stack([sequence.table for sequence, _ in parts]),
    )  # fmt: skip
    with torch.inference_mode():
        hidden = model(torch.cat(ids), torch.cat(positions), metadata, cache)
        return list(model.logits(hidden).split(metadata.query_lens))


def run(model: DeepForCausalLM, lengths: list[int], steps: list[list[tuple[int, int]]]) -> torch.Tensor:
    """All logits of random texts computed in these steps of (text, tokens)."""
    generator = torch.Generator().manual_seed(5)
    tables = torch.randperm(len(lengths) * 10, generator=generator).to(torch.int32).view(len(lengths), 10)
    texts = [
        Sequence(torch.randint(4, model.config.vocab_size, (length,), generator=generator), table)
        for length, table in zip(lengths, tables, strict=True)
    ]
    cache = model.new_kv_cache(tables.numel(), PAGE)
    cache.fill_(1e4)
    return torch.cat([part for parts in steps for part in step(model, cache, [(texts[n], c) for n, c in parts])])


def on_triton(model: DeepForCausalLM) -> DeepForCausalLM:
    model.ops = cuda.TritonBackend(model)
    return model


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than four tokens are many, so that small steps take the path of large ones."""
    monkeypatch.setattr(cuda, "FEW_TOKENS", 4)


def same(config: DeepConfig, architecture: Architecture | None = None) -> None:
    """Prompts as many tokens, then few: a decode together with another prompt's chunk, and decodes alone."""
    steps = [[(0, 9), (1, 5)], [(0, 1), (2, 3)], [(0, 1), (1, 1), (2, 1)]]
    models = [random_model(config, seed=2, architecture=architecture) for _ in range(2)]
    expected = run(models[0], [11, 6, 4], steps)
    logits = run(on_triton(models[1]), [11, 6, 4], steps)
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_plain_torch_in_every_phase(name):
    same(VARIANTS[name])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("era", ERAS)
def test_every_era_equals_plain_torch(era):
    same(replace(SMALL, **TR_HASH) if era.startswith("TR-Hash") else SMALL, ERAS[era])


@pytest.mark.usefixtures("few")
def test_golden_logits_and_greedy_text(golden):
    """The end of the prompt as a chunk of many tokens, after what plain torch computed, and the token after it."""
    expected = load_file(golden / "golden.safetensors")
    model = DeepForCausalLM.from_pretrained(golden)
    prompt = expected["input_ids"]
    blocks = -(-(len(prompt) + 1) // PAGE)
    text = Sequence(torch.cat([prompt, expected["greedy_ids"][:1]]), torch.arange(blocks, dtype=torch.int32))
    plain = model.new_kv_cache(blocks, PAGE)
    step(model, plain, [(text, len(prompt) - 7)])
    cache = on_triton(model).new_kv_cache(blocks, PAGE).copy_(plain)
    logits = step(model, cache, [(text, 7)])[0]
    assert (logits - expected["logits"][-7:]).abs().max() <= 2e-5 * expected["logits"].abs().max()
    following = step(model, cache, [(text, 1)])[0]
    assert torch.cat([logits[-1:], following]).argmax(-1).tolist() == expected["greedy_ids"][:2].tolist()


@pytest.mark.usefixtures("few")
def test_published_hash_line_in_bf16_keeps_the_error_budget():
    """The ends of the prompts of all fixtures together, after what plain torch computed."""
    from conftest import golden_folders

    if not golden_folders("golden-tr-hash"):
        pytest.skip("the published fixtures are not next to this checkout")
    closeness = Closeness()
    for folder in golden_folders("golden-tr-hash"):
        expected = load_file(folder / "golden.safetensors")
        model = DeepForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        prompt = expected["input_ids"]
        blocks = -(-len(prompt) // PAGE)
        text = Sequence(prompt, torch.arange(blocks, dtype=torch.int32))
        plain = model.new_kv_cache(blocks, PAGE)
        step(model, plain, [(text, len(prompt) - 7)])
        cache = on_triton(model).new_kv_cache(blocks, PAGE).copy_(plain)
        closeness.add(expected["logits"][-7:], step(model, cache, [(text, 7)])[0])
    closeness.check(2e-2)


def test_greedy_text_equals_plain_torch():
    prompt = torch.arange(4, 10)
    texts = [
        model.generate(prompt, max_new_tokens=6, temperature=0.0, eos_token_id=-1).tolist()
        for model in (random_model(SMALL, seed=4), on_triton(random_model(SMALL, seed=4)))
    ]
    assert texts[0] == texts[1]


def test_bf16_stays_as_near_to_fp32_as_plain_torch_does():
    exact = random_model(replace(SMALL, num_experts=1), seed=6)
    narrow = []
    for _ in range(2):
        model = DeepForCausalLM(exact.config, dtype=torch.bfloat16)
        model.load_state_dict(exact.state_dict())
        narrow.append(model)
    steps = [[(0, 36)], [(0, 1)]]
    true = run(exact, [37], steps).log_softmax(-1)
    divergence = [
        float((true.exp() * (true - run(model, [37], steps).log_softmax(-1))).sum(-1).mean())
        for model in (narrow[0], on_triton(narrow[1]))
    ]
    assert divergence[1] <= 1.2 * divergence[0]


def decode_bucket(model: DeepForCausalLM, lengths: list[int], rows: int) -> tuple[Any, ...]:
    """A step of `count` decodes in a bucket of `rows`, as a captured graph gets it: tensors alone tell the truth."""
    real = len(lengths)
    at = torch.tensor(lengths) - 1
    tables = torch.arange(rows * 8, dtype=torch.int32).view(rows, 8)
    pad = torch.full((rows - real,), -1)
    slots = tables[:real].gather(1, (at // PAGE)[:, None])[:, 0].long() * PAGE + at % PAGE
    metadata = AttentionMetadata(
        query_lens=[1] * rows, seq_lens=[1] * rows, num_decodes=rows, slot_mapping=torch.cat([slots, pad]),
        block_tables=tables, seq_lens_device=torch.cat([at + 1, pad + 1]).to(torch.int32), num_splits=2,
    )  # fmt: skip
    ids = torch.cat([(at * 5 + 4) % model.config.vocab_size, pad])
    return ids, torch.cat([at, pad + 1]), metadata


class NoQuestions(TorchDispatchMode):
    """Fails where the host asks the device for a number, or makes a tensor whose size depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "item", "nonzero", "_to_copy_from_host", "bincount", "masked_select"}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is launched: kernel, grid, and every argument that is no tensor."""
    seen: list[Any] = []
    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **how: Any) -> Any:
        fixed = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in (*args, *how.values())]
        seen.append((self.__name__, grid, fixed))
        return plain(self, *args, grid=grid, warmup=warmup, **how)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return seen


def test_decode_launches_do_not_depend_on_data(launches):
    model = on_triton(random_model(SMALL, seed=2))
    cache = model.new_kv_cache(32, PAGE)
    seen = []
    for lengths in ([1, 30, 7], [20, 2]):
        ids, positions, metadata = decode_bucket(model, lengths, 4)
        launches.clear()
        with torch.inference_mode(), NoQuestions():
            model.logits(model(ids, positions, metadata, cache))
        seen.append(list(launches))
    assert seen[0] == seen[1]
    per_layer = (len(seen[0]) - 3) / SMALL.num_hidden_layers  # without embedding, last norm and LM head
    assert per_layer == 10


@pytest.mark.parametrize("few", [cuda.FEW_TOKENS, 0], ids=["own products", "cuBLAS"])
def test_padding_rows_change_no_other_row_and_no_page(few, monkeypatch):
    monkeypatch.setattr(cuda, "FEW_TOKENS", few)
    model = on_triton(random_model(SMALL, seed=2))
    written = torch.randn(model.new_kv_cache(40, PAGE).shape, generator=torch.Generator().manual_seed(1))
    results = []
    for rows in (3, 5):
        cache = model.new_kv_cache(40, PAGE)
        cache.copy_(written)
        ids, positions, metadata = decode_bucket(model, [9, 17, 1], rows)
        with torch.inference_mode():
            out = model(ids, positions, metadata, cache)
        assert out.isfinite().all()
        results.append((out[:3], cache))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
