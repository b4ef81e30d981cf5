"""Tools, templates and answer formats of `POST /v1/chat/completions`: what is asked of the engine and what is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from pyllm.server.api.chat import ChatCompletion, ChatCompletionChunk
from pyllm.server.chat.template import ChatTemplate

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ style }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
STRICT = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": WEATHER["function"]["parameters"] | {"additionalProperties": False},
    },
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "ping"}}
USER = {"role": "user", "content": "Hi"}
ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@pytest.fixture
def chat(harness) -> Callable[..., Any]:
    """Posts a chat with both tools to a model whose template knows tools."""
    engine = harness.engine
    engine.configure(max_model_len=4000, num_kv_blocks=1000)
    template = ChatTemplate(harness.tokenizer, TEMPLATE)
    harness.service.model = dataclasses.replace(harness.model, template=template)
    return lambda **fields: harness.chat(**{"tools": [WEATHER, PING]} | fields)


def prompt_of(harness: Any) -> str:
    return harness.tokenizer.decode(harness.engine.requests[-1][1])


def test_a_template_for_tools_is_used_with_tools_only(harness) -> None:
    harness.engine.configure(max_model_len=4000, num_kv_blocks=1000)
    harness.tokenizer.chat_templates = {"default": "plain: {{ messages[0].content }}", "tool_use": TEMPLATE}
    template = ChatTemplate.from_tokenizer(harness.tokenizer)
    harness.service.model = dataclasses.replace(harness.model, template=template)
    assert harness.chat(messages=[USER]).status_code == 200
    assert prompt_of(harness) == "plain: Hi"
    assert harness.chat(messages=[USER], tools=[WEATHER]).status_code == 200
    assert "get_weather" in prompt_of(harness)
    assert "plain" not in prompt_of(harness)


def gather(events: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What the chunks of one choice add up to."""
    found: dict[str, Any] = {"content": "", "calls": [], "reason": None, "logprobs": [], "ids": [], "dynamics": []}
    for event in events:
        ChatCompletionChunk.model_validate(event)
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            assert found["reason"] is None, "nothing comes after the end"
            found["content"] += choice["delta"].get("content") or ""
            calls = choice["delta"].get("tool_calls", [])
            assert len(calls) <= 1
            for call in calls:
                if "id" in call:
                    assert call["index"] == len(found["calls"])
                    assert call["type"] == "function"
                    assert call["function"]["arguments"] == ""
                    found["calls"].append([call["function"]["name"], ""])
                found["calls"][call["index"]][1] += call["function"]["arguments"]
            found["reason"] = choice["finish_reason"]
            found["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            found["ids"] += choice.get("token_ids", [])
            found["dynamics"] += choice.get("dynamics", [])
    return found


def test_a_call_is_shown_with_its_arguments_and_without_content(chat, harness):
    harness.engine.reply = CALL
    answer = ChatCompletion.model_validate_json(chat().content)
    message = answer.choices[0].message
    assert message.content is None
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Zürich"}')
    assert call.id.startswith("call_")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert harness.engine.requests[-1][2].grammar is None


def test_without_a_call_all_is_as_without_tools(chat, harness, events_of):
    message = chat().json()["choices"][0]
    assert message["message"] == {"role": "assistant", "content": "Hello, wörld!", "refusal": None}
    assert message["finish_reason"] == "stop"
    assert gather(events_of(chat(stream=True)))["content"] == "Hello, wörld!"


REPLIES = [
    CALL,
    f"I look.\n{CALL}\n{CALL}",
    "Hello <tool_",
    CALL.replace("get_weather", "other"),
    CALL[:-20],
    f"{CALL}Done.",
]


CUTS: list[dict[str, Any]] = [{}, {"max_tokens": 30}, {"tool_choice": "required"}, {"n": 2}, {"stop": ["Zü", "oo"]}]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("fields", CUTS)
def test_a_stream_adds_up_to_the_whole_answer(chat, harness, events_of, reply, fields):
    harness.engine.reply = reply
    asked = {"logprobs": True, "return_token_ids": True, "return_dynamics": True} | fields
    whole = ChatCompletion.model_validate_json(chat(**asked).content)
    events = events_of(chat(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[-1]["usage"] == whole.usage.model_dump()
    for choice in whole.choices:
        streamed = gather(events, choice.index)
        assert streamed["content"] == (choice.message.content or "")
        calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]
        assert streamed["calls"] == calls
        assert streamed["reason"] == choice.finish_reason
        assert streamed["logprobs"] == [entry.model_dump() for entry in choice.logprobs.content]
        assert streamed["ids"] == choice.token_ids
        assert streamed["dynamics"] == [entry.model_dump() for entry in choice.dynamics]


def test_arguments_are_streamed_while_they_are_written(chat, harness, events_of):
    harness.engine.reply = CALL
    events = events_of(chat(stream=True))
    pieces = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert pieces[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert [piece["function"]["arguments"] for piece in pieces[1:6]] == ["{", '"', "c", "i", "t"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["delta"] == {}


def test_a_call_that_is_cut_off_is_shown_as_far_as_it_went(chat, harness):
    harness.engine.reply = CALL
    choice = chat(max_tokens=len(CALL[: CALL.index("rich")].encode())).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Zü'
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "constrained"),
    [
        ({}, False),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, False),
        ({"tool_choice": "none"}, False),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [STRICT]}, True),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": NAMED}, True),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}}, True),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, False),
    ],
)
def test_a_choice_that_must_hold_is_a_grammar(chat, harness, fields, constrained):
    assert chat(**fields).status_code == 200
    assert (harness.engine.requests[-1][2].grammar is not None) == constrained


