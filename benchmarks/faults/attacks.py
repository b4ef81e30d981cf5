"""What hostile clients cost the server: memory, `/health` and what came of it, one line per attack.

    python benchmarks/faults/attacks.py                        # each attack on a server of its own: half an hour
    python benchmarks/faults/attacks.py --only trailers        # repeatable; --list names them all
    python benchmarks/faults/attacks.py --checkout ../before   # the server of another checkout
    python benchmarks/faults/attacks.py --together --minutes 10

Every server runs with two keys and the bundled model, as root in a memory cgroup (`--limit`, 4 GiB; 1.5 GiB with
`--together`), so that an attack that succeeds kills only its server. MB are 10^6 bytes of resident memory: before, the
peak, and 30 s after the attack, of the API process and of the engine's; the engine's grows by the blocks of its KV
cache that are used for the first time. `--together` also prints what the API process had at its start, before a first
round of the attacks, and what it keeps at the end on purpose, by kind (`held_by`): each has a bound in docs/operations.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pyllm.benchmarks.faults.attack_client import KEYS, Attack
from pyllm.benchmarks.faults.attack_kinds import ATTACKS
from pyllm.benchmarks.faults.attacked_starts import STARTS
from pyllm.benchmarks.measure import family, report

ROOT = Path(__file__).resolve().parents[2]
REST = 30.0  # seconds after an attack
HONEST = 8
TOKENS = 160  # of each honest stream
EVERY = 0.05  # seconds between two looks at memory and at /health
LATE = 10.0  # seconds after which a probe is given up
CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Callable[[], None] | None]:
    """A memory cgroup, and what moves a new process into it; None where it cannot be made."""
    name = f"pyllm-attacks-{os.getpid()}-{time.monotonic_ns()}"
    first = (CGROUPS / "memory" / name, "memory.limit_in_bytes")
    folder, file = first if (CGROUPS / "memory").is_dir() else (CGROUPS / name, "memory.max")
    try:
        folder.mkdir()
        (folder / file).write_text(str(limit))
    except OSError:
        yield None
        return
    members = str(folder / "cgroup.procs")

    def enter() -> None:
        with open(members, "w") as sink:
            sink.write("0")

    try:
        yield enter
    finally:
        with contextlib.suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.2)
            folder.rmdir()


def megabytes(pid: int, name: str = "VmRSS") -> float:
    """A process's memory now, or its peak (`VmHWM`) since `reset_peak`; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


@dataclass(slots=True)
class Server:
    """A server under attack."""

    process: subprocess.Popen[bytes]
    port: int
    log: IO[bytes]

    @property
    def engine(self) -> int:
        return min(set(family(self.process.pid)) - {self.process.pid}, default=0)

    def get(self, path: str, key: str = KEYS[0]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LATE)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def held_by(self) -> dict[str, float]:
        """MB of memory that the API process holds for clients, by kind; without what is nothing."""
        found = re.findall(r'^pyllm:api_memory_bytes{.*kind="(\w+)".*} (\S+)$', self.get("/metrics")[1].decode(), re.M)
        return {kind: round(float(size) / 1e6, 1) for kind, size in found if float(size)}

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("/ready")[0] == 200
        return False


