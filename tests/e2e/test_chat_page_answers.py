"""What the chat page makes of answers, in a real browser: branches, tools, files, figures, dynamics."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import httpx
import pytest
from support.chat_page import Visit, expect, piece, pieces, sent_body
from support.serving import PATIENCE

KEY = "open sesame"
LAYERS_OF_THE_DEMO = 6


def test_a_message_is_edited_regenerated_and_deleted(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.answer("First answer", "First question")
    signed_in.script(pieces("Second answer"))
    page.get_by_role("button", name="Regenerate").click()
    expect(signed_in.bodies()).to_have_text("Second answer")
    expect(page.get_by_text("2/2")).to_be_visible()
    page.get_by_role("button", name="Version before").click()
    expect(signed_in.bodies()).to_have_text("First answer")
    signed_in.script(pieces("Third answer"))
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_label("Text of the message").fill("Other question")
    page.get_by_role("button", name="Send").first.click()
    expect(signed_in.bodies()).to_have_text("Third answer")
    assert signed_in.asked()["messages"] == [{"role": "user", "content": "Other question"}]
    expect(page.locator("article.user > .body")).to_have_text("Other question")
    page.get_by_role("button", name="Version before").click()
    expect(page.locator("article.user > .body")).to_have_text("First question")
    page.get_by_role("button", name="Edit this answer").click()
    page.get_by_label("Text of the message").fill("Better **answer**")
    page.get_by_role("button", name="Save").click()
    expect(signed_in.bodies().locator("strong")).to_have_text("answer")
    expect(page.get_by_text("Edited.")).to_be_visible()
    page.get_by_role("button", name="Raw text").click()
    expect(signed_in.bodies()).to_have_text("Better **answer**")
    page.get_by_role("button", name="Raw text").click()
    signed_in.answer("Last", "More")
    assert [message["content"] for message in signed_in.asked()["messages"]][1] in (
        "Better **answer**",
        "Second answer",
    )
    page.get_by_role("button", name="Delete message").nth(1).click()
    expect(page.locator("article")).to_have_count(3)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(4)
    page.reload()
    page.locator("#conversations .title").click()
    expect(page.locator("article")).to_have_count(4)


def test_an_answer_that_was_cut_is_continued(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.script([piece(content="The beginning"), piece(finish="length")])
    signed_in.ask("Hi")
    expect(page.locator("article .note")).to_have_text("Cut off at the token limit.")
    signed_in.script(pieces(" and the end"))
    page.get_by_role("button", name="Continue this answer").click()
    expect(signed_in.bodies()).to_have_text("The beginning and the end")
    asked = signed_in.asked()
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    assert asked["messages"][-1] == {"role": "assistant", "content": "The beginning"}


def test_the_oldest_turns_are_left_out_of_a_full_context(signed_in: Visit) -> None:
    page = signed_in.page
    signed_in.set(System_prompt="Be brief.", Most_tokens="20")
    for _ in range(3):
        signed_in.answer("word " * 300, "word " * 50, size=500)
    with page.expect_request("**/v1/chat/completions") as asked:
        signed_in.ask("What is 7+5?")
    signed_in.wait_for_the_end()
    messages = sent_body(asked.value)["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["role"] == "user"
    assert messages[-1]["content"] == "What is 7+5?"
    assert len(messages) < 8
    left_out = 8 - len(messages)
    expect(page.locator("article").last).to_contain_text(f"the oldest {left_out} messages were left out of the prompt")
    page.on("console", lambda _: signed_in.complaints.clear())  # the 400 that is wanted here
    signed_in.ask("word " * 2000)
    expect(page.get_by_role("alert")).to_contain_text("The last message alone is too long")


def test_all_settings_are_sent_and_wrong_ones_named(signed_in: Visit) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    numbers = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "seed": 7, "max_tokens": 9, "min_tokens": 2,
    }  # fmt: skip
    for name, value in numbers.items():
        page.locator(f"#setting-{name}").fill(str(value))
    lines = {"stop": ["END", "a\nb"], "bad_words": ["one", "two"]}
    page.locator("#setting-stop").fill("END\na\\nb")
    page.locator("#setting-bad_words").fill("one\ntwo")
    page.locator("#setting-stop_token_ids").fill("1, 2")
    page.locator("#setting-logit_bias").fill('{"42": -1}')
    page.locator("#setting-extra").fill('{"priority": 3')
    expect(page.locator(".wrong").filter(has_text="More fields")).to_contain_text("is not valid JSON")
    page.get_by_label("The answer is").select_option("json_schema")
    page.get_by_label("Schema, expression").fill('{"type": "integer"}')
    page.keyboard.press("Escape")
    signed_in.ask("Hi")
    expect(page.get_by_role("alert")).to_contain_text("More fields of the request is not valid JSON")
    signed_in.set(More_fields='{"priority": 3}')
    signed_in.script(pieces("5"))
    page.get_by_role("button", name="Try again").click()
    expect(signed_in.bodies()).to_have_text("5")
    asked = signed_in.asked()
    schema = {"name": "answer", "schema": {"type": "integer"}, "strict": True}
    expected = {"stop_token_ids": [1, 2], "logit_bias": {"42": -1}, "priority": 3}
    expected |= {"response_format": {"type": "json_schema", "json_schema": schema}}
    assert {name: asked.get(name) for name in numbers | lines | expected} == numbers | lines | expected
    signed_in.ask("Again")  # the real server accepts all of it
    signed_in.wait_for_the_end()
    assert int(signed_in.bodies().last.inner_text()) is not None


def test_calls_are_shown_and_answered(signed_in: Visit) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Add a tool").click()
    page.get_by_label("Name of the function").fill("weather")
    page.get_by_label("The model calls").select_option("required")
    page.get_by_label("One call at most").check()
    page.get_by_role("button", name="Close", exact=True).click()
    with page.expect_request("**/v1/chat/completions") as asked:
        signed_in.ask("How is the weather in Oslo?")
    body = sent_body(asked.value)
    assert (body["tools"][0]["function"]["name"], body["tool_choice"]) == ("weather", "required")
    call = page.locator(".call")
    expect(call).to_contain_text("Call of weather")
    expect(call.locator("pre")).to_contain_text('"city"')
    call.get_by_label("What weather returns").fill("sunny, 20 degrees")
    signed_in.script(pieces("It is sunny."))
    page.get_by_role("button", name="Send the result").click()
    expect(signed_in.bodies().last).to_have_text("It is sunny.")
    _, answer, result = signed_in.asked()["messages"]
    assert answer["tool_calls"][0]["function"]["name"] == "weather"
    assert result == {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "sunny, 20 degrees"}
    expect(call.get_by_label("What weather returns")).to_have_count(0)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_folded(signed_in: Visit, field: str) -> None:
    signed_in.script(
        [piece(**{field: "Hmm, **"}), piece(**{field: "well**"}), piece(content="Yes"), piece(finish="stop")]
    )
    signed_in.ask("Really?")
    signed_in.wait_for_the_end()
    reasoning = signed_in.page.locator("details.reasoning")
    expect(reasoning.locator("strong")).to_be_hidden()
    reasoning.locator("summary").click()
    expect(reasoning.locator("strong")).to_have_text("well")
    expect(signed_in.bodies()).to_have_text("Yes")


def test_text_files_are_attached_within_bounds(signed_in: Visit, tmp_path: Path) -> None:
    page = signed_in.page
    files = {
        "a.csv": b"x,y\n1,2\n",
        "b.md": b"````\ncode\n````\n",
        "c.png": b"\x89PNG\r\n\0",
        "d.txt": b"z" * (2**20 + 1),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach text files").click()
    chooser.value.set_files([tmp_path / name for name in files])
    expect(page.get_by_role("alert")).to_contain_text(
        "c.png is not a text in UTF-8. d.txt has 1.0 MiB; the limit is 1 MiB."
    )
    assert page.locator("#files li").count() == 2
    signed_in.answer("Yes", "Do you see them?")
    (message,) = signed_in.asked()["messages"]
    assert message["content"] == (
        "File a.csv:\n```\nx,y\n1,2\n\n```\n\nFile b.md:\n`````\n````\ncode\n````\n\n`````\n\nDo you see them?"
    )
    expect(page.locator(".file")).to_have_count(2)


def test_what_the_model_did_is_drawn_and_exported(signed_in: Visit, tmp_path: Path) -> None:
    page = signed_in.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show what the model did").check()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close", exact=True).click()
    with page.expect_request("**/v1/chat/completions") as asked:
        signed_in.ask("Hello!")
    signed_in.wait_for_the_end()
    body = sent_body(asked.value) | {"stream": False, "stream_options": None}
    again = httpx.post(asked.value.url, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE)
    entries = again.raise_for_status().json()["choices"][0]["dynamics"]
    tokens = page.locator(".token")
    assert tokens.all_inner_texts() == [entry["token"] for entry in entries]
    assert entries[-1]["token"] not in signed_in.bodies().inner_text()  # a special token is shown only here
    picture = page.get_by_role("img", name="Experts of")
    experts = {expert for entry in entries for expert in entry["experts"]}
    assert picture.locator("path[data-expert]").count() == len(experts)
    assert picture.locator("polyline").count() == 2 * LAYERS_OF_THE_DEMO
    tokens.first.click()
    expect(page.locator(".token-table tbody tr")).to_have_count(LAYERS_OF_THE_DEMO)
    assert page.locator(".token-table thead th").all_inner_texts() == ["Layer", "Expert", "Mu norm", "Velocity norm"]
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(tokens.first).to_have_attribute("aria-pressed", "false")
    saved = {}
    for kind in ("SVG", "CSV"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export as {kind}").click()
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text(encoding="utf-8")
    assert saved["SVG"].startswith("<svg xmlns")
    rows = list(csv.DictReader(io.StringIO(saved["CSV"])))
    assert len(rows) == len(entries) * LAYERS_OF_THE_DEMO
    assert [row["expert"] for row in rows[:LAYERS_OF_THE_DEMO]] == [str(expert) for expert in entries[0]["experts"]]


def test_rerouted_tokens_are_marked(signed_in: Visit) -> None:
    entry = {
        "token_id": 1, "token": "a,\"b", "input_token_id": 2, "experts": [0, 3], "rerouted": [False, True],
        "mu_norm": [1.0, 2.0], "velocity_norm": [0.0, 5.0],
    }  # fmt: skip
    chunk = piece(content="ab")
    chunk["choices"][0]["dynamics"] = [entry, entry | {"rerouted": [False, False], "token": "</s>"}]
    signed_in.page.get_by_role("button", name="Settings").click()
    signed_in.page.get_by_label("Show what the model did").check()
    signed_in.page.keyboard.press("Escape")
    signed_in.script([chunk, piece(finish="stop")])
    signed_in.ask("Hi")
    signed_in.wait_for_the_end()
    expect(signed_in.page.locator("path.rerouted")).to_have_count(1)
    expect(signed_in.page.locator(".token.rerouted")).to_have_text('a,"b')
    expect(signed_in.page.locator(".token").last).to_have_text("</s>")
    expect(signed_in.bodies()).to_have_text("ab")


def test_several_experts_of_a_layer_are_shown_with_their_weights(signed_in: Visit, tmp_path: Path) -> None:
    """As of the TR-Hash line, which has no mu and no velocity."""
    entry = {
        "token_id": 1, "token": "a", "input_token_id": 2, "experts": [2, 0], "rerouted": [False, False],
        "mu_norm": [], "velocity_norm": [], "routed_experts": [[2, 5], [0, 2]],
        "expert_weights": [[0.75, 0.25], [0.5, 0.5]],
    }  # fmt: skip
    chunk, page = piece(content="a"), signed_in.page
    chunk["choices"][0]["dynamics"] = [entry]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show what the model did").check()
    page.keyboard.press("Escape")
    signed_in.script([chunk, piece(finish="stop")])
    signed_in.ask("Hi")
    signed_in.wait_for_the_end()
    expect(page.get_by_role("img", name="Experts of 1 tokens in 2 layers", exact=True)).to_be_visible()
    expect(page.locator("path[data-expert]")).to_have_count(3)
    expect(page.locator("polyline")).to_have_count(0)
    page.locator(".token").click()
    assert page.locator(".token-table thead th").all_inner_texts() == ["Layer", "Experts and their weights"]
    assert page.locator(".token-table tbody td").all_inner_texts() == ["2: 0.75, 5: 0.25", "0: 0.50, 2: 0.50"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as CSV").click()
    download.value.save_as(tmp_path / "csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text(encoding="utf-8"))))
    assert [(row["experts"], row["weights"]) for row in rows] == [("2 5", "0.75 0.25"), ("0 2", "0.5 0.5")]
