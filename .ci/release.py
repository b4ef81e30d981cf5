"""Check that what is about to be released fits its tag.

python .ci/release.py v1.2.3        # the version, the changelog and the manifests
python .ci/release.py v1.2.3 dist   # and the files that `make dist` has built
"""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

KERNELS = {f"pyllm/model/cpu/_kernels_{name}.abi3.so" for name in ("avx2", "avx512_bf16")}


def problems(root: Path, tag: str, dist: Path | None) -> Iterator[str]:
    """Yield what does not fit the tag."""
    version = tag.removeprefix("v")
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not tag.startswith("v") or version != declared:
        yield f"The tag is {tag}, but pyproject.toml has the version {declared}: v{declared} is expected."
    if f"\n## [{version}]" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield f"CHANGELOG.md has no section [{version}]: rename [Unreleased]."
    for path in sorted((root / "docker" / "kubernetes").rglob("kustomization.yaml")):
        for found in re.findall(r"newTag: ([^-\s}]+)", path.read_text(encoding="utf-8")):
            if found != version:
                yield f"{path.relative_to(root)} names the image of version {found}."
    if dist is not None:
        yield from problems_of_files(dist, version)


def problems_of_files(dist: Path, version: str) -> Iterator[str]:
    """Yield what is wrong with the built files."""
    names = sorted(path.name for path in dist.iterdir())
    wheels = [name for name in names if name.endswith(".whl")]
    if f"pyllm_deep-{version}.tar.gz" not in names or len(wheels) != 1 or len(names) != 2:
        yield f"{dist} should hold one source archive and one wheel of version {version}, but has {', '.join(names)}."
    for name in wheels:
        if not re.fullmatch(rf"pyllm_deep-{re.escape(version)}-cp311-abi3-manylinux_\d+_\d+_x86_64\.whl", name):
            yield f"{name} is not named as a package index takes it: build it with `make dist`."
        with zipfile.ZipFile(dist / name) as file:
            if not set(file.namelist()) >= KERNELS:
                yield f"{name} lacks compiled kernels: build it on x86-64 with g++."


def main(arguments: list[str]) -> int:
    """Print every problem; the exit code."""
    if not 1 <= len(arguments) <= 2:
        sys.exit(__doc__)
    root = Path(__file__).resolve().parents[1]
    found = list(problems(root, arguments[0], Path(arguments[1]) if arguments[1:] else None))
    print(*found, sep="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
