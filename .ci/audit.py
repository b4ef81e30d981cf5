"""Ask pip-audit about every package of the lock files; `make audit` runs this.

Ends with 1 for a known vulnerability. Where the vulnerability service cannot be asked, says so and ends with 0, or with
1 if AUDIT_REQUIRED is set, as before a release: an audit that saw nothing must not pass for one that found nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOCKS = ("requirements.lock", "requirements-torch.lock")


def skip(reason: str) -> int:
    """The exit code of an audit that could not be made."""
    print(f"Audit SKIPPED: {reason}")
    return int(bool(os.environ.get("AUDIT_REQUIRED")))


def main() -> int:
    """Audit, and say what was found; the exit code."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        # Versions alone: what is installed by them is checked by its hash, and an audit is about versions.
        lines = [line for name in LOCKS for line in (root / name).read_text(encoding="utf-8").splitlines()]
        pins.writelines(line.split(";")[0].rstrip(" \\") + "\n" for line in lines if line[:1].isalnum())
        pins.flush()
        command = [
            "--disable-pip",
            "--no-deps",
            "--progress-spinner=off",
            "--format=json",
            f"--requirement={pins.name}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *command], capture_output=True, text=True, check=False
        )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        words = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"]
        return skip(f"pip-audit failed: {words[-1][:200]}")
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        return skip("the vulnerability service that can be reached from here knows none of the packages")
    found = 0
    for package in packages:
        for flaw in package.get("vulns", []):
            found += 1
            fixes = ", ".join(flaw["fix_versions"]) or "none yet"
            print(f"{package['name']} {package['version']}: {flaw['id']}; fixed in: {fixes}")
    print(f"Audit: {len(packages) - len(unknown)} packages, {found} known vulnerabilities.")
    if unknown:
        print(f"Not audited, since the service does not know them: {', '.join(unknown)}.")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
