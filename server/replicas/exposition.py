"""The metrics of all replicas as one text, each with a label that says whose it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.*)")


def merge_expositions(texts: Mapping[str, str]) -> str:
    """Merge Prometheus texts, which have the same metrics, by the replicas' names.

    Totals are sums, as in `sum without(replica) (pyllm:request_success_total)`.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # by name: comments and samples
    for replica, text in texts.items():
        family, label = "", f'replica="{replica}"'
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                comments, _ = families.setdefault(family, ([], []))
                if line not in comments:
                    comments.append(line)
            elif found := SAMPLE.fullmatch(line):
                labels = f"{found[2].rstrip(',')},{label}" if found[2] else label
                _, samples = families.setdefault(family or found[1], ([], []))
                samples.append(f"{found[1]}{{{labels}}} {found[3]}")
    lines = [line for comments, samples in families.values() for line in (*comments, *samples)]
    return "\n".join(lines) + "\n"


def sample(text: str, name: str) -> float:
    """Return the sum of a metric's samples in a Prometheus text; 0 without any."""
    matches = (SAMPLE.fullmatch(line) for line in text.splitlines() if line.startswith(name))
    return sum(float(found[3]) for found in matches if found and found[1] == name)
