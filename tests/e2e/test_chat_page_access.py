"""The chat page for everyone: assistive technology, small screens, dark colours, keyboards without a mouse, reloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.axe import VIOLATIONS
from support.chat_page import SCRIPTED, Visit, expect, piece, pieces, sync_api
from support.serving import ServerProcess

KEY = "open sesame"
SCREENS = {
    "desktop": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True},
}
ANSWER = (
    "# A\n\n| b | c |\n|---|---|\n| d | `e` |\n\n```python\nf = 1  # "
    + "long " * 50
    + "\n```\n\n$g^2$ [h](https://example.com)\n"
)
CALL = {"index": 0, "id": "x", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
DYNAMICS = {
    "token_id": 1, "token": "a", "input_token_id": 2, "experts": [0, 3], "rerouted": [False, True],
    "mu_norm": [1.0, 2.0], "velocity_norm": [1.0, 5.0],
}  # fmt: skip


@pytest.fixture(params=SCREENS)
def screen(
    request: pytest.FixtureRequest, browser: sync_api.Browser, guarded: ServerProcess, axe: Path
) -> Iterator[Visit]:
    """A visit with one of the screens, and axe in the page."""
    with browser.new_context(**SCREENS[request.param]) as context:
        context.add_init_script(SCRIPTED)
        context.add_init_script(path=axe)
        visit = Visit(context.new_page(), guarded.url).open()
        yield visit
        assert not [text for text in visit.complaints if "status of 401" not in text]


def check(visit: Visit) -> None:
    """Nothing serious is wrong for assistive technology, and nothing is wider than the screen."""
    assert visit.page.evaluate(VIOLATIONS) == []
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_every_part_is_accessible_and_fits_the_screen(screen: Visit) -> None:
    page = screen.page
    expect(page.get_by_role("dialog")).to_be_visible()
    check(screen)
    screen.use_key(KEY)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    check(screen)
    last = piece(finish="tool_calls")
    last["choices"][0]["dynamics"] = [DYNAMICS] * 30
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show what the model did").check()
    page.get_by_role("button", name="Add a tool").click()
    check(screen)
    page.keyboard.press("Escape")
    screen.script([piece(reasoning="r"), *pieces(ANSWER, 50)[:-1], piece(tool_calls=[CALL]), last])
    screen.ask("Hi")
    screen.wait_for_the_end()
    expect(page.locator(".katex")).to_be_visible()
    page.locator(".token").first.click()
    check(screen)
    menu = page.get_by_role("button", name="Conversations")
    if menu.is_visible():
        menu.click()
        expect(page.get_by_label("Search conversations")).to_be_focused()
        check(screen)
        page.keyboard.press("Escape")
        expect(menu).to_be_focused()
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, colour[4:-1].split(","))) < 64) == dark


def test_everything_can_be_done_with_the_keyboard(signed_in: Visit) -> None:
    page = signed_in.page
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    signed_in.script(pieces("First"))
    page.get_by_role("textbox", name="Message").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.user > .body")).to_have_text("one\ntwo")
    signed_in.wait_for_the_end()
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()

    def reach(name: str, role: str = "button", key: str = "Tab") -> None:
        target = page.get_by_role(role, name=name, exact=True).last  # type: ignore[arg-type]
        for _ in range(40):
            if target.evaluate("e => e === document.activeElement"):
                assert target.evaluate("e => getComputedStyle(e).outlineStyle") != "none"  # one sees where one is
                return
            page.keyboard.press(key)
        raise AssertionError(f"{name} is not reached with {key}")

    reach("Edit and send again", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Text of the message")).to_be_focused()
    page.keyboard.press("Escape")
    signed_in.script(pieces("Second"))
    reach("Regenerate")
    page.keyboard.press("Enter")
    expect(signed_in.bodies()).to_have_text("Second")
    signed_in.wait_for_the_end()
    reach("Version before", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(signed_in.bodies()).to_have_text("First")
    reach("Settings", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()


def test_controls_have_names_and_parts_have_roles(visit: Visit) -> None:
    page = visit.open().page
    expect(page.get_by_role("dialog")).to_be_visible()  # it asks for the key
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    named = "e => (e.labels?.length ? e.labels[0].textContent : e.ariaLabel ?? e.textContent).trim()"
    names = page.locator("button:visible, input:visible, textarea, select").evaluate_all(f"all => all.map({named})")
    assert len(names) >= 30
    assert all(names)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == page.locator("main").count() == page.locator("[role=log]").count() == 1
    page.get_by_label("Colours").select_option("dark")
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_a_reload_keeps_what_was_answered(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.script(pieces("word " * 100, 20), hold=True)
    signed_in.ask("Hi")
    expect(signed_in.bodies()).to_have_text("word " * 100)
    page.reload()
    page.locator("#conversations .title").click()
    expect(page.locator("article.assistant .note")).to_contain_text("Not complete: the page was closed")
    assert "word word" in signed_in.bodies().inner_text()
    expect(page.get_by_role("button", name="Continue this answer")).to_be_visible()


def test_two_tabs_share_their_conversations(signed_in: Visit) -> None:
    page = signed_in.page
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    other = Visit(page.context.new_page(), signed_in.home).open()
    other.answer("Yes", "From the other tab")
    page.get_by_role("button", name="From the other tab", exact=True).click()
    expect(signed_in.bodies()).to_have_text("Yes")
    other.answer("Again", "More")
    expect(signed_in.bodies()).to_have_text(["Yes", "Again"])
