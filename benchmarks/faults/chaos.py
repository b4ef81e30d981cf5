"""What abuse does to a server with the bundled model: the scenes of `tests/e2e/test_chaos.py`, and what they measure.

    python benchmarks/faults/chaos.py                         # all scenes, with a soak of two minutes
    python benchmarks/faults/chaos.py --scene soak --minutes 60 --owners
    python benchmarks/faults/chaos.py --quick                 # a little of each

Prints one line of JSON per scene, then a table. A scene that fails is reported as broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pyllm.benchmarks.measure import report

ROOT = Path(__file__).resolve().parents[2]
SCENES = {
    "hostile": "test_hostile_requests_do_not_change_an_answer",
    "disconnects": "test_disconnects_leave_no_blocks_and_no_files",
    "overload": "test_overload_loses_no_request",
    "drain": "test_sigterm_lets_streams_finish",
    "kill": "test_sigkill_frees_the_port_at_once",
    "slowloris": "test_half_open_connections_are_closed",
    "soak": "test_soak_leaves_no_block_and_no_error",
}


def play(scene: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run one scene in a process of its own and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        options = ["-m", "slow", "--timeout", "0", "-o", "junit_family=xunit1", "--junitxml", str(path)]
        test = f"tests/e2e/test_chaos.py::{SCENES[scene]}"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options, test], cwd=ROOT, env=os.environ | environment,
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        found = ElementTree.parse(path).getroot().find(".//testcase")
    if found is None:
        return {"broken": "the test was not found"}
    figures = {each.attrib["name"]: json.loads(each.attrib["value"]) for each in found.iterfind("properties/property")}
    failures = [each.attrib["message"] for kind in ("failure", "error") for each in found.iterfind(kind)]
    return figures | ({"broken": failures[0][-500:]} if failures else {})


def main() -> None:
    """Play the scenes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=list(SCENES), action="append", help="only this one; repeatable")
    parser.add_argument("--minutes", type=float, default=2, help="of the soak")
    parser.add_argument("--owners", action="store_true", help="say what holds the memory that a soak has grown by")
    parser.add_argument("--quick", action="store_true", help="less of everything, and half a minute of soak")
    args = parser.parse_args()
    environment = {"CHAOS_MINUTES": str(args.minutes), "CHAOS_QUICK": "1" if args.quick else ""}
    environment |= {"CHAOS_OWNERS": "1"} if args.owners else {}
    rows = []
    for scene in args.scene or SCENES:
        result = play(scene, environment)
        report("chaos", {"scene": scene} | result)
        rows += [(scene, name, value) for name, value in result.items()]
    for scene, name, value in rows:
        print(f"{scene:12} {name:34} {value}")


if __name__ == "__main__":
    main()