def test_required_call_ends_with_tool_calls_a_named_with_stop(chat, harness, events_of):
    harness.engine.reply = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    for choice, reason in (("required", "tool_calls"), (NAMED, "stop")):
        answer = chat(tool_choice=choice).json()["choices"][0]
        assert answer["message"]["tool_calls"][0]["function"] == {"name": "ping", "arguments": "{}"}
        assert answer["finish_reason"] == reason
        events = events_of(chat(tool_choice=choice, stream=True))
        assert gather(events)["reason"] == reason
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}


def test_the_model_sees_the_tools_that_it_may_call(chat, harness):
    chat()
    assert prompt_of(harness).startswith("[get_weather][ping]<user>")
    chat(tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}})
    assert prompt_of(harness).startswith("[ping]<user>")
    harness.engine.reply = CALL
    answer = chat(tool_choice="none").json()["choices"][0]
    assert prompt_of(harness).startswith("<user>")
    assert answer["message"]["content"] == CALL


def test_calls_and_results_go_back_in(chat, harness):
    assert chat(messages=[USER, ASKED, RESULT]).status_code == 200
    assert '<assistant>CALL get_weather {"city": "Rome"}\n<tool>sunny\n' in prompt_of(harness)


def test_a_template_that_knows_no_tools_gets_them_as_plain_text(chat, harness):
    harness.service.model = harness.model
    assert chat(messages=[USER, ASKED, RESULT]).status_code == 200
    prompt = prompt_of(harness)
    assert '{"name": "get_weather", "description": "Get the weather", "parameters": {"type": "object"' in prompt
    assert 'write <tool_call>{"name": "NAME", "arguments": {ARGUMENTS}}</tool_call>' in prompt
    assert prompt.index('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}') < prompt.index("sunny")
    chat(messages=[{"role": "system", "content": "Be brief."}, USER])
    assert prompt_of(harness).startswith("Be brief.\n\nYou can call")


def test_template_fields_reach_the_template(chat, harness):
    talk = [USER, {"role": "assistant", "content": "Well"}]
    ends = {"tools": None, "messages": talk}
    chat(**ends)
    assert prompt_of(harness).endswith("<assistant>Well\n<assistant>")
    chat(**ends, add_generation_prompt=False)
    assert prompt_of(harness).endswith("<assistant>Well\n")
    chat(**ends, continue_final_message=True)
    assert prompt_of(harness).endswith("<assistant>Well")
    chat(continue_final_message=True, chat_template_kwargs={"style": "brief</s>"})
    assert prompt_of(harness) == "[get_weather][ping]brief</s><user>Hi"
    assert 0 not in harness.engine.requests[-1][1]


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


JSON_MODE = {"type": "json_object"}
REGEX = {"regex": "a+"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [PING, PING]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(400)}}]},
         "tools[0].function.parameters"),
        ({"tools": [PING, {"type": "function", "function": {"name": "f", "parameters": {"contains": {}}}}],
          "tool_choice": "required"}, "tools[1].function.parameters"),
        ({"response_format": JSON_MODE, "structured_outputs": REGEX}, "structured_outputs"),
        ({"structured_outputs": REGEX | {"choice": ["a"]}}, "structured_outputs"),
        ({"messages": [USER, RESULT]}, "messages[1].tool_call_id"),
        ({"messages": [USER, ASKED, RESULT | {"tool_call_id": "call_2"}]}, "messages[2].tool_call_id"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER, ASKED], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER, ASKED, RESULT], "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"style": "x" * 20_000}}, "chat_template_kwargs.style"),
        ({"chat_template_kwargs": {"style": nested(70)}}, "chat_template_kwargs.style"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_that_names_the_field(chat, fields, param):
    response = chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', "[" * 1500, '{"a":' * 300 + "1" + "}" * 300, "no JSON", "3"])
def test_strange_arguments_in_the_history_are_text(chat, harness, arguments):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    response = chat(messages=[USER, ASKED | {"tool_calls": [call]}, RESULT])
    assert response.status_code == 200, response.text
    assert f"CALL f {json.dumps(arguments)}" in prompt_of(harness)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": JSON_MODE},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": REGEX},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'start: "a"+'}},
    ],
)
def test_response_format_becomes_a_grammar(chat, harness, fields):
    for tools in (None, [WEATHER]):
        assert chat(**fields, tools=tools).status_code == 200
        assert harness.engine.requests[-1][2].grammar is not None


def test_prompt_logprobs_come_once_whole_and_streamed(chat, harness, events_of):
    for fields in ({}, {"tools": None}, {"n": 2}):
        whole = chat(prompt_logprobs=1, **fields).json()
        assert len(whole["prompt_logprobs"]) == len(harness.engine.requests[-1][1])
        events = events_of(chat(prompt_logprobs=1, stream=True, **fields))
        assert [e["prompt_logprobs"] for e in events if "prompt_logprobs" in e] == [whole["prompt_logprobs"]]


def test_answers_go_back_in_as_they_came(chat, harness):
    harness.engine.reply = f"I look. {CALL}"
    said = chat().json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": json.dumps({"sky": "clear"})}
    assert chat(messages=[USER, said, result]).status_code == 200
    assert '<assistant>I look.CALL get_weather {"city": "Zürich"}\n<tool>{"sky": "clear"}' in prompt_of(harness)
