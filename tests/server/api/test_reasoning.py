"""Reasoning and marked calls as the clients of each API know them, whole and streamed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from anthropic.types import Message as AnthropicMessage
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from pyllm.model.tokenizer import Tokenizer
from pyllm.server.api.chat import ChatCompletion, ChatCompletionChunk
from pyllm.server.chat.reasoning import find_marks
from pyllm.server.chat.served_model import find_format
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.flags import ConfigError

MARKS = ("think_start", "think_end", "final_start", "final_end", "tool_call_start", "tool_call_end")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.reasoning or '' }}{{ m.tool_calls and 'CALLED' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
TAGGED = "<think>\nwell é\n</think>\n<final>\nYes.\n</final>"
MARKED = "<|think_start|>well é<|think_end|><|final_start|>Yes.<|final_end|>"
CALLS = '<|think_start|>hm<|think_end|><|tool_call_start|>[{"name": "f", "arguments": {"x": 1}}, ' + (
    '{"type": "function", "function": {"name": "f", "arguments": {}}}]<|tool_call_end|>'
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


def with_marks(harness: Any, template: str = TEMPLATE, reply: str = MARKED) -> Any:
    """Give the model special tokens for its sections."""
    harness.tokenizer._library.add_special_tokens([f"<|{name}|>" for name in MARKS])
    tokenizer = Tokenizer(harness.tokenizer._library, names={"eos_token": "</s>"})
    return with_tokenizer(harness, tokenizer, template, reply)


def with_tokenizer(harness: Any, tokenizer: Tokenizer, template: str, reply: str) -> Any:
    engine = harness.engine
    engine.configure(max_model_len=4000, num_kv_blocks=1000)
    engine.info = msgspec.structs.replace(engine.info, vocab_size=tokenizer.vocab_size)
    engine.tokenizer = engine.processor._tokenizer = tokenizer
    tokenizer.encode = tokenizer.encode_prompt  # type: ignore[method-assign]  # of the scripted reply
    engine.reply = reply
    chat = ChatTemplate(tokenizer, template)
    harness.service.model = dataclasses.replace(
        harness.model, tokenizer=tokenizer, template=chat,
        marks=find_marks("auto", tokenizer, template, "TR-Hash native"),
        tool_format=find_format("auto", chat, tokenizer),
    )  # fmt: skip
    return harness


def with_tags(harness: Any, template: str = TEMPLATE, reply: str = TAGGED) -> Any:
    return with_tokenizer(harness, harness.tokenizer, template, reply)


FORMS = [with_tags, with_marks]
each_form = pytest.mark.parametrize("form", FORMS)


def events_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def chat(harness: Any, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message of a whole answer, which must be that of the streamed one, with its finish reason; and the usage."""
    answer = harness.chat(**fields)
    assert answer.status_code == 200, answer.text
    whole = ChatCompletion.model_validate_json(answer.content).model_dump(exclude_none=True)
    streamed: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    options = {"stream_options": {"include_usage": True}}
    for event in events_of(harness.chat(stream=True, **options, **fields)):
        chunk = ChatCompletionChunk.model_validate(event)
        usage = event["usage"]
        for choice in chunk.choices:
            for name, value in choice.delta.model_dump(exclude_none=True).items():
                if name == "tool_calls":
                    calls += value
                else:
                    streamed[name] = streamed.get(name, "") + value
            streamed["finish_reason"] = choice.finish_reason
    message = answer.json()["choices"][0]["message"] | {"finish_reason": whole["choices"][0]["finish_reason"]}
    wanted = {name: value for name, value in message.items() if name not in ("refusal", "tool_calls")}
    assert {"content": None} | {k: v or None for k, v in streamed.items()} == {k: v or None for k, v in wanted.items()}
    assert [c["function"] for c in calls] == [c["function"] for c in message.get("tool_calls", ())]
    assert usage["completion_tokens_details"] == answer.json()["usage"]["completion_tokens_details"]
    return message, answer.json()["usage"]


