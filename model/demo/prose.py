"""The public-domain books that the demo model is trained on, read from the files of Debian's packages."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

AUSTEN = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
INSTALL = (
    "The prose is missing: run `apt-get update && apt-get install bible-kjv bible-kjv-text r-cran-janeaustenr` "
    "(or unpack the last with `apt-get download` and `dpkg -x` to do without R)."
)


def load_prose() -> list[str]:
    """Austen's six novels and the King James Bible as paragraphs joined to texts; raise SystemExit if not installed."""
    try:
        packed = AUSTEN.read_bytes()
        bible = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    except OSError:
        raise SystemExit(INSTALL) from None
    texts = []
    while packed:  # each entry: its length, then a zlib stream holding a serialised R vector of lines
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(packed[4:]))
        packed = stream.unused_data
        paragraphs = "\n".join(lines).split("\n\n")
        texts.append("\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip()))
    chapters: dict[str, list[str]] = {}
    for line in bible.splitlines():
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.split(":")[0], []).append(verse)
    return [*texts, *(" ".join(verses) for verses in chapters.values())]


def _r_strings(data: bytes) -> list[str]:
    """The strings of a serialised R character vector (XDR): after the header, each is flags, length, bytes."""
    at = data.index(b"UTF-8") + 5
    count = struct.unpack(">i", data[at + 4 : at + 8])[0]
    at += 8
    lines = []
    for _ in range(count):
        length = struct.unpack(">i", data[at + 4 : at + 8])[0]
        lines.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return lines


def common_words(texts: list[str], least: int = 12) -> list[str]:
    """Lower-case words of three to nine letters that occur at least `least` times, for spelling."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,9}\b", text))
    return sorted(word for word, count in counts.items() if count >= least)
