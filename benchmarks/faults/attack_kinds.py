"""Every attack by a client: plays one against a running server, and prints what came of it as JSON.

    python benchmarks/faults/attack_kinds.py NAME HOST PORT SECONDS

`attacks.py` measures the server meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from pyllm.benchmarks.faults import attacks_on_state, attacks_on_wire
from pyllm.benchmarks.faults.attack_client import ATTACKS, Seen, To

GRACE = 5.0  # seconds
__all__ = ["ATTACKS", "attacks_on_state", "attacks_on_wire"]


def main() -> None:
    name, host, port, seconds = sys.argv[1:]
    to = To(host, int(port), time.monotonic() + float(seconds))
    try:
        seen = asyncio.run(_play(name, to))
    except (OSError, EOFError, LookupError, ValueError) as error:  # an answer that is no answer
        seen = Seen({f"gave up ({type(error).__name__})": 1})
    print(json.dumps(dict(seen)))


async def _play(name: str, to: To) -> Seen:
    """Play an attack; one that the server neither answers nor refuses is given up soon after its time."""
    try:
        return await asyncio.wait_for(ATTACKS[name].play(to), to.until - time.monotonic() + GRACE)
    except TimeoutError:
        return Seen({"no answer": 1})


if __name__ == "__main__":
    main()
