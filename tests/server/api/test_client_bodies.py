"""Bodies that routers, agents and other clients send: all are answered, and hints without effect are named."""

from __future__ import annotations

from typing import Any

import pytest

Harness = Any  # of conftest.py

USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER], "max_tokens": 3}
FUNCTION = {"type": "function", "name": "shell", "description": "Run.", "strict": False, "parameters": {
    "type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}},
    "required": ["command"], "additionalProperties": False}}  # fmt: skip
ROUTER = {"no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False,
          "include_reasoning": True, "regex": None, "ebnf": None, "lora_path": None, "session_params": None,
          "rid": None, "min_p": None, "top_k": None, "ignore_eos": False, "continue_final_message": False,
          "skip_special_tokens": True}  # fmt: skip
VLLM = {"use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True,
        "return_tokens_as_token_ids": False, "documents": None, "add_special_tokens": False, "guided_json": None,
        "kv_transfer_params": None, "chat_template": None, "chat_template_kwargs": {"enable_thinking": False},
        "top_logprobs": 0, "logprobs": False, "stop": [], "stop_token_ids": [], "bad_words": [],
        "min_tokens": 0, "echo": False}  # fmt: skip
MARK = {"cache_control": {"type": "ephemeral", "ttl": None, "scope": "global"}}
DUMP = {"json": {"type": "object"}, "regex": None, "choice": None, "grammar": None, "json_object": None,
        "disable_any_whitespace": False, "disable_additional_properties": False, "whitespace_pattern": None,
        "structural_tag": None}  # fmt: skip
AGENT = {
    "model": "alias", "max_tokens": 32_000, "temperature": 1,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"} | MARK]}],
    "system": [{"type": "text", "text": "You are an agent."} | MARK],
    "tools": [{"name": "mcp__" + "x" * 120, "input_schema": {"type": "object"}} | MARK,
              {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
    "metadata": {"user_id": "user_1", "session": "2"}, "stop_sequences": [f"stop {n}" for n in range(16)],
    "thinking": {"type": "enabled", "budget_tokens": 31_999}, "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "service_tier": "auto", "container": None, "mcp_servers": [], "betas": ["interleaved-thinking-2025-05-14"],
}  # fmt: skip
CODEX = {
    "model": "alias", "instructions": "You are a coding agent.", "stream": True, "store": False,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "x"},
    ],
    "tools": [FUNCTION, {"type": "web_search", "external_web_access": False},
              {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
              {"type": "namespace", "name": "mcp", "description": "", "tools": [FUNCTION]}],
    "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "client_metadata": {"x": "y"}, "text": {"verbosity": "low"}, "service_tier": None,
}  # fmt: skip
LITELLM = {"role": "assistant", "content": "Hi", "tool_calls": None, "function_call": None, "refusal": None,
           "provider_specific_fields": {"refusal": None}, "annotations": [], "audio": None, "images": [],
           "reasoning_content": None, "thinking_blocks": None}  # fmt: skip

BODIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "a router's chat": ("/v1/chat/completions", CHAT | ROUTER, set()),
    "a router's completion": (
        "/v1/completions",
        {name: value for name, value in ROUTER.items() if name != "continue_final_message"} | {"prompt": "Hi"}, set()),
    "a router's responses": ("/v1/responses", {"input": "Hi", "request_id": "resp_1", "priority": 0} | {
        name: value for name, value in ROUTER.items() if name != "continue_final_message"}, set()),
    "a benchmark's chat": (
        "/v1/chat/completions", {**CHAT, "stream": True, "max_completion_tokens": 3, "ignore_eos": True,
         "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, set()),
    "a benchmark's completion": (
        "/v1/completions", {"prompt": "Hi", "max_completion_tokens": 3, "max_tokens": 3, "stop": None, "stream": True,
         "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, set()),
    "all of vLLM's defaults": ("/v1/chat/completions", CHAT | VLLM, {"chat_template_kwargs.enable_thinking"}),
    "metadata with nulls": ("/v1/chat/completions", CHAT | {"metadata": {"a": "b", "c": None}}, set()),
    "vLLM's structured outputs": ("/v1/chat/completions", CHAT | {"structured_outputs": DUMP}, set()),
    "a call without words": ("/v1/chat/completions", CHAT | {"messages": [
        USER, {"role": "assistant", "content": [], "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "4"}]}, set()),
    "an agent's messages": ("/v1/messages?beta=true", AGENT, {
        "tools.web_search_20250305", "thinking", "output_config.effort",
        "context_management.edits.clear_thinking_20251015"}),
    "Codex": ("/v1/responses", CODEX, {
        "tools.web_search", "tools.custom", "tools.namespace", "reasoning.effort", "reasoning.summary",
        "input.reasoning", "include.reasoning.encrypted_content", "text.verbosity"}),
    "messages of many libraries": (
        "/v1/chat/completions", CHAT | {"messages": [
            {"role": "system", "content": "A", "tool_calls": None, "name": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}], "tool_calls": []},
            LITELLM, {**USER, "cache_control": {"type": "ephemeral"}}]}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_it_is_answered(make_harness: Any, name: str) -> None:
    harness: Harness = make_harness()
    harness.engine.configure(max_model_len=1500)
    path, body, ignored = BODIES[name]
    response = harness.post(path, body)
    assert response.status_code == 200, response.text
    assert set(response.headers.get("x-pyllm-ignored", "").split(", ")) - {""} == ignored


def test_every_chunk_has_the_usage_so_far_if_asked(harness: Harness, events_of: Any) -> None:
    for options, last in (({}, 0), ({"include_usage": True}, 1)):
        stream_options = {"continuous_usage_stats": True, **options}
        for events in (
            events_of(harness.chat(stream=True, stream_options=stream_options, max_tokens=4)),
            events_of(harness.complete(stream=True, stream_options=stream_options, max_completion_tokens=4)),
        ):
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert counts[-1] == 4
            assert [event for event in events if not event["choices"]] == events[-1:] * last


def test_max_completion_tokens_wins_on_completions_too(harness: Harness) -> None:
    response = harness.complete(max_tokens=9, max_completion_tokens=2)
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("length", [128, 129])
def test_tool_names_may_have_128_characters(make_harness: Any, length: int) -> None:
    harness: Harness = make_harness()
    harness.engine.configure(max_model_len=1500)
    name = "x" * length
    wanted = 200 if length == 128 else 400
    flat = {"type": "function", "name": name}
    function = {"type": "function", "function": {"name": name}}
    assert harness.chat(tools=[function], tool_choice=function).status_code == wanted
    responses = {"input": "Hi", "tools": [flat], "tool_choice": flat}
    assert harness.post("/v1/responses", responses).status_code == wanted
    messages = AGENT | {"tools": [{"name": name, "input_schema": {}}], "tool_choice": {"type": "tool", "name": name}}
    assert harness.post("/v1/messages", messages).status_code == wanted
