"""What Ray Serve costs between a client and a server, and how many prompt tokens its router finds in a cache.

    python benchmarks/load/replicas.py cost                         # 150M shape, 8 clients
    python benchmarks/load/replicas.py cost --demo --output-len 64  # the demo: bound by HTTP
    python benchmarks/load/replicas.py affinity                     # four tiny replicas next to one big server

`cost`: one server directly and one behind Ray Serve take turns under the same load. Throughput ÷ direct, times to the
first token, and the processor time of each process per request. `affinity`: conversations of several turns; the share
of prompt tokens found in the prefix cache by one big server, by four replicas with a quarter of its memory each, and by
the same replicas in turns (round robin, by names of sessions). One JSON line. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyllm.benchmarks.checkpoint import SHAPES, write_shape
from pyllm.benchmarks.measure import PROC, cpu_seconds, family, load, report
from pyllm.server.cli.bench import own_server
from pyllm.server.cli.load_client import Target

DEMO = "pyllm-demo"
KINDS = {"engine.process": "engine", "--uds": "API", "ServeReplica": "Ray replica", "ProxyActor": "Ray proxy",
         "ServeController": "Ray controller"}  # fmt: skip
HEADER = "x-pyllm-replica"


def kind(pid: int) -> str:
    """What a process is, by its command line."""
    line = (PROC / str(pid) / "cmdline").read_text(errors="replace")
    if found := next((name for word, name in KINDS.items() if word in line), None):
        return found
    return "API" if "--replicas" not in line and "serve\0" in line else "other Ray"


def used(pid: int) -> Counter[str]:
    """Processor seconds of a process and its descendants, by what they are."""
    found: Counter[str] = Counter()
    for member in family(pid):
        with contextlib.suppress(OSError):  # it ended while we looked
            found[kind(member)] += sum(cpu_seconds(member))
    return found


@contextlib.contextmanager
def servers(args: argparse.Namespace) -> Iterator[list[tuple[Target, subprocess.Popen[bytes]]]]:
    """The same server twice, directly and behind Ray Serve, both warm."""
    with contextlib.ExitStack() as stack:
        flags, name = list(args.server_args), DEMO
        if not args.demo:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / args.shape
            write_shape(folder, args.shape)
            flags, name = [str(folder), "--load-format", "dummy", *flags], args.shape
        found = []
        for extra in ([], ["--replicas", "1"]):
            base, process = stack.enter_context(own_server([*flags, *extra]))
            target = Target(base, name)
            load(target, args.clients, output_len=8, **sizes(args))
            found.append((target, process))
        yield found


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """The sizes of prompts and of the vocabulary."""
    vocabulary = 1000 if args.demo else SHAPES[args.shape].vocab_size
    return {"input_len": args.input_len, "vocab_size": vocabulary}


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """The medians of both ways, and their ratio."""
    runs: list[list[dict[str, float]]] = [[], []]
    seconds: list[Counter[str]] = [Counter(), Counter()]
    with servers(args) as pair:
        for turn in range(2 * args.rounds):
            which = (turn + turn // 2) % 2  # direct, Ray, Ray, direct, …: a drift affects both alike
            target, process = pair[which]
            before = used(process.pid)
            runs[which].append(
                load(target, args.clients, requests=args.requests, output_len=args.output_len, **sizes(args))
            )
            seconds[which] += used(process.pid) - before
    figures = ("output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    result: dict[str, Any] = {}
    for name, own, times in zip(("direct", "ray"), runs, seconds, strict=True):
        requests = sum(run["requests"] for run in own)
        result[name] = {each: round(statistics.median(run[each] for run in own), 2) for each in figures}
        result[name]["failed"] = sum(run["failed"] for run in own)
        result[name]["cpu_ms_per_request"] = {k: round(1000 * s / requests, 2) for k, s in times.most_common()}
    result["throughput_ratio"] = round(result["ray"]["output_tok_s"] / result["direct"]["output_tok_s"], 3)
    for each in ("ttft_p50_ms", "ttft_p99_ms"):
        result[f"{each.removesuffix('_ms')}_added_ms"] = round(result["ray"][each] - result["direct"][each], 2)
    return result | {"clients": args.clients, "input_len": args.input_len, "output_len": args.output_len}


def ask(base: str, body: Mapping[str, Any], session: str = "") -> tuple[str, str]:
    """Send a chat -> the answer's text, and the replica that gave it."""
    headers = {"content-type": "application/json"} | ({"x-session-id": session} if session else {})
    request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"], response.headers.get(HEADER, "")


