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
from pyllm.benchmarks.faults.attack_client import ATTACKS, To

__all__ = ["ATTACKS", "attacks_on_state", "attacks_on_wire"]


def main() -> None:
    name, host, port, seconds = sys.argv[1:]
    to = To(host, int(port), time.monotonic() + float(seconds))
    seen = asyncio.run(ATTACKS[name].play(to))
    print(json.dumps(dict(seen)))


if __name__ == "__main__":
    main()
