"""Goals that need the engine, but no server: throughput, idle time, prefix hits, speculation; part of gpu_check.py."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyllm.benchmarks.gpu.gpu_measure import Machine
from pyllm.engine.build import PREFILL_TOKENS
from pyllm.engine.config import ResolvedConfig, SpeculativeConfig
from pyllm.engine.messages import EngineInfo, EngineRequest, SamplingParams
from pyllm.engine.runner.model_runner import ModelRunner
from pyllm.engine.runner.step_graphs import CudaGraphs, token_counts
from pyllm.engine.step.core import EngineCore
from pyllm.model import DeepForCausalLM
from pyllm.model.config import DeepConfig

PAGE = 16
FLOOR_TOKENS, FLOOR_BANDWIDTH = 25300.0, 3.0e12
"""The G4 workload's floor in output tokens/s, and the bandwidth that it was computed for."""
Request = tuple[list[int], int]
"""(prompt, output tokens)."""


class Reruns:
    """Does recorded work again, in place of a graph, in a dry run."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work

    def used_bytes(self) -> int:
        return 0


def make_core(
    machine: Machine,
    model: DeepForCausalLM,
    most: int,
    *,
    overlap: bool = True,
    graphs: Sequence[int] | None = None,
    speculative: SpeculativeConfig | None = None,
    mixed: bool = True,
) -> EngineCore:
    """An engine around a model, with as many pages as are of use and fit; `graphs` are batch sizes, None all.

    `mixed` says whether other steps than decodes are recorded too.
    """
    config = model.config
    longest = 64 if machine.dry else 2048
    page = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE
    blocks = most * longest // PAGE
    if not machine.dry:
        machine.clear()
        blocks = min(blocks, int(0.8 * torch.cuda.mem_get_info(machine.device)[0]) // page)
    info = EngineInfo(
        config=ResolvedConfig(
            model="", dtype=str(machine.dtype)[6:], device=machine.device.type, max_model_len=longest,
            max_num_seqs=most, max_num_batched_tokens=16 if machine.dry else 8192, block_size=PAGE,
            num_kv_blocks=blocks, max_num_prefill_tokens=PREFILL_TOKENS["cuda"], overlap_scheduling=overlap,
            speculative_config=speculative,
        ),
        era="", parameters=0, load_seconds=0.0, vocab_size=config.vocab_size, eos_token_ids=(),
        chunk_multiple=model.ops.prefill_multiple,
    )  # fmt: skip
    runner = ModelRunner(model, info.config)
    if machine.dry or model.ops.capturable:
        maker = Reruns() if machine.dry else CudaGraphs(machine.device)
        counts = [8, 16] if machine.dry else token_counts(info.config.max_num_batched_tokens)
        runner.capture(maker, [most] if machine.dry else graphs, counts if mixed else ())
    return EngineCore(info, runner, runner.observer)


def submit(core: EngineCore, requests: Sequence[Request], name: str = "r") -> None:
    """Greedy requests of fixed lengths."""
    for index, (prompt, tokens) in enumerate(requests):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)
        core.add_request(EngineRequest(request_id=f"{name}{index}", prompt_token_ids=prompt, params=params))


def run(core: EngineCore, requests: Sequence[Request]) -> tuple[float, dict[str, list[int]]]:
    """The time of all requests at once, and their answers."""
    submit(core, requests)
    answers: dict[str, list[int]] = {}
    started = time.perf_counter()
    while core.has_work:
        for output in core.step().outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    seconds = time.perf_counter() - started
    core.check_idle()
    return seconds, answers


def prompt(draw: random.Random, config: DeepConfig, length: int) -> list[int]:
    """Random token ids."""
    return [draw.randrange(config.vocab_size) for _ in range(length)]


def step_seconds(machine: Machine, core: EngineCore, config: DeepConfig, batch: int) -> float:
    """The median time of a whole step in which `batch` sequences decode around 512 tokens."""
    draw = random.Random(batch)
    length, steps = (6, 3) if machine.dry else (480, 64)
    submit(core, [(prompt(draw, config, length), 4 * steps) for _ in range(batch)])
    times: list[float] = []
    while len(times) < steps and core.has_work:
        started = time.perf_counter()
        outputs = core.step().outputs
        if len(outputs) == batch:
            times.append(time.perf_counter() - started)
    core.abort([f"r{index}" for index in range(batch)])
    core.check_idle()
    return statistics.median(times[len(times) // 4 :])


def offline(machine: Machine, core: EngineCore, config: DeepConfig, count: int) -> float:
    """Output tokens/s of requests with 100 to 1024 tokens in and out."""
    draw = random.Random(0)
    low, high = (2, 4) if machine.dry else (100, 1024)
    requests = [(prompt(draw, config, draw.randint(low, high)), draw.randint(low, high)) for _ in range(count)]
    seconds, answers = run(core, requests)
    return sum(map(len, answers.values())) / seconds


def first_token_seconds(core: EngineCore, ids: list[int]) -> float:
    """The time to the only token of a request."""
    return run(core, [(ids, 1)])[0]


def engine_goals(machine: Machine, best: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    """G4, G7, G12 and G14, and what overlapping steps bring."""
    config = machine.shape("1.5b")
    model = machine.model(config)
    rows: list[dict[str, Any]] = []

    def add(goal: str, what: str, value: float, accept: str = "") -> None:
        rows.append({"goal": goal, "what": what, "value": value, "accept": accept})

    batches = (2,) if machine.dry else (32, 256)
    for batch in batches:
        core = make_core(machine, model, batch, graphs=[batch])
        runner = core.runner
        assert isinstance(runner, ModelRunner)
        wall = step_seconds(machine, core, config, batch)
        add("G7", f"ms of a step, batch {batch}", 1000 * wall)
        if runner.graphs is not None:
            device = machine.seconds(torch.inference_mode()(runner.graphs.decodes[-1].replay))
            add("G7", f"idle share, batch {batch}", max(0.0, 1 - device / wall), "0.08" if batch == 32 else "0.04")
        del core, runner
        alone = make_core(machine, model, batch, graphs=[batch], overlap=False)
        add("ablation", f"step in turn ÷ overlapped, batch {batch}", step_seconds(machine, alone, config, batch) / wall)
        del alone
    draw = random.Random(1)
    lengths = (9,) if machine.dry else (512, 2000)
    apart = make_core(machine, model, 2 if machine.dry else 256, mixed=False)
    core = make_core(machine, model, 2 if machine.dry else 256)
    assert isinstance(core.runner, ModelRunner)
    if core.runner.graphs is not None:
        add("graphs", "s to record all", core.runner.graphs.info.seconds)
        add("graphs", "MiB of them", core.runner.graphs.info.bytes / 2**20)
    for length in lengths:
        for each, name in ((core, ""), (apart, ", only decodes as graphs")):
            times = [first_token_seconds(each, prompt(draw, config, length)) for _ in range(2 if machine.dry else 6)]
            add("TTFT", f"ms of {length} tokens{name}", 1000 * statistics.median(times[1:]))
    del apart
    size = 20 if machine.dry else 1920
    cold, hit = [], []
    for _ in range(2 if machine.dry else 6):
        ids = prompt(draw, config, size)
        cold.append(first_token_seconds(core, ids))
        hit.append(first_token_seconds(core, ids[: size * 9 // 10] + prompt(draw, config, size - size * 9 // 10)))
    hit_share = statistics.median(hit[1:]) / statistics.median(cold[1:])
    add("G12", "TTFT at 90 % prefix hit ÷ cold", hit_share, "0.30")
    if not quick:
        rate = offline(machine, core, config, 2 if machine.dry else 256)
        floor = FLOOR_TOKENS * best["copy_bytes_per_s"] / FLOOR_BANDWIDTH
        add("G4", "offline output tokens/s", rate)
        add("G4", "÷ floor", rate / floor, "0.50")
    del core
    tokens = 4 if machine.dry else 256
    texts = {"copy-heavy": prompt(draw, config, 8) * (2 if machine.dry else 6), "random": prompt(draw, config, 40)}
    for text, ids in list(texts.items())[: 1 if machine.dry else None]:
        plain = run(make_core(machine, model, 1), [(ids, tokens)])
        guessed = run(make_core(machine, model, 1, speculative=SpeculativeConfig()), [(ids, tokens)])
        accept = "1.3" if text == "copy-heavy" else "0.97"
        add("G14", f"n-gram speculation ÷ off, {text} (random weights)", plain[0] / guessed[0], accept)
        add("G14", f"same greedy text, {text}", float(plain[1] == guessed[1]))
    return rows
