"""Our server against others, in turn and in one run, on the same load and at equal bits: BF16, int8, int4.

    python -m venv peer && peer/bin/pip install xllamacpp==2026.10.11549
    python benchmarks/load/race.py --llama "peer/bin/python benchmarks/load/llama_server.py"    # the table of the docs
    python benchmarks/load/race.py --llama bin/llama-server                                     # another build of it
    python benchmarks/load/race.py --peer vLLM http://127.0.0.1:8101 FOLDER PID                 # one that already runs

For each number of bits it starts our server, and llama.cpp's on the dense twin (`dense_twin.py`; needs the package
gguf). A server given by `--peer` races in BF16; PID is its first process. Each round measures all of them at every
number of clients, and the one that begins changes from round to round. Those that are not measured are halted
(SIGSTOP), since an idle server may take some processor time too. Prints a table of medians, and one JSON line.

The wheel of llama.cpp has AVX2 only. Against it on a machine with more, PYLLM_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2 before the command keep ours to AVX2 too; against a native build leave them out.

All get the same prompts of random token ids, and stream the same number of greedy tokens (`ignore_eos`), each a chunk.
Bits that our server does not have on this machine are left out. The flags of llama.cpp's server, and why:

    --threads, --threads-batch              as many as ours starts by itself: one per core
    --parallel, --cont-batching             a slot per client, so that no request waits for one; batched at each step
    --ctx-size; ours: --max-model-len       room for prompt and answer, rounded up to 256 tokens, in each slot
    --no-cache-prompt, --cache-ram 0; ours: --no-enable-prefix-caching
                                            random prompts cannot hit, and saving each slot's state costs time
    --flash-attn auto                       its own choice (on, on a CPU); keys and values in F16, its default
    --load-mode none                        weights in plain memory, as ours, rather than mapped from the file
    --samplers top_k --top-k 1              the cheapest greedy choice: at temperature 0 its usual chain would still run
    --log-verbosity 1                       errors only, as little as ours logs
    GOMP_SPINCOUNT (environment)            as ours: threads that spin longer take processor time from the client, and
                                            llama.cpp was several times slower next to other programs. OMP_WAIT_POLICY
                                            or --llama "env GOMP_SPINCOUNT=N PROGRAM" sets another
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from pyllm.benchmarks.load.dense_twin import TWINS, write_gguf
from pyllm.benchmarks.measure import PROC, family, family_seconds, load, peak_memory_mib, report, served
from pyllm.engine.client.launch import THREAD_SETTINGS
from pyllm.engine.host import compute_cores
from pyllm.server.cli.load_client import Target
from pyllm.server.flags import ConfigError

SHOWN = ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms")
BITS: Mapping[str, tuple[str, Sequence[str]]] = {
    "bf16": ("BF16", ()),
    "int8": ("Q8_0", ("--quantization", "int8")),
    "int4": ("Q4_0", ("--quantization", "int4")),
}
"""llama.cpp's type of weights and our flags."""
PEER_BITS = "bf16"  # of servers that already run
ROOM = 256  # contexts are multiples of it
OURS, LLAMA = "ours", "llama.cpp"
Runs = dict[int, dict[str, list[dict[str, float]]]]  # by number of clients and name


@dataclass(frozen=True, slots=True)
class Racer:
    """A running server."""

    name: str
    target: Target
    pid: int


def llama_flags(model: Path, port: int, *, threads: int, slots: int, context: int) -> list[str]:
    """The flags of llama.cpp's server; the reasons are at the top."""
    both = str(threads)
    return [
        "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--threads", both, "--threads-batch", both,
        "--parallel", str(slots), "--cont-batching", "--ctx-size", str(slots * context),
        "--no-cache-prompt", "--cache-ram", "0",
        "--flash-attn", "auto", "--load-mode", "none",
        "--samplers", "top_k", "--top-k", "1", "--log-verbosity", "1",
    ]  # fmt: skip


