"""Draw throughput against the number of clients, from the lines of `serving.py`, as an SVG.

    python benchmarks/load/serving.py --clients 1 2 4 8 16 32 > serving.json
    python benchmarks/load/plot.py serving.json docs/images/throughput.svg

Several lines in the file make several curves, named by their shape and server flags.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 150, 36, 48
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706")


def scale(largest: float) -> float:
    """A round number of at least `largest`."""
    power = 10 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest)


def curves(lines: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Output tokens per second by number of clients, for each result."""
    return {
        " ".join([line["shape"], *line["server_args"]]): {int(n): r["output_tok_s"] for n, r in line["clients"].items()}
        for line in lines
    }


def draw(data: dict[str, dict[int, float]], subtitle: str) -> str:
    """The SVG's text; clients stand on a logarithmic axis."""
    clients = sorted({n for curve in data.values() for n in curve})
    top = scale(max(rate for curve in data.values() for rate in curve.values()))
    span = math.log2(clients[-1] / clients[0]) or 1.0

    def x(n: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(n / clients[0]) / span

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rate / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" fill="#444">Output tokens/s against clients; {subtitle}</text>',
    ]
    for tick in range(6):
        rate = top * tick / 5
        parts.append(f'<path d="M{LEFT} {y(rate):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:g}</text>')
    for n in clients:
        parts.append(f'<text x="{x(n):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{n}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">clients</text>')
    for (name, curve), colour in zip(data.items(), COLOURS, strict=False):
        points = [(x(n), y(rate)) for n, rate in sorted(curve.items())]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
        px, py = points[-1]
        parts.append(f'<text x="{px + 8:.1f}" y="{py + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what serving.py printed, one or several lines")
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines() if line.startswith("{")]
    subtitle = f"prompt {lines[0]['input_len']}, answer {lines[0]['output_len']}, {lines[0]['machine']}"
    args.svg.write_text(draw(curves(lines), subtitle), encoding="utf-8")


if __name__ == "__main__":
    main()