def prompt_of(harness: Any) -> str:
    return harness.service.model.tokenizer.decode(harness.engine.requests[-1][1], skip_special_tokens=False)


@each_form
def test_chat_shows_reasoning_apart_from_the_answer(harness, form) -> None:
    form(harness)
    message, usage = chat(harness)
    assert message["content"] == "Yes."
    assert message["reasoning_content"] == message["reasoning"] == "well é"
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    hidden, _ = chat(harness, include_reasoning=False)
    assert "reasoning" not in hidden
    assert hidden["content"] == "Yes."
    assert "reasoning" not in chat(harness, reasoning={"exclude": True})[0]


@each_form
def test_the_prompt_may_begin_the_reasoning(harness, form) -> None:
    start = "<think>\n" if form is with_tags else "<|think_start|>"
    form(harness, TEMPLATE.replace("assistant:{%", f"assistant:{start}{{%"))
    harness.engine.reply = harness.engine.reply.removeprefix(start)
    assert chat(harness)[0]["reasoning"] == "well é"


@each_form
def test_reasoning_can_be_switched(harness, form) -> None:
    form(harness)
    start, empty = ("<think>\n", "<think>\n\n</think>\n")
    if form is with_marks:
        start, empty = "<|think_start|>", "<|think_start|><|think_end|>"
    on = [{"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "low"}, {"enable_thinking": True},
          {"thinking": {"type": "enabled"}}, {"reasoning": {"effort": "high"}},
          {"chat_template_kwargs": {"thinking": True}}]  # fmt: skip
    off = [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"},
           {"thinking": {"type": "disabled"}}, {"reasoning": {"enabled": False}}]  # fmt: skip
    for field in on:
        answer = harness.chat(**field)
        assert prompt_of(harness).endswith(f"assistant:{start}"), field
        assert "x-pyllm-ignored" not in answer.headers
    for field in off:
        harness.chat(**field)
        assert prompt_of(harness).endswith(f"assistant:{empty}"), field
    harness.chat()
    assert prompt_of(harness).endswith("assistant:")
    answer = harness.post("/v1/messages", {"model": "alias", "max_tokens": 99, "messages": [USER],
                                           "thinking": {"type": "disabled"}})  # fmt: skip
    assert answer.status_code == 200
    assert prompt_of(harness).endswith(empty)
    assert harness.complete(reasoning_effort="low", include_reasoning=True).status_code == 200
    refused = harness.chat(chat_template_kwargs={"enable_thinking": "yes"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"


@each_form
def test_limits_inside_reasoning_leave_no_answer(harness, form) -> None:
    form(harness)
    length = len("<think>\nwe") if form is with_tags else len(" we")
    message, usage = chat(harness, max_tokens=length)
    assert (message["content"], message["reasoning"]) == (None, "we")
    assert message["finish_reason"] == "length"
    assert usage["completion_tokens_details"]["reasoning_tokens"] == (3 if form is with_tags else 2)
    message, usage = chat(harness, max_tokens=len("<think>") if form is with_tags else 1)
    assert (message["content"], message.get("reasoning"), message["finish_reason"]) == (None, None, "length")
    response = harness.post("/v1/responses", {"input": "Hi", "max_output_tokens": usage["completion_tokens"]}).json()
    assert response["output"] == []
    message, _ = chat(harness, stop=["e"])
    assert (message["content"], message["reasoning"], message["finish_reason"]) == ("Y", "well é", "stop")


@each_form
def test_logprobs_cover_all_tokens_whole_and_streamed(harness, form) -> None:
    form(harness)
    whole = harness.chat(logprobs=True, top_logprobs=0).json()
    entries = whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == whole["usage"]["completion_tokens"]
    chunks = events_of(harness.chat(logprobs=True, top_logprobs=0, stream=True))
    streamed = [choice["logprobs"]["content"] for event in chunks for choice in event["choices"] if choice["logprobs"]]
    assert [entry for part in streamed for entry in part] == entries
    answer = {"input": "Hi", "include": ["message.output_text.logprobs"]}
    output = harness.post("/v1/responses", answer).json()["output"]
    shown = output[1]["content"][0]["logprobs"]
    assert bytes(byte for entry in shown for byte in entry["bytes"]) == b"Yes."


@each_form
def test_responses_have_reasoning_items(harness, form) -> None:
    form(harness)
    effort = harness.post("/v1/responses", {"input": "Hi", "reasoning": {"effort": "low"}}).json()["reasoning"]
    assert effort == {"effort": "low", "summary": None}
    whole = harness.post("/v1/responses", {"input": "Hi"}).json()
    OpenAIResponse.model_validate(whole, strict=True)
    reasoning, message = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "well é"}]
    assert (reasoning["type"], reasoning["summary"], reasoning["status"]) == ("reasoning", [], "completed")
    assert message["content"][0]["text"] == "Yes."
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    events = events_of(harness.post("/v1/responses", {"input": "Hi", "stream": True}))
    kinds = [event["type"] for event in events]
    texts = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(texts) == "well é" == events[kinds.index("response.reasoning_text.done")]["text"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [item["type"] for item in done] == ["reasoning", "message"]

    again = {"input": "And?", "previous_response_id": whole["id"]}
    assert harness.post("/v1/responses", again).status_code == 200
    assert "well" not in prompt_of(harness)
    sent_back = {"input": [USER, reasoning, {"type": "item_reference", "id": message["id"]}, USER]}
    assert harness.post("/v1/responses", sent_back).status_code == 200
    assert "well" not in prompt_of(harness)
    refers = {"input": [USER, {"type": "item_reference", "id": reasoning["id"]}]}
    assert harness.post("/v1/responses", refers).status_code == 200
    assert "well" not in prompt_of(harness)


@each_form
def test_messages_have_thinking_blocks(harness, form) -> None:
    form(harness)
    body = {"model": "alias", "max_tokens": 999, "messages": [USER]}
    whole = harness.post("/v1/messages", body).json()
    AnthropicMessage.model_validate(whole)
    thinking, text = whole["content"]
    assert (thinking["type"], thinking["thinking"], text) == ("thinking", "well é", {"type": "text", "text": "Yes."})
    events = events_of(harness.post("/v1/messages", body | {"stream": True}))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "well é"
    assert [delta["signature"] for delta in deltas if "signature" in delta] == [thinking["signature"]] != [""]
    answer = {"role": "assistant", "content": whole["content"]}
    harness.post("/v1/messages", body | {"messages": [USER, answer, USER]})
    assert "well" not in prompt_of(harness)


@each_form
def test_earlier_reasoning_is_left_out_of_the_prompt(harness, form) -> None:
    form(harness)
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "secret", "reasoning": "secret"}
    assert harness.chat(messages=[USER, answer, USER]).status_code == 200
    assert "secret" not in prompt_of(harness)


@each_form
@pytest.mark.parametrize("written", ["<think>\nsecret\n</think>\n<final>\n{}\n</final>", "<think>secret</think>{}",
                                     " <think>secret</think><think>secret</think>\n{}",
                                     "<|think_start|>secret<|think_end|><|final_start|>{}<|final_end|>"])  # fmt: skip
def test_reasoning_in_the_text_of_earlier_answers_is_left_out(harness, form, written: str) -> None:
    """Some clients send it back as they would show it."""
    form(harness)
    again = {"role": "user", "content": "<think>mine</think>"}
    for text in ("Yes. <think>", ""):
        answer = {"role": "assistant", "content": written.format(text)}
        bodies = {"/v1/chat/completions": {"messages": [USER, answer, again]},
                  "/v1/responses": {"input": [USER, answer, again]},
                  "/v1/messages": {"model": "alias", "max_tokens": 9, "messages": [USER, answer, again]}}  # fmt: skip
        harness.chat(messages=[USER, answer | {"content": text}, again])
        plain = prompt_of(harness)
        assert "<think>mine</think>" in plain
        for path, body in bodies.items():
            assert harness.post(path, body).status_code == 200
            assert prompt_of(harness) == plain
    cut = {"role": "assistant", "content": written.partition("</")[0].partition("<|think_end")[0]}
    harness.chat(messages=[USER, cut, again])
    assert "secret" not in prompt_of(harness)
    harness.chat(messages=[USER, cut], continue_final_message=True)
    assert prompt_of(harness).endswith(cut["content"].lstrip())
    harness.service.model = dataclasses.replace(harness.service.model, marks=None)
    harness.chat(messages=[USER, {"role": "assistant", "content": written}, USER])
    assert "secret" in prompt_of(harness)


def test_marked_calls_become_tool_calls(harness) -> None:
    with_marks(harness, reply=CALLS)
    message, _ = chat(harness, tools=[TOOL])
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"x": 1}', "{}"]
    assert (message["content"], message["reasoning"], message["finish_reason"]) == (None, "hm", "tool_calls")
    blocks = harness.post("/v1/messages", {"model": "alias", "max_tokens": 999, "messages": [USER],
                                           "tools": [{"name": "f", "input_schema": {"type": "object"}}]})  # fmt: skip
    assert [block["type"] for block in blocks.json()["content"]] == ["thinking", "tool_use", "tool_use"]
    items = harness.post("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "f"}]}).json()[
        "output"
    ]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "function_call"]
    cut, _ = chat(harness, tools=[TOOL], max_tokens=20)
    assert (cut["content"], cut.get("tool_calls"), cut["finish_reason"]) == (None, None, "length")
    harness.engine.reply = '<|tool_call_start|>{"name": "g", "arguments": {}}<|tool_call_end|>'
    unknown, _ = chat(harness, tools=[TOOL])
    assert (unknown["content"], unknown["finish_reason"]) == ('{"name": "g", "arguments": {}}', "stop")


