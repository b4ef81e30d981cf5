"""Trains the bundled demo model: `python model/demo/train.py`, on two CPU cores in under 90 minutes.

Everything follows from the seed and the number of blocks: tokenizer, corpus, order and weights. How many blocks fit
into `--minutes` is measured at the start and printed; `--blocks` repeats a training with the same number. It computes
in FP32, which processors without BF16 instructions do fastest, and saves the weights in BF16. One process a core, each
with some of a step's passes, is faster than one process with as many threads: these wait for each other at each of the
many small products.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from pyllm.model import AttentionMetadata, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.demo import parallel
from pyllm.model.demo.data import CONTEXT, PASSES_PER_STEP, Data, Pass
from pyllm.model.demo.muon import Muon
from pyllm.model.demo.network import TrainingBackend, config, new_model
from pyllm.model.demo.template import EOS, PAD, TEMPLATE

HERE = Path(__file__).resolve().parent
ACCURACY = HERE.parents[1] / "benchmarks" / "demo" / "accuracy.py"
UNPLANNED = 2
"""Blocks that are trained before their number is known, and so the same whatever it will be."""
WARMUP = 60  # steps
COPIES, FEWER = (0.3, 0.06), (0.1, 0.3)
"""The share of copying exercises at first and later, and between which parts of the training it falls."""
COOLDOWN = 0.5  # the share of the training over which the learning rate falls to nothing
SAVE_EVERY = 600.0  # seconds
RESERVE = 0.94
"""The share of the minutes that is planned: the rest is for slower blocks, and for the questions at the end."""


class Trainer:
    """The network and its optimizers, between two blocks; `state` is all that a restart needs."""

    def __init__(self, data: Data, model: DeepForCausalLM) -> None:
        self.data = data
        self.model = model
        self.backend = TrainingBackend()
        model.ops = self.backend
        trained = dict(model.named_parameters())
        routers = [p for name, p in trained.items() if name.endswith(".router")]
        matrices = [p for name, p in trained.items() if p.dim() > 1 and "embed" not in name and "router" not in name]
        vectors = [p for p in trained.values() if p.dim() == 1]
        groups = [{"params": [model.embed_tokens], "lr": 4e-3}, {"params": [*vectors, *routers], "lr": 2e-3}]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, model.config.hidden_size, 0.02),
            torch.optim.AdamW(groups, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.clipped = [model.embed_tokens, *vectors, *routers]
        self.blocks = self.steps = self.tokens = 0
        self.seconds = 0.0  # of training, in all runs together
        self.losses: dict[str, float] = {}

    def state(self) -> dict[str, object]:
        """Everything that changes during training."""
        return {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "blocks": self.blocks, "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds,
            "losses": self.losses,
        }  # fmt: skip

    def load(self, state: dict[str, object]) -> None:
        """Continue from what `state` returned."""
        values = dict(state)
        self.model.load_state_dict(values.pop("model"))  # type: ignore[arg-type]
        for optimizer, saved in zip(self.optimizers, values.pop("optimizers"), strict=True):  # type: ignore[call-overload]
            optimizer.load_state_dict(saved)
        for name, value in values.items():
            setattr(self, name, value)

    def block(self, total: int) -> None:
        """Train on the next block of `total`."""
        start = time.monotonic()
        begin = self.blocks / total
        steps = list(self.data.block(self.blocks, copies(begin)))
        for number, passes in enumerate(steps):
            progress = begin + number / len(steps) / total
            self.step(passes, min(1.0, (self.steps + 1) / WARMUP, (1 - progress) / COOLDOWN))
        self.blocks += 1
        self.seconds += time.monotonic() - start

    def step(self, passes: list[Pass], rate: float) -> None:
        """One update from a few passes of different lengths."""
        count = sum(int(one.learn.sum()) for one in passes)
        self.tokens += sum(len(one.ids) for one in passes)
        for one in passes[parallel.rank() :: parallel.processes()]:
            self.backend.penalties.clear()
            losses, rows = self.losses_of(one)
            penalty = torch.stack(self.backend.penalties).mean()
            (losses.sum() / count + 0.01 * penalty / len(passes)).backward()
            self.note(one.kinds, losses.detach(), rows)
        parallel.add_up([p.grad for p in self.model.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1

    def losses_of(self, one: Pass) -> tuple[Tensor, Tensor]:
        """The loss of each token that is to be learned, and the row it is in."""
        rows = len(one.kinds)
        positions = torch.arange(one.length).repeat(rows)
        targets = one.learn.reshape(rows, -1)[:, 1:].nonzero()  # row, place before the target
        at = targets[:, 0] * one.length + targets[:, 1]
        hidden = self.model(one.ids, positions, AttentionMetadata.without_cache([one.length] * rows))
        return F.cross_entropy(self.model.logits(hidden[at]), one.ids[at + 1], reduction="none"), targets[:, 0]

    def note(self, kinds: list[str], losses: Tensor, rows: Tensor) -> None:
        """Keep a running mean of each kind's loss, for the progress line."""
        sums = torch.zeros(len(kinds)).index_add_(0, rows, losses)
        counts = torch.zeros(len(kinds)).index_add_(0, rows, torch.ones_like(losses))
        for kind, loss in zip(kinds, (sums / counts.clamp(min=1)).tolist(), strict=True):
            self.losses[kind] = 0.98 * self.losses.get(kind, loss) + 0.02 * loss

    def report(self, total: int) -> str:
        """The progress line: blocks, speed, what is left, re-routed tokens, and the loss of each kind."""
        rerouted = 100 * sum(self.backend.rerouted) / max(1, len(self.backend.rerouted))
        self.backend.rerouted.clear()
        left = self.seconds / self.blocks * (total - self.blocks) / 60
        losses = " ".join(f"{kind} {loss:.3f}" for kind, loss in sorted(self.losses.items()))
        speed = self.tokens / self.seconds
        done = f"block {self.blocks}/{total} {speed:.0f} tokens/s {left:.0f} min left"
        return f"{done}, {rerouted:.1f} % re-routed: {losses}"


