"""How the chat page shows Markdown, in a real browser: as elements, in pieces, and at the same cost at any length."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.chat_page import Visit, expect, pieces

MARKDOWN = """# One

A *b* **c** `d` [e](https://example.com "f") https://example.org [g](javascript:alert(1)) ![h](https://example.com/i.png)
<img src=x onerror=alert(1)> <script>alert(2)</script>

````md
```py
print('<b>')
```
````

| j | k |
|:-:|--:|
| 1 | 2 |

1. l
   - m
2. n

> o

Formula $a^2$, \\(b_1\\), costs $5 and $6.

$$
\\frac12 \\pmb{x} \\fcolorbox{red}{blue}{y}
$$

```python
def f(): return "x"  # y
```
end
"""


def without_parts(html: str) -> str:
    """What is shown, without the elements that only divide a streamed text for the browser's layout."""
    return re.sub(r">\s+<", "><", re.sub(r"</?div>", "", html)).strip()


def test_markdown_becomes_elements_and_html_stays_text(signed_in: Visit) -> None:
    page = signed_in.page
    requests = len(signed_in.urls)
    body = signed_in.answer(MARKDOWN)
    expect(body.get_by_role("heading", name="One")).to_be_visible()
    assert body.locator("p").first.locator("em, strong, code").all_inner_texts() == ["b", "c", "d"]
    links = body.locator("a").evaluate_all("all => all.map(a => [a.textContent, a.href, a.rel, a.target])")
    assert links == [
        [text, url, "noopener noreferrer", "_blank"]
        for text, url in (
            ("e", "https://example.com/"), ("https://example.org", "https://example.org/"),
            ("h", "https://example.com/i.png"),
        )
    ]  # fmt: skip
    expect(body).to_contain_text("<img src=x onerror=alert(1)> <script>alert(2)</script>")
    assert body.locator("img, script, b").count() == 0
    expect(body.locator("pre").first).to_have_text("```py\nprint('<b>')\n```\n")
    assert body.locator("td, th").all_inner_texts() == ["j", "k", "1", "2"]
    expect(body.locator("ol > li")).to_have_count(2)
    expect(body.locator("ol ul > li")).to_have_text("m")
    expect(body.locator("blockquote")).to_contain_text("o")
    expect(body.locator(".katex")).to_have_count(3)
    expect(body).to_contain_text("costs $5 and $6.")
    expect(body.locator(".hljs-keyword").first).to_have_text("def")
    assert not [url for url in signed_in.urls[requests:] if "/static/" not in url]
    whole = without_parts(body.inner_html())
    page.reload()
    page.locator("#conversations .title").click()
    expect(body.locator(".katex")).to_have_count(3)
    expect(body.locator(".hljs-keyword").first).to_be_visible()
    assert without_parts(body.inner_html()) == whole  # streamed in small pieces, or read at once


LONG_ANSWERS = {
    "paragraphs": "Some *words* and `code` here.\n\n" * 1700,
    "one paragraph": "Some *words* and `code` in one paragraph. " * 1250,
    "one list": "- an item with *words* and `code`\n" * 1500,
    "one table": "| a | b |\n|---|---|\n" + "| some *words* | and `code` |\n" * 1800,
    "one block of code": "```python\n" + "print('hello')  # a line\n" * 2100,
    "one quotation": "> a line with *words* and `code`\n" * 1550,
    "no blanks": "文" * 50_000,
    "one formula": "$$\n" + "x + y\n" * 8400,
}
UNSPLIT = ("one quotation", "one formula")  # parsed again each time they have grown by half, and shown raw meanwhile


MEASURE = """async ([text, size]) => {
  const root = document.createElement("div");
  document.getElementById("log").append(root);
  const main = document.querySelector("script[type=module]").src;
  const { StreamingMarkdown } = await import(main.replace("main.js", "streaming.js"));
  const markdown = new StreamingMarkdown(root);
  const costs = [];
  let mutations = 0;
  const observer = new MutationObserver(() => {});
  observer.observe(root, { childList: true, subtree: true, characterData: true });
  for (let start = 0; start < text.length; start += size) {
    const { charactersParsed, nodesTouched } = pyllmCounters;
    markdown.append(text.slice(start, start + size));
    markdown.draw();
    const records = observer.takeRecords();
    costs.push([pyllmCounters.charactersParsed - charactersParsed, pyllmCounters.nodesTouched - nodesTouched,
      records.reduce((sum, record) => sum + 1 + record.addedNodes.length + record.removedNodes.length, 0)]);
  }
  markdown.end(text);
  const shown = root.textContent.length;
  root.remove();
  return [costs, shown];
}"""
"""Costs of each chunk of a text: characters parsed, nodes by the page's own count, and changes that the browser saw."""


TRICKY = (
    "a\n#x\n\nb\n-\nc", "- a\n\n  b\n- c\n\n    code\n\n1. d\n2. e\n\n\nf", "a\n===\nb\n---\n| a |\n|---|\n| 1 |\nc",
    "```\na\n``\n````\nb", "~~~ py\n```\n~~~~\nc\n\n~~~", "> a\nb\n\n> c\n\n***\n",
    "[a]\n\n[a]: https://x.example\n\n[a]",
    "  ```js\n  a\n   b\n  ```\nc", "- ```\n  a\n  ```\n- b", "$$\na\n\nb$$\n\n$$c$$ d\n\n\\[\ne\n\\]\nf",
    "a\\\nb  \nc",
    "\n\n  \n", "```", "``", "a\r\nb\r\n\r\n```\r\nc\r\n```\r\n", "| a | b |\n|:-:|\n", "<div>\n\n*a*\n</div>",
    "\ta\n\tb\n\nc",
)  # fmt: skip
COMPARE = """async ([texts, sizes]) => {
  const main = document.querySelector("script[type=module]").src;
  const { StreamingMarkdown } = await import(main.replace("main.js", "streaming.js"));
  const { renderAll } = await import(main.replace("main.js", "markdown.js"));
  const html = (root) => root.innerHTML.replace(/<\\/?div>/g, "").replace(/\\s*\\n\\s*(?=<|$)/g, "");
  const different = [];
  for (const text of texts) for (const size of sizes) {
    const [streamed, whole] = [document.createElement("div"), document.createElement("div")];
    const markdown = new StreamingMarkdown(streamed);
    for (let start = 0; start < text.length; start += size) {
      markdown.append(text.slice(start, start + size));
      markdown.draw();
    }
    markdown.end(text);
    whole.append(renderAll(text));
    if (html(streamed) !== html(whole)) different.push([text, size, html(streamed), html(whole)]);
  }
  return different;
}"""


def test_a_text_in_pieces_becomes_what_it_is_as_a_whole(signed_in: Visit) -> None:
    assert signed_in.page.evaluate(COMPARE, [[*TRICKY, MARKDOWN.replace("$$", "")], [1, 2, 3, 7, 1000]]) == []


def test_a_chunk_costs_the_same_at_any_length(signed_in: Visit) -> None:
    for name, text in LONG_ANSWERS.items():
        assert len(text) >= 50_000, name
        costs, shown = signed_in.page.evaluate(MEASURE, [text, 200])
        assert shown > 0.6 * len(text), name
        quarter = len(costs) // 4
        for kind in range(3):
            early, late = ([cost[kind] for cost in part] for part in (costs[:quarter], costs[-quarter:]))
            assert sum(late) <= 1.5 * sum(early) + 5 * quarter, (name, kind)
            assert max(late) <= 1.5 * max(early) + 5 or name in UNSPLIT, (name, kind)


def test_a_chunk_of_a_long_talk_touches_only_its_message(signed_in: Visit, tmp_path: Path) -> None:
    page = signed_in.page
    messages = [
        {"id": n, "parent": n - 1 if n else None, "role": ("user", "assistant")[n % 2], "content": f"Text **{n}**"}
        for n in range(400)
    ]
    talk = {"format": "pyllm-conversations", "version": 1}
    talk |= {"conversations": [{"id": "a", "title": "Long talk", "leaf": 399, "messages": messages}]}
    (tmp_path / "talk.json").write_text(json.dumps(talk), encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(tmp_path / "talk.json")
    page.get_by_role("button", name="Long talk", exact=True).click()
    expect(page.locator("article strong")).to_have_count(200)  # of the answers
    signed_in.script(pieces("Some *words* and `code` here.\n\n" * 1700, 500), hold=True)
    signed_in.ask("Hi")
    expect(page.locator("article")).to_have_count(402)
    page.evaluate("""() => {
      window.touched = new Map();
      window.before = { ...pyllmCounters };
      new MutationObserver((records) => {
        for (const { target } of records) {
          const element = target.nodeType === 1 ? target : target.parentElement;
          const place = element?.closest("article")?.className ?? target.id;
          window.touched.set(place, (window.touched.get(place) ?? 0) + 1);
        }
      }).observe(document.body, { childList: true, subtree: true, characterData: true });
    }""")
    expect(signed_in.bodies().last.locator("p")).to_have_count(1700)
    touched, before, after = page.evaluate("[[...touched.keys()], before, pyllmCounters]")
    assert touched == ["assistant"]
    assert page.locator("article").last.evaluate("e => e.className") == "assistant"
    chunks = after["chunks"] - before["chunks"]
    assert after["frames"] - before["frames"] <= 2 * chunks + 2
    assert (after["charactersParsed"] - before["charactersParsed"]) <= 2000 * chunks
    signed_in.release()
