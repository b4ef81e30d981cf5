"""The chat page in a real browser: a visit with all that it asked for, and answers made of given pieces."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.components import COMPONENTS, missing
from support.serving import PATIENCE

if importlib.util.find_spec("playwright") is None:
    missing("playwright is not installed")
sync_api = importlib.import_module("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=PATIENCE * 1000)

SCRIPTED = """
window.scripted = [];
const realFetch = window.fetch;
window.fetch = async (url, options) => {
  if (!url.endsWith("chat/completions") || !window.scripted.length) return realFetch(url, options);
  const { events, hold } = window.scripted.shift();
  window.asked = JSON.parse(options.body);
  const text = (event) => (typeof event === "string" ? event : JSON.stringify(event));
  const encode = (event) => new TextEncoder().encode(`data: ${text(event)}\\n\\n`);
  const body = new ReadableStream({ async start(controller) {
    options.signal.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")));
    for (const event of [...events, "[DONE]"]) {
      await new Promise(requestAnimationFrame);
      while (event === "[DONE]" && hold && window.holding !== false) await new Promise(requestAnimationFrame);
      if (options.signal.aborted) return;
      controller.enqueue(encode(event));
    }
    controller.close();
  } });
  return new Response(body, { headers: { "content-type": "text/event-stream" } });
};
"""
"""The network's side of a stream: one event a frame, so that each is drawn; all of the page's own code runs."""


@contextmanager
def open_browser() -> Iterator[sync_api.Browser]:
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_api.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=COMPONENTS["Chromium"].find(), args=root)
        yield browser
        browser.close()


def piece(finish: str | None = None, usage: dict[str, Any] | None = None, **delta: Any) -> dict[str, Any]:
    """One chunk of a stream."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": usage}


def pieces(text: str, size: int = 5) -> list[dict[str, Any]]:
    """A text as chunks of `size` characters."""
    parts = [piece(content=text[start : start + size]) for start in range(0, len(text), size)]
    return [*parts, piece(finish="stop")]


class Visit:
    """A tab, and what it asked for and complained about."""

    def __init__(self, page: sync_api.Page, home: str) -> None:
        self.page = page
        self.home = home
        self.urls: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(PATIENCE * 1000)

    def open(self, path: str = "/") -> Visit:
        self.page.goto(self.home + path)
        return self

    def use_key(self, key: str, *, remember: bool = True) -> None:
        self.page.get_by_label("API key of this server").fill(key)
        self.page.get_by_label("Remember it").set_checked(remember)
        self.page.get_by_role("button", name="Use this key").click()

    def script(self, events: list[Any], *, hold: bool = False) -> None:
        """Answer the next question with these events; `hold` keeps it open until `release`."""
        self.page.evaluate(
            "entry => { window.holding = true; window.scripted.push(entry); }", {"events": events, "hold": hold}
        )

    def release(self) -> None:
        self.page.evaluate("window.holding = false")

    def wait_for_model(self) -> None:
        expect(self.page.get_by_label("Model", exact=True)).to_be_enabled()

    def ask(self, text: str) -> None:
        self.wait_for_model()
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, text: str, question: str = "Hi", *, size: int = 5, **usage: Any) -> sync_api.Locator:
        """Ask, and get this text as the answer; its body."""
        events = pieces(text, size)
        if usage:
            events.append({"choices": [], "usage": usage})
        self.script(events)
        self.ask(question)
        self.wait_for_the_end()
        return self.bodies().last

    def asked(self) -> dict[str, Any]:
        """The body of the last request that was scripted."""
        asked: dict[str, Any] = self.page.evaluate("window.asked")
        return asked

    def bodies(self) -> sync_api.Locator:
        return self.page.locator("article.assistant > .body")

    def wait_for_the_end(self) -> None:
        expect(self.page.locator("article.assistant").last.get_by_role("button", name="Regenerate")).to_be_visible()

    def set(self, **fields: str) -> None:
        """Fill fields of the settings by their labels, with _ for a blank."""
        self.page.get_by_role("button", name="Settings").click()
        for label, value in fields.items():
            self.page.get_by_label(label.replace("_", " ")).fill(value)
        self.page.get_by_role("button", name="Close", exact=True).click()

    def roles_sent(self) -> list[str]:
        return [message["role"] for message in self.asked()["messages"]]


def sent_body(request: sync_api.Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.post_data or "")
    return body
