"""The libraries of the chat page: fetch them from npm, and check that the committed files are those of their packages.

python .ci/vendor.py           # check the committed files against server/api/static/vendor/libraries.json
python .ci/vendor.py --fetch   # write them again from their packages, with `npm pack`; new hashes go into that file
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "server" / "api" / "static" / "vendor"
LIST = FOLDER / "libraries.json"


def sha256(data: bytes) -> str:
    """Return the hash as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check(libraries: dict[str, Any]) -> list[str]:
    """Return what is wrong with the committed files; nothing if they are exactly the listed ones."""
    listed = {
        f"{name}/{file}": entry["sha256"] for name, lib in libraries.items() for file, entry in lib["files"].items()
    }
    present = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()} - {LIST.name}
    wrong = [f"{name} is listed and missing" for name in sorted(listed.keys() - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - listed.keys())]
    return wrong + [
        f"{name} is not the listed file"
        for name in sorted(listed.keys() & present)
        if sha256((FOLDER / name).read_bytes()) != listed[name]
    ]


def fetch(libraries: dict[str, Any]) -> None:
    """Write the files of each package, and their hashes into the list."""
    with tempfile.TemporaryDirectory() as folder:
        for name, library in libraries.items():
            command = ["npm", "pack", "--silent", f"{library['package']}@{library['version']}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            with tarfile.open(Path(folder, done.stdout.strip().splitlines()[-1])) as package:
                for file, entry in library["files"].items():
                    member = package.extractfile(f"package/{entry['from']}")
                    if member is None:
                        raise FileNotFoundError(entry["from"])
                    data = member.read()
                    target = FOLDER / name / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                    entry["sha256"] = sha256(data)
    LIST.write_text(json.dumps(libraries, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Fetch or check; the exit code."""
    libraries = json.loads(LIST.read_text(encoding="utf-8"))
    if arguments == ["--fetch"]:
        fetch(libraries)
    wrong = check(libraries)
    print(*wrong, sep="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
