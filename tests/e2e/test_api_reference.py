"""The API reference: its examples work as they are, at the server and in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.axe import VIOLATIONS
from support.serving import PATIENCE, ServerProcess

SCREENS = {
    "light": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True},
}


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


@pytest.fixture
def page(browser: Any, serving: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The reference; afterwards, nothing may have been asked of other hosts, nor complained about."""
    asked, complaints = [], []
    with browser.new_context(**SCREENS[getattr(request, "param", "light")]) as context:
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


@pytest.mark.parametrize("page", SCREENS, indirect=True)
def test_the_page_is_for_every_screen_and_for_keyboards(page: Any, axe: Path, request: pytest.FixtureRequest) -> None:
    def is_light(selector: str, property_: str) -> bool:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{property_}")
        return colour != "rgba(0, 0, 0, 0)" and sum(map(float, re.findall(r"[\d.]+", colour)[:3])) > 384

    is_dark = request.node.callspec.params["page"] == "dark"
    assert is_light(".opblock-tag", "color") == is_dark
    for group, operation in (("Chat", "create_chat_completion"), ("Files_and_batches", "create_file")):
        block = page.locator(f"#operations-{group}-{operation}")
        for button in ("POST /v1/", "Try it out", "Execute"):
            block.get_by_role("button", name=button).first.press("Enter")
        assert block.locator(".live-responses-table tbody .response-col_status").first.inner_text() == "200"
    page.evaluate(axe.read_text(encoding="utf-8"))
    assert page.evaluate(VIOLATIONS) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
