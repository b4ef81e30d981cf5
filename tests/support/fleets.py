"""Servers behind Ray Serve, the processes of each, and streams that may end early."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.serving import PATIENCE, ServerProcess, children, wait_for

HEADER = "x-pyllm-replica"


def descendants(pid: int) -> Iterator[int]:
    """The process ids of all processes below one."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def servers_of(fleet: ServerProcess) -> list[int]:
    """The process ids of the replicas' servers."""
    return [pid for pid in descendants(fleet.process.pid) if "--uds" in arguments(pid)]


def parent(pid: int) -> int:
    """The process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def samples(url: str, name: str, **labels: str) -> dict[str, float]:
    """The sum of a metric's samples with these labels, for each replica."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).raise_for_status().text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == f"pyllm:{name}" and labels.items() <= one.labels.items():
                found[one.labels["replica"]] += one.value
    return dict(found)


def wait_for_replicas(url: str, count: int) -> set[str]:
    """The names of the replicas, once there are so many that answer."""

    def there() -> set[str] | None:
        try:
            names = set(samples(url, "num_requests_running"))
        except httpx.HTTPError:
            return None
        return names if len(names) == count else None

    found: set[str] = wait_for(there, f"{count} replicas")
    return found


@dataclass
class Stream:
    """What a client saw of one streamed completion."""

    replica: str = ""
    tokens: int = 0  # as its end reports
    error: str = ""
    is_done: bool = False
    has_begun: threading.Event = field(default_factory=threading.Event)

    def read(self, url: str, prompt: str, max_tokens: int) -> Stream:
        """Send it, and read it to its end."""
        fields = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=PATIENCE) as response:
                self.replica = response.headers.get(HEADER, "")
                if response.status_code != 200:
                    self.error = f"{response.status_code} {response.read()!r}"
                    return self
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_done = not self.error
                    elif line.startswith("data: ") and "error" in json.loads(line[6:]):
                        self.error = line
                    elif line.startswith("data: "):
                        self.tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
                        self.has_begun.set()
        except httpx.HTTPError as error:
            self.error = self.error or repr(error)
        finally:
            self.has_begun.set()
        return self


@contextmanager
def streams(url: str, count: int, max_tokens: int) -> Iterator[list[Stream]]:
    """So many streams that have begun; leaving waits for their ends."""
    found = [Stream() for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(s.read, url, f"Stream {n}:", max_tokens) for n, s in enumerate(found)]
        for stream in found:
            assert stream.has_begun.wait(PATIENCE)
        yield found
        for future in done:
            future.result()
