"""The pages at `/` and `/docs`, in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
pytestmark = pytest.mark.skipif(not BROWSERS, reason="there is no Chromium on this machine")
KEY = "open sesame"
LAYERS_OF_THE_DEMO = 6
expect = sync_api.expect
expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind a key."""
    with ServerProcess(tmp_path_factory.mktemp("guarded") / "log", "--api-key", KEY) as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_api.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=BROWSERS[0], args=root)
        yield browser
        browser.close()


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

    def ask(self, text: str) -> None:
        expect(self.page.get_by_label("Model", exact=True)).to_be_enabled()
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def answers(self) -> sync_api.Locator:
        return self.page.locator("article.assistant .body")

    def wait_for_the_end(self) -> None:
        expect(self.page.get_by_role("button", name="Regenerate")).to_be_visible()

    def use_key(self, key: str) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use this key").click()


@pytest.fixture
def visit(browser: sync_api.Browser, guarded: ServerProcess) -> Iterator[Visit]:
    """The demo's page; afterwards, nothing may have been asked of others, nor anything have gone wrong unseen."""
    context = browser.new_context()
    made = Visit(context.new_page(), guarded.url)
    yield made
    context.close()
    assert made.urls
    assert not [url for url in made.urls if not url.startswith((guarded.url, "data:"))]
    # A browser counts every answer of 400 and above as an error of the page.
    assert not [text for text in made.complaints if "status of 401" not in text]


@pytest.fixture
def signed_in(visit: Visit) -> Visit:
    visit.open().use_key(KEY)
    return visit


def test_page_asks_for_the_key_and_reports_a_wrong_one(visit: Visit) -> None:
    page = visit.open().page
    expect(page.get_by_role("alert")).to_have_text("This server wants an API key.")
    visit.use_key("wrong")
    expect(page.get_by_role("alert")).to_have_text("The server does not know this API key.")
    visit.use_key(KEY)
    expect(page.get_by_label("Model", exact=True)).to_have_value("pyllm-demo")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_label("API key")).to_be_hidden()


def test_a_talk_of_two_turns_is_streamed_regenerated_and_cleared(signed_in: Visit) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    signed_in.ask("How do I stream a response?")
    signed_in.wait_for_the_end()
    first = signed_in.answers().first.inner_text()
    assert "stream" in first
    signed_in.ask("What is 7+5?")
    signed_in.wait_for_the_end()
    expect(signed_in.answers()).to_have_count(2)
    assert re.search(r"\b12\b", signed_in.answers().last.inner_text())
    expect(page.locator("article.assistant").last).to_contain_text("tokens in")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Regenerate").click()
    body = json.loads(asked.value.post_data or "")
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert (body["temperature"], body["stream"]) == (0, True)
    signed_in.wait_for_the_end()
    expect(signed_in.answers()).to_have_count(2)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("article")).to_have_count(0)


def test_page_sends_settings_and_shows_refusals(signed_in: Visit) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Most tokens").fill("3")
    signed_in.ask("Hello!")
    signed_in.wait_for_the_end()
    expect(page.locator("article.assistant")).to_contain_text("Cut off at the token limit. 3 tokens")
    signed_in.complaints.clear()
    signed_in.page.on("console", lambda _: signed_in.complaints.clear())  # the 400 that is wanted here
    page.get_by_label("Temperature").fill("9")
    signed_in.ask("Hello!")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_what_the_model_did_is_shown_for_each_token(signed_in: Visit) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show what the model did").check()
    signed_in.ask("Hello!")
    signed_in.wait_for_the_end()
    tokens = page.locator(".token")
    tokens.first.click()
    expect(page.locator(".dynamics tbody tr")).to_have_count(LAYERS_OF_THE_DEMO)
    assert page.locator(".dynamics thead th").all_inner_texts() == ["Layer", "Expert", "Mu norm", "Velocity norm"]
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(tokens.first).to_have_attribute("aria-pressed", "false")


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_answer_here_and_at_the_server(
    browser: sync_api.Browser, server: ServerProcess, way: str
) -> None:
    def continue_later(route: sync_api.Route) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    before = server.wait_until_idle()
    with browser.new_context() as context:
        visit = Visit(context.new_page(), server.url).open()
        context.route("**/v1/chat/completions", continue_later)
        visit.ask("Continue.")
        wait_for(lambda: len(visit.answers().inner_text()) > 20, "the beginning of an answer")
        early = len(visit.answers().inner_text())
        wait_for(lambda: len(visit.answers().inner_text()) > early, "more of it")
        expect(visit.page.get_by_role("status")).to_have_text("The model is answering.")
        if way == "button":
            visit.page.get_by_role("button", name="Stop").click()
        else:
            visit.page.keyboard.press("Escape")
        expect(visit.page.locator("article.assistant")).to_contain_text("Stopped.")
        visit.wait_for_the_end()
        assert not visit.complaints
    after = server.wait_until_idle()
    assert after["request_success_total", "abort"] == before.get(("request_success_total", "abort"), 0) + 1


