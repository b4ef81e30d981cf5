"""Take the screenshots of the chat page, from a running server.

    pyllm serve &
    python docs/images/chat_page.py docs/images

Needs the `playwright` package and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ANSWER = """Euclid's algorithm replaces the larger number by the **remainder** of a division until nothing remains:

```python
def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b  # the pair keeps its divisors
    return a
```

| step | $a$ | $b$ |
|-----:|----:|----:|
| 0 | 48 | 18 |
| 1 | 18 | 12 |
| 2 | 12 | 6 |
| 3 | 6 | 0 |

It takes $O(\\log \\min(a, b))$ divisions, because $a \\bmod b < \\frac{a}{2}$.
"""
STATS = {"prompt": 214, "completion": 187, "cached": 192, "reasoning": 0, "firstSeconds": 0.05, "seconds": 1.9}
TALKS = [("A recipe for bread", "Yes."), ("Ideas for a garden", "Yes."), ("How does Euclid's algorithm work?", ANSWER)]


def talks() -> str:
    """Some conversations, as the page exports them."""
    conversations = []
    for number, (question, answer) in enumerate(TALKS):
        messages = [
            {"id": 0, "parent": None, "role": "user", "content": question, "created": 1},
            {"id": 1, "parent": 0, "role": "assistant", "content": answer, "created": 2,
             "stats": STATS},
        ]  # fmt: skip
        conversations.append({"title": question, "leaf": 1, "messages": messages, "created": 1, "updated": number})
    return json.dumps({"format": "pyllm-conversations", "version": 1, "conversations": conversations})


def open_page(browser: Browser, url: str, width: int, height: int, scheme: str) -> Page:
    """A new visitor's page."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("#model:enabled")
    return page


def show_markdown(page: Page, file: Path) -> None:
    """Import the conversations and open the one with Markdown."""
    if page.get_by_role("button", name="Conversations").is_visible():
        page.get_by_role("button", name="Conversations").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(file)
    page.get_by_role("button", name=TALKS[-1][0], exact=True).click()
    page.wait_for_selector(".hljs-keyword")
    page.evaluate("document.fonts.ready.then(() => null)")
    page.evaluate("document.getElementById('notice').hidden = true")


def show_dynamics(page: Page) -> None:
    """Ask the model itself, and open the picture of what it did."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show what the model did").check()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close", exact=True).click()
    page.get_by_role("textbox", name="Message").fill("What is the capital of Italy?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    page.locator(".token").nth(1).click()
    page.locator("#scroller").evaluate("e => { e.scrollTop = 0; }")


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    given = parser.parse_args()
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_playwright() as library, tempfile.TemporaryDirectory() as folder:
        browser = library.chromium.launch(executable_path=found[0] if found else None, args=root)
        file = Path(folder, "talks.json")
        file.write_text(talks(), encoding="utf-8")
        for name, width, height, scheme in (("desktop", 1100, 800, "light"), ("phone", 390, 760, "dark")):
            page = open_page(browser, given.url, width, height, scheme)
            show_markdown(page, file)
            page.screenshot(path=given.folder / f"chat-page-{name}.png")
        page = open_page(browser, given.url, 1100, 960, "light")
        show_dynamics(page)
        page.screenshot(path=given.folder / "chat-page-dynamics.png")
        browser.close()


if __name__ == "__main__":
    main()