def test_no_parser_shows_all_text(harness) -> None:
    with_tags(harness)
    harness.service.model = dataclasses.replace(harness.service.model, marks=None)
    assert chat(harness)[0]["content"] == TAGGED


@pytest.mark.parametrize("parser", ["tag", "tokens"])
def test_a_parser_that_cannot_work_is_refused(harness, parser: str) -> None:
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        find_marks(parser, harness.tokenizer, "", "")


@each_form
@pytest.mark.parametrize("field", ["summary", "generate_summary"])
def test_responses_show_reasoning_as_a_summary(harness, form, field: str) -> None:
    """Some clients show nothing else; a model's summary is all of its reasoning."""
    form(harness)
    body = {"input": "Hi", "reasoning": {field: "auto"}}
    answer = harness.post("/v1/responses", body)
    assert "x-pyllm-ignored" not in answer.headers
    OpenAIResponse.model_validate(answer.json(), strict=True)
    assert answer.json()["reasoning"]["summary"] == "auto"
    reasoning, message = answer.json()["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "well é"}]
    assert (reasoning["content"], message["content"][0]["text"]) == ([], "Yes.")
    events = events_of(harness.post("/v1/responses", body | {"stream": True}))
    summed = [event for event in events if "summary" in event["type"]]
    kinds = [event["type"].removeprefix("response.reasoning_summary_") for event in summed]
    assert kinds == ["part.added", *["text.delta"] * (len(kinds) - 3), "text.done", "part.done"]
    assert "".join(event.get("delta", "") for event in summed) == "well é" == summed[-2]["text"]
    item = events[-1]["response"]["output"][0]
    assert {(event["item_id"], event["summary_index"]) for event in summed} == {(item["id"], 0)}
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    refused = harness.post("/v1/responses", {"input": "Hi", "reasoning": {field: "long"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reasoning.summary"
