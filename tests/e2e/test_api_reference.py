"""The API reference: its examples work as they are, at the server and in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess

BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model, with files and batches."""
    folder = tmp_path_factory.mktemp("reference")
    with ServerProcess(folder / "log", "--batch-dir", str(folder / "kept")) as process:
        yield process


def test_every_example_request_is_answered(serving: ServerProcess) -> None:
    with httpx.Client(base_url=serving.url, timeout=PATIENCE) as http:
        document = http.get("/openapi.json").json()
        posts = {path: item["post"] for path, item in document["paths"].items() if "post" in item}
        examples = [
            (path, kind, example["value"])
            for path, operation in posts.items()
            for kind, media in operation.get("requestBody", {"content": {}})["content"].items()
            for example in media["examples"].values()
        ]
        assert {path for path, _, _ in examples} == {path for path in posts if not path.endswith("/cancel")}
        uploaded = ""
        for path, kind, value in examples:
            if kind == "multipart/form-data":
                fields: Any = {name: (None, text) for name, text in value.items() if name != "file"}
                answer = http.post(path, files=fields | {"file": ("example.jsonl", value["file"])})
                uploaded = answer.json()["id"]
            else:
                answer = http.post(path, json=value | ({"input_file_id": uploaded} if "input_file_id" in value else {}))
            assert answer.status_code == 200, f"{path} {value}: {answer.text}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSERS:
        pytest.skip("there is no Chromium on this machine")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_api.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=BROWSERS[0], args=root)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, serving: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The reference; afterwards, nothing may have been asked of other hosts, nor complained about."""
    asked, complaints = [], []
    with browser.new_context(color_scheme=getattr(request, "param", "light")) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{serving.url}/docs")
        page.get_by_role("heading", name="PyLLM").wait_for()
        yield page
    assert not complaints
    assert not [url for url in asked if not url.startswith((serving.url, "data:"))]


def execute(page: Any, group: str, operation: str) -> str:
    """Try a route as it is offered, and return the status of its answer."""
    block = page.locator(f"[id='operations-{group.replace(' ', '_')}-{operation}']")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    status = block.locator(".live-responses-table tbody .response-col_status").first
    code = str(status.inner_text())
    block.locator(".opblock-summary-control").click()  # what is open is drawn again with each step
    return code


def test_a_route_of_each_group_works_as_it_is_offered(page: Any) -> None:
    tried = [
        ("Chat", "create_chat_completion"),
        ("Responses", "create_response"),
        ("Responses", "get_response"),  # the one that was just made
        ("Messages", "create_message"),
        ("Completions", "create_completion"),
        ("Embeddings", "create_embedding"),
        ("Tokens", "tokenize"),
        ("Models", "get_model"),
        ("Files and batches", "create_file"),
        ("Files and batches", "create_batch"),  # of this file
        ("Files and batches", "get_batch"),
        ("Server", "health"),
    ]
    assert {group for group, _ in tried} == set(page.locator(".opblock-tag > a").all_inner_texts())
    for group, operation in tried:
        assert execute(page, group, operation) == "200", operation


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_the_page_is_as_light_or_dark_as_the_system(page: Any, request: pytest.FixtureRequest) -> None:
    def brightness(property_: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('.opblock-tag')).{property_}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))

    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    is_dark = request.node.callspec.params["page"] == "dark"
    assert (brightness("color") > 384) == is_dark
    assert is_dark == (0 < sum(map(float, re.findall(r"[\d.]+", background)[:3])) < 384)
