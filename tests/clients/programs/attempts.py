"""Runs the attempts of a program inside a client's environment, and prints one line of JSON for each.

An attempt is a function whose name begins with `try_`; its docstring says what it tries.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any

URL = os.environ.get("PYLLM_URL", "http://127.0.0.1:8000")
V1 = f"{URL}/v1"
MODEL = "pyllm-demo"
QUESTION = "What is the weather in Paris?"
WEATHER = '{"temperature": 7, "sky": "cloudy"}'
PARAMETERS = {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "get the weather in a city", "parameters": PARAMETERS},
}
GREETING = [{"role": "user", "content": "Hello!"}]


def main() -> None:
    """Run every attempt of the program that was started; the exit code is 1 if one failed."""
    members = vars(sys.modules["__main__"])
    chosen = sys.argv[1:]
    failed = False
    for name, attempt in list(members.items()):
        if not name.startswith("try_") or (chosen and name not in chosen):
            continue
        error = _error(attempt)
        failed |= error is not None
        print(json.dumps({"tried": " ".join(inspect.getdoc(attempt).split()), "error": error}), flush=True)
    sys.exit(failed)


def _error(attempt: Any) -> str | None:
    try:
        attempt()
    except Exception:
        return traceback.format_exc()
    return None


def uses_weather(text: str) -> None:
    """The answer uses what the tool returned."""
    assert "7 degrees" in text, text


def one(items: Iterable[Any]) -> Any:
    """The only item."""
    (item,) = items
    return item
