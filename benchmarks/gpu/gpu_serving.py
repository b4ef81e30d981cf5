"""Goals over HTTP: a server against the engine alone, and long prompts next to streams; part of gpu_check.py."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

from pyllm.benchmarks.gpu.gpu_engine import make_core, prompt, run
from pyllm.benchmarks.gpu.gpu_measure import Machine
from pyllm.benchmarks.load.mixed import disturbance
from pyllm.benchmarks.measure import load, served

ROOT = Path(__file__).resolve().parents[2]


def serving_goals(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """G6 and G11. G10, the race with another server, needs that server: `race.py`."""
    shape, input_len, output_len, prompt_len = ("tiny-32k", 8, 4, 40) if machine.dry else ("1.5b", 128, 256, 2000)
    batches = (2,) if machine.dry else (32,) if quick else (32, 256)
    config = machine.shape("1.5b")
    model, draw = machine.model(config), random.Random(6)
    alone: dict[int, float] = {}
    for batch in batches:
        core = make_core(machine, model, batch, graphs=None if machine.dry else [batch])
        requests = [(prompt(draw, config, input_len), output_len) for _ in range(2 * batch)]
        run(core, requests[:2])
        seconds, answers = run(core, requests)
        alone[batch] = sum(map(len, answers.values())) / seconds
        del core
    del model
    machine.clear()
    rows: list[dict[str, Any]] = []

    def add(goal: str, what: str, value: float, accept: str = "") -> None:
        rows.append({"goal": goal, "what": what, "value": value, "accept": accept})

    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT, Path(folder) / "pyllm")  # importable, installed or not
        environment = {"PYTHONPATH": os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))}
        device = "cpu" if machine.dry else "cuda"
        flags = ("--device", device, "--max-num-seqs", str(max(batches)), "--max-num-batched-tokens", "8192")
        with served(shape, *flags, environment=environment) as (target, _):
            for batch in batches:
                size = {"requests": 2 * batch, "input_len": input_len, "output_len": output_len}
                rate = load(target, batch, **size)["output_tok_s"]
                accept = "0.92" if batch == 32 else "0.85"
                add("G6", f"output tokens/s over HTTP, {batch} clients", rate)
                add("G6", f"÷ the engine alone, {batch} at once", rate / alone[batch], accept)
            found = disturbance(target, min(8, max(batches)), 12 if machine.dry else 384, prompt_len)
            add("G11", f"p99 ITL next to prompts of {prompt_len} ÷ p50 without", found["ratio"], "2.5")
    return rows
