"""Where the compiled kernels are, and whether they can run here: known without loading torch."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("_kernels.abi3.so")
CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"})


def find_obstacle() -> str:
    """Return why the compiled kernels cannot compute here; "" if they can."""
    if not FILE.exists():
        return "not compiled when PyLLM was installed"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "only for Linux"
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    missing = sorted(CPU_FLAGS.difference(flags))
    return f"this processor lacks {', '.join(missing)}" if missing else ""