@contextlib.contextmanager
def served(checkout: Path, flags: tuple[str, ...], limit: int) -> Iterator[Server]:
    """A server of a checkout, ready, in a cgroup; it is killed on leaving."""
    with tempfile.TemporaryDirectory() as name, memory_group(limit) as enter:
        folder = Path(name)
        (folder / "packages").mkdir()
        (folder / "packages" / "pyllm").symlink_to(checkout)
        port = free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
        words = [flag.replace("{folder}", str(folder / "files")) for flag in flags]
        keys = [word for key in KEYS for word in ("--api-key", key)]
        with (folder / "log").open("w+b") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pyllm", "serve", "--port", str(port), "--log-level", "warning", *keys, *words],
                env=kept | {"PYTHONPATH": str(folder / "packages"), "OMP_NUM_THREADS": "1"}, cwd=folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=enter,
            )  # fmt: skip
            server = Server(process, port, log)
            try:
                while not server.is_ready():
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"the server ended: {log.read().decode()[-500:]}")
                    time.sleep(0.05)
                yield server
            finally:
                for pid in family(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Watch:
    """Looks at a server's memory and asks for /health until stopped."""

    server: Server
    before: tuple[float, float] = (0.0, 0.0)
    peaks: list[float] = field(default_factory=lambda: [0.0, 0.0])
    waits: list[float] = field(default_factory=list)
    _pids: tuple[int, int] = (0, 0)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._pids = self.server.process.pid, self.server.engine
        for pid in self._pids:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
        self.before = self.now()
        self._threads += [threading.Thread(target=work) for work in (self._look, self._probe)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def now(self) -> tuple[float, float]:
        api, engine = map(megabytes, self._pids)
        return api, engine

    @property
    def p99(self) -> float:
        waits = sorted(self.waits)
        return waits[min(int(0.99 * len(waits)), len(waits) - 1)] if waits else LATE

    def _look(self) -> None:
        while not self._stop.wait(EVERY):
            for n, pid in enumerate(self._pids):
                self.peaks[n] = max(self.peaks[n], megabytes(pid, "VmHWM"))

    def _probe(self) -> None:
        while not self._stop.wait(EVERY):
            since = time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.server.get("/health")
            self.waits.append(time.monotonic() - since)
            if self.server.process.poll() is not None:
                return


def play(name: str, server: Server, seconds: float) -> subprocess.Popen[bytes]:
    """Start an attack in a process of its own."""
    program = str(Path(__file__).with_name("attack_kinds.py"))
    return subprocess.Popen(
        ["nice", "-n", "19", sys.executable, program, name, "127.0.0.1", str(server.port), str(seconds)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def outcome(player: subprocess.Popen[bytes], seconds: float) -> Counter[str]:
    """What an attack has reported; it is ended where it takes much longer than it may."""
    try:
        said, _ = player.communicate(timeout=seconds + 30)
        return Counter(json.loads(said))
    except (subprocess.TimeoutExpired, ValueError):
        player.kill()
        player.wait()
        return Counter({"attack broke off": 1})


def state(server: Server) -> str:
    """Whether the server is alive, and what its log says if not."""
    if server.process.poll() is not None:
        return f"dead ({server.process.returncode})"
    with contextlib.suppress(OSError, http.client.HTTPException):
        return "alive" if server.get("/health")[0] == 200 else "unwell"
    return "hung"


def measure(attack: Attack, name: str, checkout: Path, limit: int, rest: float) -> dict[str, object]:
    """Play one attack on a server of its own."""
    with served(checkout, attack.flags, limit) as server, Watch(server) as watch:
        seen = outcome(play(name, server, attack.seconds), attack.seconds)
        during = watch.p99
        time.sleep(rest)
        api, engine = watch.now()
        return {
            "attack": name, "sent": attack.sends, "api_mb": [round(x) for x in (watch.before[0], watch.peaks[0], api)],
            "engine_mb": [round(x) for x in (watch.before[1], watch.peaks[1], engine)],
            "health_p99_s": round(during, 3), "came_of_it": dict(seen), "server": state(server),
        }  # fmt: skip


# ---- All at once ----


def honest_stream(server: Server, number: int, tokens: int = TOKENS) -> str:
    """The text of one greedy stream, or what went wrong: it begins with `!`."""
    body = {"prompt": f"Honest client {number} asks:", "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEYS[0]}"}
    try:
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                return f"!{answer.status}"
            events = [line[6:] for line in answer.read().split(b"\n") if line.startswith(b"data: ")]
    except (OSError, http.client.HTTPException) as error:
        return f"!{type(error).__name__}"
    if not events or events[-1] != b"[DONE]":
        return "!cut"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def attack_over_and_over(server: Server, names: list[str], until: float, seen: dict[str, Counter[str]]) -> None:
    """Play these attacks in turn, each for at most a minute."""
    while time.monotonic() < until and server.process.poll() is None:
        for name in names:
            seconds = min(ATTACKS[name].seconds, until - time.monotonic())
            if seconds > 1:
                seen.setdefault(name, Counter()).update(outcome(play(name, server, seconds), seconds))


def together(checkout: Path, limit: int, minutes: float, rest: float, names: list[str]) -> dict[str, object]:
    """Play the attacks at once, next to honest streams."""
    # So few blocks that all of them have been used before anything is measured: memory is theirs from their first use.
    flags = ("--batch-dir", "{folder}", "--max-num-queued-reqs", "2000", "--num-kv-blocks", "512")
    with served(checkout, flags, limit) as server:
        fresh = megabytes(server.process.pid)
        expected = [honest_stream(server, n) for n in range(HONEST)]
        for name in names:  # what is loaded on first use, and caches that fill up
            outcome(play(name, server, 2), 2)
        time.sleep(rest)
        verdicts: Counter[str] = Counter()
        seen: dict[str, Counter[str]] = {}
        until = time.monotonic() + 60 * minutes

        def honest(number: int) -> None:
            while time.monotonic() < until and server.process.poll() is None:
                text = honest_stream(server, number)
                verdicts["whole" if text == expected[number] else text if text[:1] == "!" else "!different"] += 1

        with Watch(server) as watch:
            workers = [threading.Thread(target=honest, args=(n,)) for n in range(HONEST)]
            workers += [
                threading.Thread(target=attack_over_and_over, args=(server, [name], until, seen)) for name in names
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            during = watch.p99
            time.sleep(rest)
            api, engine = watch.now()
            held_by = server.held_by() if server.process.poll() is None else {}
        grown = api - watch.before[0], engine - watch.before[1]
        return {
            "minutes": minutes, "limit_mb": round(limit / 1e6), "server": state(server), "honest": dict(verdicts),
            "api_fresh_mb": round(fresh), "api_mb": [round(x) for x in (watch.before[0], watch.peaks[0], api)],
            "held_by": held_by, "engine_mb": [round(x) for x in (watch.before[1], watch.peaks[1], engine)],
            "grown_api_mb": round(grown[0], 1), "grown_engine_percent": round(100 * grown[1] / watch.before[1], 1),
            "health_p99_s": round(during, 3), "health_max_s": round(max(watch.waits, default=0.0), 3),
            "came_of_it": {name: dict(found) for name, found in seen.items()},
        }  # fmt: skip


def line(result: dict[str, object]) -> str:
    """One row of the table."""

    def memory(name: str) -> str:
        figures = result.get(name)
        return " ".join(f"{x:>5}" for x in figures) if isinstance(figures, list) else " " * 17

    came = result["came_of_it"]
    said = ", ".join(f"{n} x {what}" for what, n in came.items()) if isinstance(came, dict) else str(came)
    health = f"{result['health_p99_s']:>7}" if "health_p99_s" in result else " " * 7
    return f"{result['attack']!s:18} {memory('api_mb')}  {memory('engine_mb')} {health}  {result['server']!s:9} {said}"


def size(text: str) -> int:
    return int(float(text.removesuffix("GiB")) * 2**30)


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*ATTACKS, *STARTS], action="append", help="only this one; repeatable")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose server is attacked")
    parser.add_argument("--together", action="store_true", help="all at once, next to honest streams")
    parser.add_argument("--minutes", type=float, default=10, help="with --together")
    parser.add_argument("--limit", type=size, help="GiB of memory of the server's cgroup")
    parser.add_argument("--rest", type=float, default=REST, help="seconds until memory is looked at again")
    parser.add_argument("--json", action="store_true", help="also one line of JSON per attack")
    parser.add_argument("--list", action="store_true", help="what there is, and what it sends")
    args = parser.parse_args()
    checkout, chosen = args.checkout.resolve(), args.only or [*ATTACKS, *STARTS]
    if args.list:
        for name in chosen:
            print(f"{name:18} {ATTACKS[name].sends if name in ATTACKS else STARTS[name].__doc__}")
        return
    if args.together:
        names = [name for name in chosen if name in ATTACKS]
        report("attacks together", together(checkout, args.limit or size("1.5"), args.minutes, args.rest, names))
        return
    print(f"{'attack':18} {'API MB: before, peak, later':17}  engine MB  /health p99 s, server, what came of it")
    for name in chosen:
        if name in ATTACKS:
            result = measure(ATTACKS[name], name, checkout, args.limit or size("4"), args.rest)
        else:
            result = {"attack": name, "server": "", "came_of_it": STARTS[name](checkout)}
        if args.json:
            report("attacks", result)
        print(line(result), flush=True)


if __name__ == "__main__":
    main()
