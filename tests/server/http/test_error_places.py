"""A validation error names the member that is wrong, however deep and whatever it could have been instead."""

from __future__ import annotations

from typing import Any

import pytest

Harness = Any  # of conftest.py

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    RESPONSES: {"input": "Hi"},
    MESSAGES: {"model": "alias", "max_tokens": 3, "messages": [USER]},
}
TEXT = {"type": "text", "text": "a"}


def blocks(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}]}


CASES: list[tuple[str, dict[str, Any], str]] = [
    # Content blocks, whose types are also names of members.
    (MESSAGES, blocks(TEXT | {"cache_control": {"type": "persistent"}}), "messages[0].content[0].cache_control.type"),
    (MESSAGES, blocks(TEXT | {"cache_control": {"type": "ephemeral", "ttl": "2h"}}),
     "messages[0].content[0].cache_control.ttl"),
    (MESSAGES, blocks(TEXT | {"cache_control": "yes"}), "messages[0].content[0].cache_control"),
    (MESSAGES, blocks({"type": "text"}), "messages[0].content[0].text"),
    (MESSAGES, blocks({"type": "text", "text": 5}), "messages[0].content[0].text"),
    (MESSAGES, blocks(TEXT | {"tone": "x"}), "messages[0].content[0].tone"),
    (MESSAGES, blocks({"type": "thinking", "thinking": "Hm."}, role="assistant"), "messages[0].content[0].signature"),
    (MESSAGES, blocks({"type": "thinking", "thinking": 1, "signature": "x"}, role="assistant"),
     "messages[0].content[0].thinking"),
    (MESSAGES, blocks({"type": "redacted_thinking"}, role="assistant"), "messages[0].content[0].data"),
    (MESSAGES, blocks({"type": "tool_use", "id": "a", "name": "f", "input": "x"}, role="assistant"),
     "messages[0].content[0].input"),
    (MESSAGES, blocks({"type": "tool_use", "id": "a", "input": {}}, role="assistant"), "messages[0].content[0].name"),
    (MESSAGES, blocks({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
     "messages[0].content[0].content[0].type"),
    (MESSAGES, blocks({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text"}]}),
     "messages[0].content[0].content[0].text"),
    (MESSAGES, blocks({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (MESSAGES, {"system": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]},
     "system[0].cache_control.type"),
    (MESSAGES, {"system": [{"type": "text", "txt": "a"}]}, "system[0].text"),
    (MESSAGES, {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {}, "cache_control": {"ttl": "1h"}}]},
     "tools[0].cache_control.type"),
    (MESSAGES, {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (MESSAGES, {"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
    (MESSAGES, {"tool_choice": {"name": "f"}}, "tool_choice.type"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
     "output_config.format.name"),
    # Formats.
    (CHAT, {"response_format": {"type": "json_schema", "strict": True, "json_schema": {"name": "x", "schema": SCHEMA}}},
     "response_format.strict"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "schema": SCHEMA}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
     "response_format.json_schema.name"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}}},
     "response_format.json_schema.name"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": 1}}},
     "response_format.json_schema.strict"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format.json_schema.name"),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
    (CHAT, {"response_format": "json"}, "response_format"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}},
     "text.format.name"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    (RESPONSES, {"text": {"format": {"type": "text", "text": "x"}}}, "text.format.text"),
    # Tools and their choice.
    (CHAT, {"tools": [{"type": "function", "name": "f"}]}, "tools[0].function"),
    (CHAT, {"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [TOOL, {"type": "function", "function": {"name": "g", "parameters": "x"}}]},
     "tools[1].function.parameters"),
    (CHAT, {"tools": [TOOL | {"function": {"name": "f", "schema": {}}}]}, "tools[0].function.schema"),
    (CHAT, {"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f", "x": 1}}},
     "tool_choice.function.x"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [TOOL]}}},
     "tool_choice.allowed_tools.mode"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"function": {"name": "f"}}}, "tool_choice.type"),
    (CHAT, {"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    (RESPONSES, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools[0].parameters"),
    (RESPONSES, {"tool_choice": {"type": "function"}}, "tool_choice.name"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "allowed_tools", "mode": "auto",
      "tools": [{"type": "function"}]}}, "tool_choice.tools[0].name"),
    # Messages and items.
    (CHAT, blocks({"type": "text"}), "messages[0].content[0].text"),
    (CHAT, blocks("Hi"), "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]}, "messages[0].content"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [USER, {"role": "tool", "content": "4"}]}, "messages[1].tool_call_id"),
    (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}]},
     "messages[1].tool_calls[0].function"),
    (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}]}]},
     "messages[1].tool_calls[0].function.arguments"),
    (RESPONSES, {"input": [{"role": "user"}]}, "input[0].content"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input[0].content[0].type"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    (RESPONSES, {"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}]},
     "input[0].output[0].type"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a", "output": {"x": 1}}]}, "input[0].output"),
    (RESPONSES, {"input": [{"type": "item_reference"}]}, "input[0].id"),
    (RESPONSES, {"input": [{"type": "mystery"}]}, "input[0].type"),
    (RESPONSES, {"input": [{"role": "user", "content": "a", "mood": "good"}]}, "input[0].mood"),
    (CHAT, {"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
    (CHAT, {"stop": ["a", 5]}, "stop[1]"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(make_harness: Any) -> Harness:
    return make_harness()


@pytest.mark.parametrize(("path", "fields", "param"), CASES, ids=[f"{path} {param}" for path, _, param in CASES])
def test_an_error_names_the_wrong_member(shared: Harness, path: str, fields: dict[str, Any], param: str) -> None:
    response = shared.post(path, BASES[path] | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert param in error["message"]


def test_items_keep_their_numbers_when_others_are_ignored(shared: Harness) -> None:
    hosted = {"type": "web_search"}
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}
    for tool in (wrong, {"type": "function", "function": {"name": "f", "x": 1}}):
        error = shared.chat(tools=[hosted, tool], tool_choice="required").json()["error"]
        assert error["param"].startswith("tools[1]"), error
