"""The frame of the chat page at `/`, in a real browser: key, settings, streams, conversations, and its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from support.chat_page import Visit, expect, pieces, sent_body, sync_api
from support.serving import ServerProcess, wait_for

KEY = "open sesame"
MAX_WIRE_BYTES = 900_000


def test_page_asks_for_the_key_and_remembers_it(visit: Visit) -> None:
    page = visit.open().page
    expect(page.locator("#key-problem")).to_have_text("This server needs an API key.")
    visit.use_key("clé")
    expect(page.locator("#key-problem")).to_contain_text("a character that a request cannot carry")
    visit.use_key("wrong")
    expect(page.locator("#key-problem")).to_have_text("The server does not accept this API key.")
    visit.use_key(KEY)
    expect(page.get_by_label("Model", exact=True)).to_have_value("pyllm-demo")
    expect(page.get_by_role("dialog")).to_have_count(0)
    other = page.context.new_page()
    other.goto(visit.home)
    expect(other.get_by_label("Model", exact=True)).to_have_value("pyllm-demo")


def test_a_key_is_forgotten_with_its_tab_if_asked(visit: Visit) -> None:
    visit.open().use_key(KEY, remember=False)
    expect(visit.page.get_by_label("Model", exact=True)).to_have_value("pyllm-demo")
    visit.page.reload()
    expect(visit.page.get_by_label("Model", exact=True)).to_have_value("pyllm-demo")
    other = visit.page.context.new_page()
    other.goto(visit.home)
    expect(other.get_by_label("API key of this server")).to_be_visible()


def test_a_talk_of_two_turns_is_streamed_and_kept(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.set(Temperature="0")
    signed_in.ask("How do I stream a response?")
    signed_in.wait_for_the_end()
    assert "stream" in signed_in.bodies().first.inner_text()
    with page.expect_request("**/v1/chat/completions") as asked:
        signed_in.ask("What is 7+5?")
    body = sent_body(asked.value)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert (body["temperature"], body["stream"]) == (0, True)
    expect(signed_in.bodies()).to_have_count(2)
    signed_in.wait_for_the_end()
    assert re.search(r"\b12\b", signed_in.bodies().last.inner_text())
    figures = page.locator("article.assistant").last.locator(".stats").inner_text()
    assert re.fullmatch(
        r"\d+ tokens? in [\d.]+ m?s( · [\d.]+ tokens/s)? · first token after [\d.]+ m?s "
        r"· prompt of \d+ tokens, \d+ cached",
        figures,
    )
    expect(page.locator("#context-text")).to_have_text(re.compile(r"^\d+ of 1,024 tokens$"))
    before = signed_in.bodies().all_inner_texts()
    page.reload()
    page.get_by_role("button", name="How do I stream a response?", exact=True).click()
    expect(signed_in.bodies()).to_have_count(2)
    assert signed_in.bodies().all_inner_texts() == before
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0")


def test_page_sends_settings_and_shows_refusals(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.set(System_prompt="Be brief.", Most_tokens="3")
    signed_in.ask("Hello!")
    signed_in.wait_for_the_end()
    expect(page.locator("article.assistant .note").first).to_have_text("Cut off at the token limit.")
    expect(page.locator("article.assistant .stats")).to_contain_text("3 tokens in")
    page.on("console", lambda _: signed_in.complaints.clear())  # the 400 that is wanted here
    signed_in.set(Temperature="9")
    signed_in.ask("Hello!")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_answer_here_and_at_the_server(
    browser: sync_api.Browser, server: ServerProcess, way: str
) -> None:
    before = server.wait_until_idle()
    with browser.new_context() as context:
        visit = Visit(context.new_page(), server.url).open()
        visit.set(More_fields='{"ignore_eos": true}')
        visit.ask("Continue.")
        wait_for(lambda: len(visit.bodies().inner_text()) > 20, "the beginning of an answer")
        early = len(visit.bodies().inner_text())
        wait_for(lambda: len(visit.bodies().inner_text()) > early, "more of it")
        expect(visit.page.locator("#status")).to_have_text("The model is answering.")
        if way == "button":
            visit.page.get_by_role("button", name="Stop").click()
        else:
            visit.page.keyboard.press("Escape")
        expect(visit.page.locator("article.assistant")).to_contain_text("Stopped.")
        visit.wait_for_the_end()
        assert not visit.complaints
    after = server.wait_until_idle()
    assert after["request_success_total", "abort"] == before.get(("request_success_total", "abort"), 0) + 1


def test_page_reports_stream_errors_and_a_stopped_server(signed_in: Visit) -> None:
    page = signed_in.page
    error = json.dumps({"error": {"message": "The engine has stopped."}})
    half = json.dumps({"choices": [{"delta": {"content": "Half of"}}]})
    answers = iter([
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {error}\n\ndata: [DONE]\n\n"),
        lambda route: route.abort(),
        lambda route: route.fulfill(content_type="text/event-stream", body=f": hi\n\ndata: {half}\n\n"),
    ])  # fmt: skip
    page.route("**/v1/chat/completions", lambda route: next(answers)(route))
    signed_in.ask("Hi")
    expect(page.get_by_role("alert")).to_contain_text("The engine has stopped.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The answer ended before it was complete.")
    expect(signed_in.bodies()).to_have_text("Half of")
    signed_in.complaints.clear()


def test_conversations_are_searched_renamed_and_deleted(signed_in: Visit) -> None:
    page = signed_in.page
    rows = page.locator("#conversations li")
    signed_in.answer("Rome", "What is the capital of Italy?")
    page.get_by_role("button", name="New conversation").click()
    signed_in.answer("A fish", "What is a pike?")
    expect(rows).to_have_count(2)
    page.get_by_label("Search conversations").fill("rome")  # it is in an answer, not in a title
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("Italy")
    page.get_by_label("Search conversations").fill("nothing like that")
    expect(page.get_by_text("No conversation matches.")).to_be_visible()
    page.get_by_label("Search conversations").fill("")
    rows.first.locator("summary").click()
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the conversation").fill("Fishes")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Fishes")
    rows.first.locator("summary").click()
    rows.first.get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(1)
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(2)
    page.reload()
    expect(rows.first).to_contain_text("Fishes")
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(rows).to_have_count(0)


def test_exported_conversations_are_imported_again(signed_in: Visit, tmp_path: Path) -> None:
    page = signed_in.page
    signed_in.answer("**Rome**", "What is the capital of Italy?", prompt_tokens=3, completion_tokens=2)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / "saved.json"
    saved.value.save_as(path)
    exported = json.loads(path.read_text(encoding="utf-8"))
    assert [message["content"] for message in exported["conversations"][0]["messages"]] == [
        "What is the capital of Italy?", "**Rome**",
    ]  # fmt: skip
    rows = page.locator("#conversations li")
    layer = {"token": "a", "experts": [1], "rerouted": [False], "mu_norm": [], "velocity_norm": []}
    for text, reason in [
        (path.read_text(encoding="utf-8"), ""),
        ("[", "The file is not JSON."),
        ("{}", "The file holds no exported conversations."),
        (json.dumps(exported | {"version": 2}), "The file has version 2; this page reads version 1."),
        (
            json.dumps(exported | {"conversations": [{"messages": [{"role": "root"}]}]}),
            "a message has no role or no text",
        ),
        *(
            (
                json.dumps(
                    {
                        **exported,
                        "conversations": [{"messages": [{"role": "user", "content": "", "dynamics": [token]}]}],
                    }
                ),
                "the dynamics of a token are incomplete",
            )
            for token in ({}, layer | {"routed_experts": [[]]}, layer | {"routed_experts": [[1], [2]]})
        ),
    ]:
        path.write_text(text, encoding="utf-8")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import").click()
        chooser.value.set_files(path)
        if reason:
            expect(page.get_by_role("alert")).to_contain_text(reason)
        expect(rows).to_have_count(2)
    rows.last.get_by_role("button", name="What is").click()
    expect(signed_in.bodies().locator("strong")).to_have_text("Rome")


def test_several_conversations_are_answered_at_once(signed_in: Visit) -> None:
    page = signed_in.page
    rows = page.locator("#conversations li")
    for name in ("first", "second"):
        page.get_by_role("button", name="New conversation").click()
        signed_in.script(pieces(f"The {name} answer"), hold=True)
        signed_in.ask(f"The {name} question")
        expect(signed_in.bodies()).to_have_text(f"The {name} answer")
    expect(rows.locator(".busy")).to_have_count(2)
    signed_in.release()
    expect(rows.locator(".busy")).to_have_count(0)
    rows.filter(has_text="first").locator(".title").click()
    expect(signed_in.bodies()).to_have_text("The first answer")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_copying_works_without_https(browser: sync_api.Browser, guarded: ServerProcess) -> None:
    with browser.new_context() as context:
        context.add_init_script(
            "Object.defineProperty(navigator, 'clipboard', { value: undefined })"
        )  # as on plain HTTP
        visit = Visit(context.new_page(), guarded.url).open()
        visit.use_key(KEY)
        visit.ask("Hello!")
        visit.wait_for_the_end()
        visit.page.get_by_role("button", name="Copy message").last.click()
        expect(visit.page.get_by_text("Copied")).to_be_visible()
        visit.page.get_by_role("textbox", name="Message").press("Control+V")
        expect(visit.page.get_by_role("textbox", name="Message")).to_have_value(visit.bodies().inner_text().strip())


def test_the_page_works_under_a_proxys_path(browser: sync_api.Browser, guarded: ServerProcess) -> None:
    with browser.new_context() as context:
        visit = Visit(context.new_page(), "http://proxy.example/llm")
        context.route(
            "http://proxy.example/llm/**",
            lambda route: route.fulfill(
                response=route.fetch(url=route.request.url.replace("http://proxy.example/llm", guarded.url))
            ),
        )
        try_pages(visit)


def test_the_page_works_with_a_root_path(browser: sync_api.Browser, tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "log", "--api-key", KEY, "--root-path", "/llm") as server,
        browser.new_context() as context,
    ):
        visit = Visit(context.new_page(), server.url)
        try_pages(visit)
        expect(visit.open("").page.get_by_role("textbox", name="Message")).to_be_visible()
        assert visit.page.url == f"{server.url}/"
        assert not [text for text in visit.complaints if "status of 401" not in text]


def try_pages(visit: Visit) -> None:
    """Chat, and open the API reference; all of it below the page's own address."""
    visit.open().use_key(KEY)
    visit.ask("Hello!")
    visit.wait_for_the_end()
    assert visit.bodies().inner_text()
    visit.open("/docs")
    expect(visit.page.get_by_role("heading", name="PyLLM")).to_be_visible()
    operation = visit.page.locator("[id='operations-health-health_health_get'], [data-path='/health']").first
    expect(operation).to_be_visible()
    assert not [url for url in visit.urls if not url.startswith((visit.home, "data:"))]


