"""Ask a running server what its model did for each token, and draw it as an SVG.

    pyllm serve &
    python docs/images/dynamics.py "What is the capital of Italy?" docs/images/dynamics.svg

Needs the `openai` package. Each column is a generated token. Above, the colour of a cell is the expert that computed
it in that layer (a black frame: mu chose it against the token's id). Below are the norms of mu and of velocity.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path
from typing import Any

from openai import OpenAI

CELL, LEFT, TOP, PANEL, LABELS = 22, 70, 40, 110, 90
LINE = ((190, 20), (210, 50), (240, 110))
"""Red, green and blue of the lowest and of the highest layer."""
EXPERTS = ("#60a5fa", "#f87171", "#34d399", "#fbbf24", "#a78bfa", "#f472b6", "#22d3ee", "#a3e635")


def ask(url: str, question: str) -> list[dict[str, Any]]:
    """One entry per token of the answer."""
    client = OpenAI(base_url=url, api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=40,
        extra_body={"return_dynamics": True},
    )
    dynamics: list[dict[str, Any]] = answer.choices[0].model_dump()["dynamics"]
    return dynamics


def draw_norms(name: str, rows: list[list[float]], top: float) -> list[str]:
    """A panel with one line per layer, on a logarithmic scale; `rows` has one list per token."""
    values = [math.log10(max(value, 1e-9)) for row in rows for value in row]
    low, high = math.floor(min(values)), math.ceil(max(values))
    parts = [f'<text x="{LEFT - 8}" y="{top + PANEL / 2}" text-anchor="end">|{name}|</text>']
    for tick in range(low, high + 1):
        y = top + PANEL * (high - tick) / max(high - low, 1)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{CELL * len(rows)}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT + CELL * len(rows) + 6}" y="{y + 4:.1f}" fill="#666">{10.0**tick:g}</text>')
    for layer in range(len(rows[0])):
        heights = [PANEL * (high - math.log10(max(row[layer], 1e-9))) / max(high - low, 1) for row in rows]
        points = " ".join(f"{LEFT + CELL * (n + 0.5):.1f},{top + y:.1f}" for n, y in enumerate(heights))
        shade = layer / max(len(rows[0]) - 1, 1)
        colour = "#" + "".join(f"{round(light + (dark - light) * shade):02x}" for light, dark in LINE)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return parts


def draw(question: str, dynamics: list[dict[str, Any]]) -> str:
    """The SVG's text."""
    layers = len(dynamics[0]["experts"])
    below = TOP + CELL * layers + LABELS
    panels = [name for name in ("mu", "velocity") if dynamics[0][f"{name}_norm"]]
    width, height = max(LEFT + CELL * len(dynamics) + 60, 560), below + (PANEL + 30) * len(panels) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        ' font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" fill="#444">{escape(question)} (dark lines below are upper layers)</text>',
    ]
    for n, token in enumerate(dynamics):
        x = LEFT + CELL * n
        for layer, (expert, rerouted) in enumerate(zip(token["experts"], token["rerouted"], strict=True)):
            y = TOP + CELL * (layers - 1 - layer)
            frame = ' stroke="black" stroke-width="2"' if rerouted else ' stroke="white"'
            fill = EXPERTS[expert % len(EXPERTS)]
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}"{frame}/>')
            parts.append(f'<text x="{x + CELL / 2}" y="{y + 15}" text-anchor="middle">{expert}</text>')
        text, y = escape(repr(token["token"])[1:-1].replace(" ", "\u2423")), TOP + CELL * layers + 8
        parts.append(f'<text transform="translate({x + CELL / 2 + 4} {y}) rotate(-90)" text-anchor="end">{text}</text>')
    for layer in range(layers):
        y = TOP + CELL * (layers - 1 - layer) + 15
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">layer {layer}</text>')
    for n, name in enumerate(panels):
        parts += draw_norms(name, [token[f"{name}_norm"] for token in dynamics], below + (PANEL + 30) * n)
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Ask, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("svg", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    args.svg.write_text(draw(args.question, ask(args.url, args.question)), encoding="utf-8")


if __name__ == "__main__":
    main()