def copies(progress: float) -> float:
    """The share of copying exercises: many while everything else changes fast, so that copying is not forgotten."""
    fallen = min(1.0, max(0.0, (progress - FEWER[0]) / (FEWER[1] - FEWER[0])))
    return COPIES[0] + (COPIES[1] - COPIES[0]) * fallen


def train(trainer: Trainer, snapshot: Path, minutes: float, blocks: int | None) -> int:
    """Train to the end, with a snapshot now and then; return the number of blocks."""
    if snapshot.exists():
        saved = torch.load(snapshot)
        blocks = saved.pop("total")
        trainer.load(saved)
        say(f"continuing after block {trainer.blocks}")
    begin = written = time.monotonic()
    planned = blocks or UNPLANNED + 1
    while trainer.blocks < planned:
        before = trainer.seconds
        trainer.block(planned if trainer.blocks >= UNPLANNED else 10_000)
        if blocks is None and trainer.blocks == UNPLANNED:  # the last of them is the measure
            left = 60 * minutes * RESERVE - (time.monotonic() - begin)
            (planned, *_) = parallel.gather(UNPLANNED + max(1, int(left / (trainer.seconds - before))))
            say(f"{minutes:g} minutes are {planned} blocks here: repeat with --blocks {planned}")
        if trainer.blocks % 5 == 0 or trainer.blocks in (UNPLANNED, planned):
            say(trainer.report(planned))
        if parallel.rank() == 0 and trainer.blocks >= UNPLANNED and time.monotonic() - written > SAVE_EVERY:
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            torch.save(trainer.state() | {"total": planned}, snapshot.with_suffix(".new"))
            snapshot.with_suffix(".new").replace(snapshot)
            written = time.monotonic()
    return planned


def say(text: str) -> None:
    """Print a line once, however many processes train."""
    if parallel.rank() == 0:
        print(text, flush=True)


def write_settings(out: Path) -> None:
    """The chat template and defaults that go next to the weights."""
    names = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer_config = {
        **names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True, "temperature": 0.3, "top_p": 0.9}
    for name, values in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(out: Path, trainer: Trainer) -> None:
    """The card, with what `benchmarks/demo/accuracy.py` measures on the weights just saved."""
    command = [sys.executable, str(ACCURACY), str(out), "--failures", "3"]
    measured = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table, _, failures = measured.partition("\nFailures:\n")
    shape = trainer.model.config
    facts = {
        "parameters": f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        "megabytes": f"{(out / 'model.safetensors').stat().st_size / 1e6:.1f}", "blocks": str(trainer.blocks),
        "layers": str(shape.num_hidden_layers), "hidden": str(shape.hidden_size), "vocabulary": f"{shape.vocab_size:,}",
        "tokens": f"{trainer.tokens / 1e6:.1f}", "minutes": f"{trainer.seconds / 60:.0f}",
        "processes": str(parallel.processes()),
        "torch": torch.__version__.partition("+")[0], "table": table.strip(), "failures": failures.strip(),
    }  # fmt: skip
    card = (HERE / "card.md").read_text(encoding="utf-8")
    for name, value in facts.items():
        card = card.replace(f"{{{name}}}", value)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(table)


def run(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """Train in one of the processes; the first writes the checkpoint, asks the held-back questions and cards it."""
    if args.processes > 1:
        parallel.join(rank, args.processes, meeting)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = Data(args.out / "tokenizer.json")
    model = new_model(config(args.hidden, args.layers, args.width))
    say(f"{sum(p.numel() for p in model.parameters())} parameters")
    trainer = Trainer(data, model)
    blocks = train(trainer, args.snapshot, args.minutes, args.blocks)
    say(f"{blocks} blocks, {trainer.tokens} tokens in {trainer.seconds:.0f} s")
    if rank == 0:
        save_checkpoint(model, args.out, dtype=torch.bfloat16)
        write_settings(args.out)
        args.snapshot.unlink(missing_ok=True)
        write_card(args.out, trainer)


def main() -> None:
    """Make the tokenizer, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=85.0, help="time to train in, if --blocks is not given")
    parser.add_argument("--blocks", type=int, help="how much to train: the same number gives the same weights")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the checkpoint")
    where = "where to continue from if it exists; written every ten minutes, removed at the end"
    parser.add_argument("--snapshot", type=Path, default=Path("demo_snapshot/training.pt"), help=where)
    cores = "of one thread each; the order of sums, and so the weights, depend on their number"
    parser.add_argument("--processes", type=int, default=2, choices=range(1, PASSES_PER_STEP + 1), help=cores)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768, help="of all experts of a layer together")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.snapshot.exists():
        (args.out / "tokenizer.json").unlink(missing_ok=True)
    Data(args.out / "tokenizer.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the other processes end with this one
    with tempfile.TemporaryDirectory() as folder:
        given = (args, f"{folder}/meeting")
        spawn(run, given, args.processes, daemon=True) if args.processes > 1 else run(0, *given)


if __name__ == "__main__":
    # Large tensors come and go at each step: keep their memory instead of returning it to the system each time.
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "500000000"}
    if not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    main()