@contextlib.contextmanager
def llama_served(program: str, model: Path, *, slots: int, context: int) -> Iterator[Racer]:
    """llama.cpp's server on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = llama_flags(model, port, threads=compute_cores(), slots=slots, context=context)
    settings = {} if "OMP_WAIT_POLICY" in os.environ else THREAD_SETTINGS
    command = [*shlex.split(program), *flags]
    with subprocess.Popen(command, env=settings | os.environ, stdin=subprocess.DEVNULL, stdout=sys.stderr) as process:
        try:
            while not _is_healthy(port):
                if process.poll() is not None:
                    sys.exit(f"{program} exited with code {process.returncode} while starting.")
                time.sleep(0.05)
            yield Racer(LLAMA, Target(f"http://127.0.0.1:{port}", model.stem), process.pid)
        finally:
            process.kill()


def _is_healthy(port: int) -> bool:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200  # 503 while it loads
        except (OSError, HTTPException):
            return False


@contextlib.contextmanager
def halted(racers: Sequence[Racer]) -> Iterator[None]:
    """The processes of these servers do nothing meanwhile."""
    members = [member for racer in racers for member in family(racer.pid)]
    try:
        for member in members:
            os.kill(member, signal.SIGSTOP)
        yield
    finally:
        for member in members:
            os.kill(member, signal.SIGCONT)


def race(racers: Sequence[Racer], clients: Sequence[int], rounds: int, **size: int) -> Runs:
    """Measure all in turn."""
    for racer in racers:
        load(racer.target, max(clients), **size | {"output_len": 8})  # warm up
    runs: Runs = {n: {racer.name: [] for racer in racers} for n in clients}
    for turn in range(rounds):
        first = turn % len(racers)
        for n in clients:
            for racer in [*racers[first:], *racers[:first]]:
                with halted([other for other in racers if other is not racer]):
                    result = load(racer.target, n, **size)
                runs[n][racer.name].append(result)
                speed = f"{result['output_tok_s']:g} tok/s"
                print(f"round {turn + 1}: {racer.name}, {n} clients: {speed}", file=sys.stderr)
    return runs


def medians(runs: Runs) -> dict[str, dict[str, Any]]:
    """By number of clients: the medians of each server, and how many times as fast ours is as each other one."""
    table: dict[str, dict[str, Any]] = {}
    for n, by_name in runs.items():
        row: dict[str, Any] = {
            name: {key: round(statistics.median(result[key] for result in results), 2) for key in SHOWN}
            for name, results in by_name.items()
        }
        speeds = {name: figures["output_tok_s"] for name, figures in row.items()}
        ratio = {name: round(speeds[OURS] / speed, 2) for name, speed in speeds.items() if name != OURS}
        table[str(n)] = row | {"ratio": ratio}
    return table


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table for the docs."""
    lines = [
        "| bits | clients | server | output tokens/s | TTFT p50, ms | TPOT p50, ms | ours ÷ it |",
        "|" + "---|" * 7,
    ]
    for bits, table in results.items():
        for clients, row in table.items():
            for name in (OURS, *row["ratio"]):
                speed, first, each, _ = (f"{row[name][key]:g}" for key in SHOWN)
                ratio = f"**{row['ratio'][name]:.2f}**" if name in row["ratio"] else ""
                lines.append(f"| {bits} | {clients} | {name} | {speed} | {first} | {each} | {ratio} |")
    return "\n".join(lines)


def race_at(bits: str, args: argparse.Namespace, peers: Sequence[Racer]) -> tuple[Runs, dict[str, float]] | None:
    """Start the servers for a number of bits and race them: the runs, and each one's memory. None if ours lacks it."""
    kind, flags = BITS[bits]
    context = ((args.input_len + args.output_len) // ROOM + 1) * ROOM
    with contextlib.ExitStack() as stack:
        try:
            equal = ("--max-model-len", str(context), "--no-enable-prefix-caching")
            target, process = stack.enter_context(served(args.shape, *flags, *equal))
        except (ConfigError, SystemExit):  # it has logged why
            if not flags:
                raise
            return None
        racers = [Racer(OURS, target, process.pid)]
        if args.llama:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"{kind}.gguf"
            write_gguf(model, args.shape, kind)
            slots = max(args.clients)
            racers.append(stack.enter_context(llama_served(args.llama, model, slots=slots, context=context)))
        racers += peers if bits == PEER_BITS else ()
        runs = race(racers, args.clients, args.rounds, input_len=args.input_len, output_len=args.output_len)
        memory = {racer.name: round(sum(peak_memory_mib(racer.pid)), 1) for racer in racers} if PROC.is_dir() else {}
        return runs, memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TWINS, default="150m")
    parser.add_argument("--llama", metavar="PROGRAM", help="starts llama.cpp's server, with words before its flags")
    parser.add_argument("--peer", nargs=4, action="append", default=[], metavar=("NAME", "URL", "MODEL", "PID"))
    parser.add_argument("--bits", nargs="+", choices=list(BITS), default=list(BITS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    chosen = [bits for bits in args.bits if args.llama or (args.peer and bits == PEER_BITS)]
    if not chosen:
        parser.error(f"a race needs --llama, or --peer at {PEER_BITS}")
    peers = [Racer(name, Target(url, model), int(pid)) for name, url, model, pid in args.peer]
    used = sum(family_seconds(peer.pid) for peer in peers)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    memory: dict[str, dict[str, float]] = {}
    failed = 0
    for bits in chosen:
        if (raced := race_at(bits, args, peers)) is None:
            print(f"{bits} is left out, because our server does not have it on this machine.", file=sys.stderr)
            continue
        runs, memory[bits] = raced
        results[bits] = medians(runs)
        failed += int(sum(run["failed"] for by_name in runs.values() for each in by_name.values() for run in each))
    print(markdown(results), file=sys.stderr)
    result = {
        "shape": args.shape, "input_len": args.input_len, "output_len": args.output_len, "rounds": args.rounds,
        "results": results, "left_out": [bits for bits in chosen if bits not in results],
        "failed": failed, "peak_memory_mib": memory,
    }  # fmt: skip
    report("race", result, sum(family_seconds(peer.pid) for peer in peers) - used)


if __name__ == "__main__":
    main()