def test_text_of_a_model_is_text_whatever_it_says(signed_in: Visit) -> None:
    text = "<img src=x onerror=alert(1)> a `b` **c**\n```py\nprint('<b>')\n```\nend"
    chunk = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]})
    signed_in.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f": hi\n\ndata: {chunk}\n\ndata: [DONE]\n\n"
        ),
    )
    signed_in.ask("Hi")
    signed_in.wait_for_the_end()
    body = signed_in.answers()
    expect(body).to_contain_text("<img src=x onerror=alert(1)> a b c")
    expect(body.locator("pre code")).to_have_text("print('<b>')")
    expect(body.locator("strong")).to_have_text("c")
    assert body.locator("img, b").count() == 0


def test_page_reports_stream_errors_and_a_stopped_server(signed_in: Visit) -> None:
    page = signed_in.page
    error = json.dumps({"error": {"message": "The engine has stopped."}})
    answers = iter([
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {error}\n\ndata: [DONE]\n\n"),
        lambda route: route.abort(),
    ])  # fmt: skip
    page.route("**/v1/chat/completions", lambda route: next(answers)(route))
    signed_in.ask("Hi")
    expect(page.get_by_role("alert")).to_have_text("The engine has stopped.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    signed_in.complaints.clear()


def test_every_control_has_a_name_and_the_parts_have_their_roles(visit: Visit) -> None:
    page = visit.open().page
    page.get_by_role("button", name="Settings").click()
    named = "e => (e.labels?.length ? e.labels[0].textContent : e.ariaLabel ?? e.textContent).trim()"
    names = page.locator("button, input, textarea, select").evaluate_all(f"all => all.map({named})")
    assert len(names) >= 10
    assert all(names)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("heading", level=1).count() == page.get_by_role("main").count() == 1
    assert page.get_by_role("log", name="Conversation").count() == 1
    expect(page.get_by_role("button", name="Settings")).to_have_attribute("aria-expanded", "true")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.locator("html").get_attribute("data-theme") in ("light", "dark")


def test_the_page_works_under_a_proxys_path(browser: sync_api.Browser, guarded: ServerProcess) -> None:
    with browser.new_context() as context:
        visit = Visit(context.new_page(), "http://proxy.example/llm")
        context.route(
            "http://proxy.example/llm/**",
            lambda route: route.fulfill(
                response=route.fetch(url=route.request.url.replace("http://proxy.example/llm", guarded.url))
            ),
        )
        visit.open().use_key(KEY)
        visit.ask("Hello!")
        visit.wait_for_the_end()
        assert visit.answers().inner_text()
        visit.open("/docs")
        expect(visit.page.get_by_role("heading", name="PyLLM")).to_be_visible()
        assert not [url for url in visit.urls if not url.startswith((visit.home, "data:"))]


def test_api_reference_works_offline(visit: Visit) -> None:
    page = visit.open("/docs").page
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health"):
        expect(page.get_by_role("link", name=path, exact=True)).to_be_visible()
    page.get_by_role("link", name="/v1/chat/completions").click()
    expect(page.get_by_text("Example Value").first).to_be_visible()


def test_pages_allow_nothing_from_elsewhere_and_no_frames(guarded: ServerProcess) -> None:
    for path in ("/", "/docs"):
        headers = httpx.get(guarded.url + path).raise_for_status().headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert "unsafe-inline" not in httpx.get(guarded.url).headers["content-security-policy"]
