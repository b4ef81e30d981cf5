"""CPU time of the API process per streamed chunk, with a model so small that streaming is what is left.

    python benchmarks/load/streaming_cpu.py                 # 32 streams of chat
    python benchmarks/load/streaming_cpu.py --streams 1 --completions

A real server, with its engine in a process of its own as always. The time is that of the API process alone (user and
system, from /proc) between the moment when every stream runs and the end of the first, and the chunks are those that
arrived in between. One JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.measure import cpu_seconds, report, served
from pyllm.model.config import DeepConfig

TINY = DeepConfig(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16384,
    dynamics_controller_hidden=16,
)
EVENT = b"data: {"
GOAL_US = 15.0


class Stream(asyncio.Protocol):
    """Asks once and counts the events of the answer, at as little cost as can be."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.events = 0
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count; an event that is cut between two reads is rare enough to be lost."""
        self.events += data.count(EVENT)
        if self.events > 2:
            self.started.set()
        if data.find(b"[DONE]") >= 0:
            self.ended.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Keep no task waiting for a stream that has ended."""
        self.started.set()
        self.ended.set()


def request_bytes(args: argparse.Namespace, port: int) -> bytes:
    """One whole HTTP request."""
    body: dict[str, object] = {"max_tokens": args.tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    if args.completions:
        path, body["prompt"] = "/v1/completions", [7] * args.prompt_len
    else:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "a" * args.prompt_len}]
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def measure(args: argparse.Namespace, port: int, pid: int) -> dict[str, float]:
    """Run the streams together; CPU and chunks of the time in which all of them run."""
    loop = asyncio.get_running_loop()
    request = request_bytes(args, port)
    streams: list[Stream] = []
    for _ in range(args.streams):
        _, stream = await loop.create_connection(lambda: Stream(request), "127.0.0.1", port)
        streams.append(stream)
    await asyncio.gather(*(stream.started.wait() for stream in streams))
    before, chunks, start = cpu_seconds(pid), sum(stream.events for stream in streams), time.perf_counter()
    await asyncio.wait([loop.create_task(s.ended.wait()) for s in streams], return_when=asyncio.FIRST_COMPLETED)
    after, chunks, wall = cpu_seconds(pid), sum(s.events for s in streams) - chunks, time.perf_counter() - start
    user, system = (1e6 * (end - begin) / chunks for begin, end in zip(before, after, strict=True))
    return {"us_per_chunk": round(user + system, 2), "user_us": round(user, 2), "system_us": round(system, 2),
            "chunks": chunks, "chunks_per_s": round(chunks / wall)}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--completions", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    SHAPES["tiny"] = TINY
    with served("tiny", "--max-num-seqs", str(args.streams), environment={"OMP_NUM_THREADS": "1"}) as (target, process):
        port = int(target.base_url.rpartition(":")[2])
        rounds = [asyncio.run(measure(args, port, process.pid)) for _ in range(args.rounds)]
    middle = sorted(rounds, key=lambda each: each["us_per_chunk"])[len(rounds) // 2]
    endpoint = "completions" if args.completions else "chat"
    report("streaming_cpu", {"streams": args.streams, "endpoint": endpoint, **middle, "goal_us": GOAL_US,
                             "ratio": round(middle["us_per_chunk"] / GOAL_US, 2)})  # fmt: skip


if __name__ == "__main__":
    main()
