"""The rules of the house that no other linter knows: sizes of folders, files and functions, and plain words.

python .ci/house.py            # every broken rule, one a line; exit code 1 if there is one
python .ci/house.py PATH ...   # only in files whose path begins so
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULES, MAX_TOP_MODULES = 14, 8
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TEST_NAME = 400, 50, 60
LONG = re.compile(r"# long: \S")
"""How a function, in its first line or the one above, or a file, in its first 12 lines, says why it is long."""

PRODUCT = ("server/", "engine/", "model/")
UNCHECKED = re.compile(
    r"LICENSE|.*\.(lock|safetensors|svg|png|jsonl?)|\.ci/house\.py|model/demo/(README\.md|(corpus|copied|tables|(help_)?wordings)\.py)"
    r"|server/api/static/vendor/.*"
)
"""Texts that are data, and this list itself."""

PHRASES = {
    r"in vain": "say what has no effect",
    r"who(so)?ever": "name the thing: the request, the client, the caller",
    r"(no|some|every)body": "name the thing: no request, another client",
    r"hang(s|ing)? on": "depends on",
    r"com(es?|ing) on": "continues, progresses",
    r"by a fault of": "because of an error in",
    r"tak(es?|ing) along": "carries",
    r"(is|are) gone back": "returns",
    r"told": "reported, configured, distinguished",
    r"of which": "two sentences",
    r"beside": "next to, with, in addition to",
    r"anew": "again, from scratch",
    r"at rest": "idle",
    r"that which": "what",
    r"stands? (there|here|in|beside|behind|before)": "is",
    r"(go|goes|going|went) on": "continues",
    r"(give|gives|giving|gave|given) back": "returns, releases",
    r"(take|takes|taking|took|taken) back": "undoes, reclaims",
    r"(let|lets|letting) go of": "releases",
    r"look(s|ed)? around": "sweep, scan",
    r"mend(s|ed|ing)?": "fix",
    r"of so many": "of this length, N",
    r"is of (no|this|its)": "belongs to",
    r"says nothing of": "does not reveal",
    r"from (its|the) (start|beginning) on": "from the start",
    r"thereof|therein|whereof|wherein|hereby|henceforth": "a plainer word",
    r"of (its|their|his) own accord": "by itself",
    r"what (there is|is there) of": "the available part",
    r"is (taken|mistaken) for": "is treated as",
    r"lest": "so that ... not",
    r"makes? room": "evicts, frees",
    r"in (his|her) (turn|place)": "the thing's",
}
"""Phrases that a colleague would not say aloud, and what to say instead."""
_PHRASES = [
    (re.compile(rf"(?<![a-z]){text.replace(' ', '[ _]')}(?![a-z])", re.IGNORECASE), text, better)
    for text, better in PHRASES.items()
]


def tracked() -> list[str]:
    """Every file that git knows, but links."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def check_folders(names: list[str]) -> Iterator[str]:
    """Folders with too many modules; `__init__.py` does not count."""
    modules = [Path(name) for name in names if name.startswith(PRODUCT) and name.endswith(".py")]
    counts = Counter(path.parent.as_posix() for path in modules if path.name != "__init__.py")
    for folder, count in sorted(counts.items()):
        limit = MAX_TOP_MODULES if folder in ("server", "engine") else MAX_MODULES
        if count > limit:
            yield f"{folder}: {count} modules, at most {limit}"


def check_sizes(name: str, text: str) -> Iterator[str]:
    """Files and functions that are too long without a reason, and test names."""
    lines = text.split("\n")
    if len(lines) - 1 > MAX_FILE_LINES and not any(LONG.search(line) for line in lines[:12]):
        yield f"{name}: {len(lines) - 1} lines, at most {MAX_FILE_LINES}"
    if not name.endswith(".py"):
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        near = lines[max(0, node.lineno - 2) : node.body[0].lineno]
        if name.startswith(PRODUCT) and length > MAX_FUNCTION_LINES and not any(map(LONG.search, near)):
            yield f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        if node.name.startswith("test_") and len(node.name) > MAX_TEST_NAME:
            yield f"{name}:{node.lineno}: {node.name} has {len(node.name)} characters, at most {MAX_TEST_NAME}"


def check_words(name: str, text: str) -> Iterator[str]:
    """Phrases of the list."""
    for number, line in enumerate(text.split("\n"), 1):
        for pattern, phrase, better in _PHRASES:
            if pattern.search(line):
                yield f"{name}:{number}: {phrase!r} (better: {better}): {line.strip()[:110]}"


def main(chosen: tuple[str, ...]) -> int:
    """Print every broken rule; the exit code."""
    names = tracked()
    found = [] if chosen else list(check_folders(names))
    for name in names:
        if UNCHECKED.fullmatch(name) or (chosen and not name.startswith(chosen)):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith((".py", ".cpp", ".h", ".js", ".css")) and name.startswith((*PRODUCT, "tests/", "benchmarks/")):
            found += check_sizes(name, text)
        found += check_words(name, text)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
