"""Is it right, and how fast is it, on this GPU: one command, for a machine with torch, Triton, NumPy and safetensors.

    python benchmarks/gpu/gpu_check.py             # meant to take 8 minutes; `--only` runs some of its parts
    python benchmarks/gpu/gpu_check.py --quick     # 2 minutes
    python benchmarks/gpu/gpu_check.py --dry-run   # no GPU: tiny shapes in Triton's interpreter

It needs no network, no checkpoint and no installed package: this checkout is the package. It compares
every operation with plain torch in FP32, compares greedy texts, measures what the GPU can do at best and how near the
engine comes to it, and shows where a decode step's time goes. A table goes to the terminal, and JSON to
`gpu_check.json` in the folder that the variable OUT names (or to `--json FILE`). It exits with 1 if anything is wrong.
The goals are those of docs/performance.md; those that need the engine run where msgspec is installed, those over HTTP
where all that a server needs is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPLACED = {"tqdm", "tokenizers", "llguidance"}
"""Modules that are imported on the way, but not needed for anything but a server."""
SETUP_HELP = "Python file to run first; tests/support/triton_interpreter.py fixes faults of Triton's interpreter"
SERVER = (*REPLACED, "msgspec", "fastapi", "uvicorn", "uvloop", "httptools", "minijinja", "sse_starlette")
"""Modules that a server cannot do without."""


class _Nothing:
    """Any attribute of a module that is not installed, such as an unused progress bar."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, *_: Any) -> None:
        """Move on."""