def test_api_reference_works_offline(visit: Visit) -> None:
    page = visit.open("/docs").page
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health"):
        expect(page.locator(f"[data-path='{path}']")).to_be_visible()
    page.locator("[data-path='/v1/chat/completions']").click()
    expect(page.get_by_text("Example Value").first).to_be_visible()


def test_pages_allow_nothing_from_elsewhere_and_no_frames(guarded: ServerProcess) -> None:
    for path in ("/", "/docs"):
        headers = httpx.get(guarded.url + path).raise_for_status().headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert "require-trusted-types-for 'script'" in httpx.get(guarded.url).headers["content-security-policy"]


def test_files_of_the_page_are_small_cached_and_typed(guarded: ServerProcess) -> None:
    folder = Path(__file__).resolve().parents[2] / "server" / "api" / "static"
    with httpx.Client(base_url=guarded.url) as client:
        page = client.get("/").raise_for_status()
        assert client.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
        root = re.search(r"static/[0-9a-f]{16}/", page.text)
        assert root
        types = {".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".woff2": "font/woff2"}
        files = [path for part in ("chat", "vendor") for path in (folder / part).rglob("*") if path.suffix in types]
        total = len(page.content)
        for path in files:
            url = f"/{root[0]}{path.relative_to(folder).as_posix()}"
            with client.stream("GET", url) as answer:
                sent = b"".join(answer.iter_raw())
            assert answer.headers["content-type"].split(";")[0] == types[path.suffix]
            assert "immutable" in answer.headers["cache-control"]
            assert int(answer.headers["content-length"]) == len(sent)
            total += len(sent)
        assert len(files) > 40
        assert total <= MAX_WIRE_BYTES
        assert client.get(url, headers={"accept-encoding": "gzip;q=0"}).content == path.read_bytes()
        key = {"authorization": f"Bearer {KEY}"}
        for wrong in (
            "chat/none.js",
            "chat/../../pages.py",
            "chat/%2e%2e/%2e%2e/pages.py",
            "vendor/libraries.json",
            "",
        ):
            assert client.get(f"/{root[0]}{wrong}", headers=key).status_code == 404
        assert client.get("/static/0000000000000000/chat/main.js", headers=key).status_code == 404
