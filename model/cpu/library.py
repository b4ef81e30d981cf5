"""Which compiled kernels can run here: known without loading torch.

Each instruction set has a library of its own, so that no instruction of one gets into another. The best that this
processor has computes; `PYLLM_CPU_ISA` names another one, or `none` for plain torch.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "PYLLM_CPU_ISA"
NONE = "none"
SETS = {
    "avx512_bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""The features of a processor that each set needs, by Linux's names; the fastest set first."""


class InstructionSetError(ValueError):
    """`PYLLM_CPU_ISA` names what cannot compute here; the message is one sentence to show the user."""


def file_of(name: str) -> Path:
    """Return where the library of a set is, or would be."""
    return Path(__file__).with_name(f"_kernels_{name}.abi3.so")


@functools.cache
def _features() -> frozenset[str]:
    """What this processor can do; nothing where that cannot be read."""
    try:
        if sys.platform == "darwin":
            names = ["machdep.cpu.features", "machdep.cpu.leaf7_features"]
            done = subprocess.run(["/usr/sbin/sysctl", "-n", *names], capture_output=True, text=True, check=False)
            return frozenset(done.stdout.lower().split())
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def find_obstacle(name: str) -> str:
    """Return why the kernels of a set cannot compute here; "" if they can."""
    if missing := sorted(SETS[name] - _features()):
        return f"this processor lacks {', '.join(missing)}"
    return "" if file_of(name).exists() else "the kernels were not compiled when PyLLM was installed"


def usable_sets() -> list[str]:
    """Return the sets that can compute here, the fastest first."""
    return [name for name in SETS if not find_obstacle(name)]


def chosen_set() -> str:
    """Return the set that computes, or `none`; raise `InstructionSetError` if the one asked for cannot."""
    usable = usable_sets()
    asked = NONE if os.environ.get("PYLLM_NATIVE") == "0" else os.environ.get(VARIABLE, "").lower()
    if not asked:
        return usable[0] if usable else NONE
    if asked == NONE or asked in usable:
        return asked
    reason = find_obstacle(asked) if asked in SETS else "there is no such instruction set"
    raise InstructionSetError(f"{VARIABLE} is {asked}, but {reason}: set it to {' or '.join([*usable, NONE])}.")


def describe() -> str:
    """Say in a few words which kernels compute on this processor."""
    try:
        name = chosen_set()
    except InstructionSetError as error:
        return str(error)
    if name != NONE:
        return name
    return f"none, since {find_obstacle('avx2') or 'the environment says so'}"