class _Absent(types.ModuleType):
    """Takes the place of a module that ours import, but do not need for what is done here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def _load(name: str, path: Path, folders: list[str] | None = None) -> None:
    """Import the file `path` as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def prepare(dry: bool, setup: Path | None) -> list[str]:
    """Make `pyllm` importable, installed or not, after running the file `setup`; return the missing modules."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if setup is not None:
        _load("setup_file", setup)
    if "pyllm" not in sys.modules:
        _load("pyllm", ROOT / "__init__.py", [str(ROOT)])
    missing = [name for name in ("triton", *SERVER) if importlib.util.find_spec(name) is None]
    for name in REPLACED.intersection(missing):
        sys.modules[name] = _Absent(name)
    return missing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--setup", type=Path, help=SETUP_HELP)
    return parser.parse_args()


PARTS = (
    "kernels",
    "greedy",
    "ceilings",
    "decode",
    "flashinfer",
    "prefill",
    "tr-hash",
    "deterministic",
    "engine",
    "profile",
    "serving",
)


class Report:
    """What was found, part by part, printed as it comes."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.wrong: list[str] = []
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", flush=True)

    def table(self, part: str, rows: list[dict[str, Any]]) -> None:
        """Rows with the same columns."""
        self.parts[part] = rows
        if rows:
            shown = [[_shown(value) for value in row.values()] for row in rows]
            widths = [max(map(len, column)) for column in zip(map(str, rows[0]), *shown, strict=True)]
            self.say(part)
            for line in [list(map(str, rows[0])), *shown]:
                print("         ", "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kernels(report: Report, machine: Any, quick: bool) -> None:
    from pyllm.benchmarks.gpu.gpu_kernels import check_all

    seconds = 40.0 if quick else 200.0
    checks, left = check_all(machine.device, machine.backend, quick=quick, dry=machine.dry, seconds=seconds)
    worst: dict[tuple[str, str], Any] = {}
    for check in checks:
        key = check.name, check.dtype
        if key not in worst or not worst[key].error >= check.error:
            worst[key] = check
        if not check.ok:
            report.wrong.append(f"{check.name} in {check.dtype} at {check.shape}: error {check.error:.3g}")
    rows = [
        {"operation": c.name, "dtype": c.dtype, "worst error": c.error, "limit": c.limit, "at": c.shape,
         "ok": all(o.ok for o in checks if (o.name, o.dtype) == key)}
        for key, c in sorted(worst.items())
    ]  # fmt: skip
    report.table("kernels", rows)
    report.say(f"{sum(c.ok for c in checks)} of {len(checks)} comparisons right; {left} cases not reached in the time")


def main() -> int:
    """Run all parts."""
    args = _arguments()
    missing = prepare(args.dry_run, args.setup)
    report = Report()
    import torch

    from pyllm.benchmarks.gpu.gpu_measure import (
        Machine,
        ceilings,
        decode_goals,
        greedy_equality,
        overlap_equality,
        prefill_goals,
        profile_steps,
    )

    if not args.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device that torch can use; --dry-run tries the program without one.")
        return 2
    machine = Machine(args.dry_run, has_triton="triton" not in missing)
    report.parts["machine"] = machine.describe() | {"missing": missing, "quick": args.quick, "dry_run": args.dry_run}
    report.say(", ".join(f"{key} {value}" for key, value in report.parts["machine"].items()))
    best: dict[str, float] = {}
    for part in args.only:
        started = time.monotonic()
        try:
            if part == "kernels":
                _kernels(report, machine, args.quick)
            elif part == "greedy":
                rows = greedy_equality(machine, ROOT, args.quick)
                rows += overlap_equality(machine) if machine.has_triton else []
                report.table(part, rows)
                report.wrong += [f"greedy text of {row['model']}" for row in rows if not row["ok"]]
            elif part == "ceilings" or (part in ("decode", "prefill", "tr-hash", "engine") and not best):
                best = ceilings(machine)
                report.table("ceilings", [{"what": key, "value": value} for key, value in best.items()])
            if part == "decode":
                report.table(part, decode_goals(machine, best, args.quick))
            elif part == "flashinfer":
                from pyllm.benchmarks.gpu.gpu_flashinfer import against_flashinfer

                report.table(part, against_flashinfer(machine))
            elif part == "prefill":
                report.table(part, prefill_goals(machine, best, args.quick))
            elif part == "tr-hash":
                from pyllm.benchmarks.gpu.gpu_hash import hash_equality, hash_goals

                rows = hash_equality(machine)
                report.table("tr-hash, exactness", rows)
                report.wrong += [f"TR-Hash, {row['what']}: error {row['error']}" for row in rows if not row["ok"]]
                report.table(part, hash_goals(machine, best, args.quick))
            elif part == "deterministic":
                from pyllm.benchmarks.gpu.gpu_deterministic import check_deterministic, deterministic_goals

                rows = deterministic_goals(machine, args.quick)
                report.table(part, rows)
                report.wrong += [
                    row["what"] for row in rows if row["what"].startswith("same bits") and not row["value"]
                ]
                report.wrong += check_deterministic(machine)
            elif part == "profile":
                for name, rows in profile_steps(machine, args.quick).items():
                    report.table(f"profile of {name}", rows)
            elif part == "engine" and "msgspec" in missing:
                report.say("engine: left out, since msgspec is not installed")
            elif part == "engine":
                from pyllm.benchmarks.gpu.gpu_engine import engine_goals

                report.table(part, engine_goals(machine, best, args.quick))
            elif part == "serving" and (absent := [name for name in SERVER if name in missing]):
                report.say(f"serving: left out, since {', '.join(absent)} are not installed")
            elif part == "serving":
                from pyllm.benchmarks.gpu.gpu_serving import serving_goals

                report.table(part, serving_goals(machine, args.quick))
        except Exception as error:  # what the other parts find is worth having all the same
            report.wrong.append(f"{part}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            import traceback

            traceback.print_exc()
            machine.clear()
        report.parts.setdefault("seconds", {})[part] = round(time.monotonic() - started, 1)
    report.parts["wrong"] = report.wrong
    for fault in report.wrong:
        report.say(f"WRONG: {fault}")
    folder = os.environ.get("OUT")
    path = args.json or (Path(folder) / "gpu_check.json" if folder else None)
    if path is not None:
        path.write_text(json.dumps(report.parts, indent=1, default=str))
    report.say("all right" if not report.wrong else f"{len(report.wrong)} things are wrong")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
