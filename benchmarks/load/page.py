"""What the chat page costs a browser: bytes, first paint, and time to draw a streamed answer.

    pyllm serve &
    python benchmarks/load/page.py http://127.0.0.1:8000/

Needs the `playwright` package and Chromium. Answers are made in the page, in chunks of 7 characters, so only the page
is measured: Markdown, drawing and layout, with each chunk drawn before the next one comes.
"""

from __future__ import annotations

import os
import shutil
import sys

from playwright.sync_api import sync_playwright

CHUNKS = (777, 6977)
TEXT = (
    "Some *words* with `code` and [a link](https://example.com).\n\n- an item\n- another\n\n```python\nx = 1\n```\n\n"
)
PAINT = """() => [performance.getEntriesByName("first-contentful-paint")[0].startTime,
  performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize ?? 0), 0)]"""
STREAM = """async ([text, size]) => {
  const main = document.querySelector("script[type=module]").src;
  const { StreamingMarkdown } = await import(main.replace("main.js", "streaming.js"));
  const root = document.createElement("div");
  document.getElementById("log").replaceChildren(root);
  const markdown = new StreamingMarkdown(root);
  const begin = performance.now();
  const marks = [];
  for (let start = 0; start < text.length; start += size) {
    markdown.append(text.slice(start, start + size));
    markdown.draw();
    root.getBoundingClientRect();  // layout is a part of the cost
    marks.push(performance.now() - begin);
  }
  const quarter = marks.length >> 2;
  return [marks.at(-1), marks[quarter] / quarter, (marks.at(-1) - marks.at(-quarter)) / quarter];
}"""


def main(url: str) -> None:
    """Print the figures."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=found[0] if found else None, args=root)
        page = browser.new_page()
        for visit in ("first", "second"):
            page.goto(url)
            page.wait_for_selector("#model:enabled")
            paint, size = page.evaluate(PAINT)
            print(f"{visit} visit: first contentful paint after {paint:.0f} ms, {size / 1000:.0f} kB transferred")
        for chunks in CHUNKS:
            text = (TEXT * (7 * chunks // len(TEXT) + 1))[: 7 * chunks]
            total, early, late = page.evaluate(STREAM, [text, 7])
            print(
                f"{chunks} chunks: {total / 1000:.2f} s; a chunk takes {early:.2f} ms in the first quarter, "
                f"{late:.2f} ms in the last"
            )
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