def hit_rate(base: str) -> tuple[float, float]:
    """Prompt tokens found in the prefix caches, and looked up."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    hits, queries = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"pyllm:prefix_cache_{name}_total"))
        for name in ("hits", "queries")
    )
    return hits, queries


def converse(base: str, args: argparse.Namespace, mark: str, sessions: list[str]) -> dict[str, Any]:
    """Hold the conversations, `args.clients` at a time -> the hit rate, and the requests of each replica."""
    before, counts = hit_rate(base), Counter[str]()

    def hold(number: int) -> None:
        messages = [{"role": "system", "content": "Answer in one sentence."}]
        for turn in range(args.turns):
            messages.append({"role": "user", "content": f"{mark} {number}: what comes after {number + turn}, please?"})
            session = sessions[(number + turn) % len(sessions)] if sessions else ""
            text, replica = ask(base, {"messages": messages, "max_tokens": args.output_len, "temperature": 0}, session)
            counts[replica] += 1
            messages.append({"role": "assistant", "content": text})

    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(hold, range(args.conversations)))
    hits, queries = (after - earlier for after, earlier in zip(hit_rate(base), before, strict=True))
    return {"hit_rate": round(hits / queries, 4), "requests": sorted(counts.values())}


def sessions_of_all(base: str, replicas: int) -> list[str]:
    """Names of sessions, one for each replica."""
    names: dict[str, str] = {}
    for number in range(1000):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        names.setdefault(ask(base, body, f"session {number}")[1], f"session {number}")
        if len(names) == replicas:
            break
    return list(names.values())


def affinity(args: argparse.Namespace) -> dict[str, Any]:
    """The hit rates of one big server and of replicas with their shares of its memory."""
    flags = [*args.server_args, "--num-kv-blocks"]
    with own_server([*flags, str(args.kv_blocks)]) as (base, _):
        big = converse(base, args, "one", [])
    with own_server([*flags, str(args.kv_blocks // args.replicas), "--replicas", str(args.replicas)]) as (base, _):
        spread = converse(base, args, "one", [])
        in_turns = converse(base, args, "two", sessions_of_all(base, args.replicas))
    result = {"one_server": big, "replicas": spread, "round_robin": in_turns}
    ratio = round(spread["hit_rate"] / big["hit_rate"], 3)
    return result | {"ratio": ratio, "conversations": args.conversations, "turns": args.turns,
                     "kv_blocks": args.kv_blocks, "clients": args.clients}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "affinity"])
    parser.add_argument("--shape", choices=list(SHAPES), default="150m")
    parser.add_argument("--demo", action="store_true", help="the demo model instead of a shape")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, help="in one round (default: 2 a client)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=None, help="default: 128, in conversations 16")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kv-blocks", type=int, default=1024, help="of the big server; the replicas share as many")
    parser.add_argument("server_args", nargs="*", help="after --: more flags for the servers")
    args = parser.parse_args()
    args.output_len = args.output_len or (128 if args.what == "cost" else 16)
    result = cost(args) if args.what == "cost" else affinity(args)
    report(
        "replicas", {"what": args.what, "model": DEMO if args.demo or args.what == "affinity" else args.shape} | result
    )


if __name__ == "__main__":
    main()
