"""For each field of each request, and each member of those: two requests that must be answered differently."""

from __future__ import annotations

from typing import Any

from support.checkpoints import byte_tokenizer

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, EMBEDDINGS = "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


FREE = {"temperature": 1, "seed": 3}
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [user("Hi")], "max_tokens": 12, "ignore_eos": True, **FREE},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 12, "ignore_eos": True, **FREE},
    RESPONSES: {"input": "Hi", "max_output_tokens": 12, "ignore_eos": True, "store": False, **FREE},
    MESSAGES: {"model": "tiny", "messages": [user("Hi")], "max_tokens": 12, **FREE},
    COUNT: {"model": "tiny", "messages": [user("Hi")]},
    EMBEDDINGS: {"input": "Hi"},
    TOKENIZE: {"prompt": "Hi"},
    DETOKENIZE: {"tokens": [70, 71]},
}
LIMIT = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
EOS = 0
A, B, C = (byte_tokenizer().token_to_id(letter) for letter in "abc")
LETTERS = {"allowed_token_ids": [A, B, C]}
ENDS = {"allowed_token_ids": [EOS, A]}
LONG = "x" * 40
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
LOOSE = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
OTHER_SCHEMA = {"type": "object", "properties": {"b": {"enum": [3]}}, "required": ["b"], "additionalProperties": False}


def tool(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | more}


def flat(**more: Any) -> dict[str, Any]:
    return {"type": "function", "name": "f", **more}


def custom(**more: Any) -> dict[str, Any]:
    return {"name": "f", "input_schema": {"type": "object"}} | more


def called(**more: Any) -> list[dict[str, Any]]:
    """A chat in which a tool was called; `more` changes its one call."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}} | more
    return [user("Hi"), {"role": "assistant", "tool_calls": [call]}, answered()]


def answered(**more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": "4", **more}


def used(**more: Any) -> list[dict[str, Any]]:
    """The same in Anthropic's shape; `more` changes the result."""
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "4"} | more
    return [user("Hi"), {"role": "assistant", "content": [use]}, user([result])]


def allowed(mode: str = "required", name: str = "f") -> dict[str, Any]:
    """Two tools; one of them may be called."""
    function = {"type": "function", "function": {"name": name}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function]}}
    return {"tools": [tool(), tool(name="g")], "max_tokens": 90, "tool_choice": choice}


def schema_format(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}


Probe = tuple[dict[str, Any], dict[str, Any]]
# Fields that two requests share, and fields that only the second has: the answers must differ.
PROBES: dict[str, Probe] = {
    "model": ({"model": "tiny"}, {"model": "team/alias"}),
    "messages": ({}, {"messages": [user("Ho")]}),
    "prompt": ({}, {"prompt": "Ho"}),
    "input": ({}, {"input": "Ho"}),
    "tokens": ({}, {"tokens": [71]}),
    "temperature": ({}, {"temperature": 0}),
    "top_p": ({}, {"top_p": 0.05}),
    "top_k": ({}, {"top_k": 1}),
    "min_p": ({}, {"min_p": 1.0}),
    "n": ({}, {"n": 2}),
    "seed": ({}, {"seed": 4}),
    "stop": (LETTERS, {"stop": ["b"]}),
    "stop_token_ids": (LETTERS, {"stop_token_ids": [B]}),
    "include_stop_str_in_output": (LETTERS | {"stop": ["b"]}, {"include_stop_str_in_output": True}),
    "ignore_eos": (ENDS, {"ignore_eos": False}),
    "min_tokens": (ENDS | {"ignore_eos": False}, {"min_tokens": 11}),
    "presence_penalty": (LETTERS, {"presence_penalty": 2}),
    "frequency_penalty": (LETTERS, {"frequency_penalty": 2}),
    "repetition_penalty": (LETTERS, {"repetition_penalty": 5}),
    "logit_bias": ({}, {"logit_bias": {str(A): 100}}),
    "bad_words": (LETTERS, {"bad_words": ["a"]}),
    "allowed_token_ids": ({}, LETTERS),
    "prompt_logprobs": ({}, {"prompt_logprobs": 1}),
    "logprobs": ({}, {"logprobs": True}),
    "top_logprobs": ({"logprobs": True}, {"top_logprobs": 1}),
    "response_format": ({}, {"response_format": schema_format()}),
    "structured_outputs": ({}, {"structured_outputs": {"choice": ["yes"]}}),
    "truncate_prompt_tokens": ({}, {"truncate_prompt_tokens": 1}),
    "return_dynamics": ({}, {"return_dynamics": True}),
    "stream": ({}, {"stream": True}),
    "stream_options": ({"stream": True}, {"stream_options": {"include_usage": True}}),
    "return_token_ids": ({}, {"return_token_ids": True}),
    "skip_special_tokens": (ENDS, {"skip_special_tokens": False}),
    f"{DETOKENIZE} skip_special_tokens": ({"tokens": [EOS, A]}, {"skip_special_tokens": True}),
    "max_tokens": ({}, {"max_tokens": 3}),
    "max_completion_tokens": ({}, {"max_completion_tokens": 3}),
    f"{COMPLETIONS} max_completion_tokens": ({}, {"max_completion_tokens": 3}),
    "max_output_tokens": ({}, {"max_output_tokens": 3}),
    "tools": ({}, {"tools": [tool()]}),
    "tool_choice": ({"tools": [tool()], "max_tokens": 60}, {"tool_choice": "required"}),
    "parallel_tool_calls": (
        {"tools": [tool()], "tool_choice": "required", "max_tokens": 200, "n": 9}, {"parallel_tool_calls": False}
    ),
    "add_generation_prompt": ({}, {"add_generation_prompt": False}),
    "continue_final_message": (
        {"messages": [user("Hi"), {"role": "assistant", "content": "So"}], "add_generation_prompt": False},
        {"continue_final_message": True},
    ),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"aside": "x"}}),
    "echo": ({}, {"echo": True}),
    "add_special_tokens": ({}, {"add_special_tokens": True}),
    "instructions": ({}, {"instructions": "Be brief."}),
    "encoding_format": ({}, {"encoding_format": "base64"}),
    "pooling": ({}, {"pooling": "last"}),
    "dimensions": ({}, {"dimensions": 7}),
    "truncation": ({"input": [user("x" * 5000), user("x" * 5000)]}, {"truncation": "auto"}),
    "include": ({}, {"include": ["message.output_text.logprobs"]}),
    "text": ({}, {"text": {"format": {"type": "json_object"}}}),
    "metadata": ({}, {"metadata": {"a": "b"}}),
    "system": ({}, {"system": "Be brief."}),
    "stop_sequences": (
        {"max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"stop_sequences": [":"]},
    ),
    "output_config": ({"max_tokens": 60}, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    "return_token_strs": ({}, {"return_token_strs": True}),
    # The same names with another meaning.
    f"{COMPLETIONS} logprobs": ({}, {"logprobs": 2}),
    f"{RESPONSES} top_logprobs": ({}, {"top_logprobs": 1}),
    f"{RESPONSES} tools": ({}, {"tools": [flat()]}),
    f"{RESPONSES} tool_choice": ({"tools": [flat()], "max_output_tokens": 60}, {"tool_choice": "required"}),
    f"{RESPONSES} parallel_tool_calls": (
        {"tools": [flat()], "tool_choice": "required", "max_output_tokens": 400}, {"parallel_tool_calls": False}
    ),
    f"{MESSAGES} tools": ({}, {"tools": [custom()]}),
    f"{MESSAGES} tool_choice": ({"tools": [custom()], "max_tokens": 60}, {"tool_choice": {"type": "any"}}),
    f"{COUNT} model": ({}, {"model": "other"}),
    f"{TOKENIZE} model": ({}, {"model": "other"}),
    f"{DETOKENIZE} model": ({}, {"model": "other"}),
    f"{COUNT} messages": ({}, {"messages": [user("Hello")]}),
    f"{COUNT} tools": ({}, {"tools": [custom()]}),
    f"{COUNT} tool_choice": ({"tools": [custom()]}, {"tool_choice": {"type": "none"}}),
    f"{TOKENIZE} messages": ({"prompt": None}, {"messages": [user("Hi")]}),
    f"{TOKENIZE} tools": ({"prompt": None, "messages": [user("Hi")]}, {"tools": [tool()]}),
    f"{TOKENIZE} add_generation_prompt": (
        {"prompt": None, "messages": [user("Hi")]}, {"add_generation_prompt": False}
    ),
    f"{TOKENIZE} continue_final_message": (
        {"prompt": None, "messages": [user("Hi")], "add_generation_prompt": False}, {"continue_final_message": True}
    ),
    f"{TOKENIZE} chat_template_kwargs": (
        {"prompt": None, "messages": [user("Hi")]}, {"chat_template_kwargs": {"aside": "x"}}
    ),
}  # fmt: skip

Nested = tuple[str, dict[str, Any], dict[str, Any]]
# The same for the members of members: the path, and two requests.
NESTED: dict[str, Nested] = {
    "StreamOptions.include_usage": (
        CHAT, {"stream": True, "stream_options": {}}, {"stream": True, "stream_options": {"include_usage": True}}
    ),
    "StreamOptions.continuous_usage_stats": (
        CHAT, {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    ),
    "JsonSchemaFormat.json_schema": (
        CHAT, {"response_format": schema_format()}, {"response_format": schema_format(schema=OTHER_SCHEMA)}
    ),
    "Function.strict": (CHAT, *({"tools": [tool(parameters=LOOSE, strict=t)]} for t in (False, True))),
    "FunctionTool.strict": (RESPONSES, *({"tools": [flat(parameters=LOOSE, strict=t)]} for t in (False, True))),
    "CustomTool.strict": (MESSAGES, *({"tools": [custom(input_schema=LOOSE, strict=t)]} for t in (False, True))),
    "JsonObjectFormat.value": (
        CHAT, *({"response_format": {"type": "json_object", "value": value}} for value in (SCHEMA, OTHER_SCHEMA))
    ),
    "JsonSchemaResponseFormat.json_schema": (CHAT, {"response_format": schema_format()}, {}),
    "StructuredOutputs.json_schema": (CHAT, {"structured_outputs": {"json": SCHEMA}}, {}),
    "StructuredOutputs.regex": (CHAT, {"structured_outputs": {"regex": "a+"}}, {}),
    "StructuredOutputs.choice": (CHAT, {"structured_outputs": {"choice": ["a"]}}, {}),
    "StructuredOutputs.grammar": (CHAT, {"structured_outputs": {"grammar": 'start: "a"'}}, {}),
    "TextPart.text": (CHAT, *({"messages": [user([{"type": "text", "text": t}])]} for t in "ab")),
    "TextMessage.role": (
        CHAT, *({"messages": [{"role": role, "content": "a"}, user("Hi")]} for role in ("system", "user"))
    ),
    "TextMessage.content": (
        CHAT, *({"messages": [user(t)]} for t in "ab"),
        *({"messages": [{"role": "system", "content": t}, user("Hi")]} for t in "ab")
    ),
    "TextMessage.name": (
        CHAT, *({"messages": [user("a", name=t)]} for t in "ab"),
        *({"messages": [{"role": "system", "content": "a", "name": t}, user("Hi")]} for t in "ab")
    ),
    "AssistantMessage.content": (
        CHAT, *({"messages": [user("Hi"), {"role": "assistant", "content": t}]} for t in "ab")
    ),
    "AssistantMessage.name": (
        CHAT, *({"messages": [user("Hi"), {"role": "assistant", "content": "a", "name": t}]} for t in "ab")
    ),
    "AssistantMessage.tool_calls": (CHAT, {"messages": called()}, {"messages": called(id="c2")}),
    "ToolCall.id": (CHAT, {"messages": called()}, {"messages": called(id="c2")}),
    "ToolCall.function": (
        CHAT, {"messages": called()}, {"messages": called(function={"name": "g", "arguments": "{}"})}
    ),
    "CalledFunction.name": (
        CHAT, {"messages": called()}, {"messages": called(function={"name": "g", "arguments": "{}"})}
    ),
    "CalledFunction.arguments": (
        CHAT, {"messages": called()}, {"messages": called(function={"name": "f", "arguments": '{"a": 1}'})}
    ),
    "ToolMessage.content": (CHAT, *({"messages": [*called()[:2], answered(content=t)]} for t in "ab")),
    "ToolMessage.tool_call_id": (
        CHAT, *({"messages": [*called()[:2], answered(tool_call_id=t)]} for t in ("c1", "c2"))
    ),
    "Tool.function": (CHAT, *({"tools": [tool(description=t)]} for t in "ab")),
    "Function.name": (CHAT, *({"tools": [{"type": "function", "function": {"name": t}}]} for t in "ab")),
    "Function.description": (CHAT, *({"tools": [tool(description=t)]} for t in "ab")),
    "Function.parameters": (CHAT, *({"tools": [tool(parameters=s)]} for s in (SCHEMA, OTHER_SCHEMA))),
    "NamedToolChoice.function": (
        CHAT,
        *({"tools": [tool(), tool(name="g")], "max_tokens": 90,
           "tool_choice": {"type": "function", "function": {"name": t}}} for t in "fg"),
    ),
    "FunctionName.name": (
        CHAT,
        *({"tools": [tool(), tool(name="g")], "max_tokens": 90,
           "tool_choice": {"type": "function", "function": {"name": t}}} for t in "fg"),
    ),
    "ToolMessage.name": (CHAT, *({"messages": [*called()[:2], answered(name=t)]} for t in "ab")),
    "AllowedToolsChoice.allowed_tools": (CHAT, *(allowed(name=t) for t in "fg")),
    "AllowedFunctions.mode": (CHAT, *(allowed(mode=t) for t in ("auto", "required"))),
    "AllowedFunctions.tools": (CHAT, *(allowed(name=t) for t in "fg")),
    # Responses.
    "InputText.text": (RESPONSES, *({"input": [user([{"type": "input_text", "text": t}])]} for t in "ab")),
    "AssistantText.text": (
        RESPONSES,
        *({"input": [{"role": "assistant", "content": [{"type": "output_text", "text": t}]}, user("Hi")]}
          for t in "ab"),
    ),
    "InputMessage.role": (
        RESPONSES, *({"input": [{"role": r, "content": "a"}, user("Hi")]} for r in ("user", "system"))
    ),
    "InputMessage.content": (RESPONSES, *({"input": [user(t)]} for t in "ab")),
    "InputCall.call_id": (RESPONSES, *(
        {"input": [{"type": "function_call", "call_id": t, "name": "f", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": t, "output": "1"}, user("Hi")]} for t in "ab")),
    "InputCall.name": (RESPONSES, *(
        {"input": [{"type": "function_call", "call_id": "a", "name": t, "arguments": "{}"},
                   {"type": "function_call_output", "call_id": "a", "output": "1"}, user("Hi")]} for t in "ab")),
    "InputCall.arguments": (RESPONSES, *(
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": t},
                   {"type": "function_call_output", "call_id": "a", "output": "1"}, user("Hi")]}
        for t in ("{}", '{"a": 1}'))),
    "InputCallOutput.output": (RESPONSES, *(
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": "a", "output": t}, user("Hi")]} for t in "ab")),
    "InputCallOutput.call_id": (RESPONSES, *(
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": t, "output": "1"}, user("Hi")]} for t in "ab")),
    "FunctionTool.name": (RESPONSES, *({"tools": [{"type": "function", "name": t}]} for t in "ab")),
    "FunctionTool.description": (RESPONSES, *({"tools": [flat(description=t)]} for t in "ab")),
    "FunctionTool.parameters": (RESPONSES, *({"tools": [flat(parameters=s)]} for s in (SCHEMA, OTHER_SCHEMA))),
    "FunctionChoice.name": (
        RESPONSES,
        *({"tools": [flat(), {"type": "function", "name": "g"}], "max_output_tokens": 90,
           "tool_choice": {"type": "function", "name": t}} for t in "fg"),
    ),
    "AllowedTools.mode": (
        RESPONSES,
        *({"tools": [flat()], "max_output_tokens": 90,
           "tool_choice": {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "f"}]}}
          for mode in ("auto", "required")),
    ),
    "AllowedTools.tools": (
        RESPONSES,
        *({"tools": [flat(), {"type": "function", "name": "g"}], "max_output_tokens": 90,
           "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": t}]}}
          for t in "fg"),
    ),
    "SchemaFormat.name": (
        RESPONSES, *({"text": {"format": {"type": "json_schema", "name": t, "schema": SCHEMA}}} for t in "ab")
    ),
    "SchemaFormat.json_schema": (
        RESPONSES,
        *({"text": {"format": {"type": "json_schema", "name": "x", "schema": s}}} for s in (SCHEMA, OTHER_SCHEMA)),
    ),
    "TextOptions.format": (RESPONSES, *({"text": {"format": {"type": t}}} for t in ("text", "json_object"))),
    # Messages.
    "TextBlock.text": (MESSAGES, *({"messages": [user([{"type": "text", "text": t}])]} for t in "ab")),
    "ToolUseBlock.id": (COUNT, *({"messages": [
        user("Hi"), {"role": "assistant", "content": [{"type": "tool_use", "id": t, "name": "f", "input": {}}]},
        user([{"type": "tool_result", "tool_use_id": t, "content": "4"}])]} for t in ("c1", "longer"))),
    "ToolUseBlock.name": (COUNT, *({"messages": [
        user("Hi"), {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": t, "input": {}}]},
        user([{"type": "tool_result", "tool_use_id": "c1", "content": "4"}])]} for t in ("f", "longer"))),
    "ToolUseBlock.input": (COUNT, *({"messages": [
        user("Hi"), {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": i}]},
        user([{"type": "tool_result", "tool_use_id": "c1", "content": "4"}])]} for i in ({}, {"a": 1}))),
    "ToolResultBlock.tool_use_id": (COUNT, {"messages": used()}, {"messages": used(tool_use_id="other")}),
    "ToolResultBlock.content": (COUNT, {"messages": used()}, {"messages": used(content="longer")}),
    "ToolResultBlock.is_error": (COUNT, {"messages": used()}, {"messages": used(is_error=True)}),
    "UserTurn.content": (COUNT, *({"messages": [user(t)]} for t in ("a", "bb"))),
    "AssistantTurn.content": (
        COUNT, *({"messages": [user("a"), {"role": "assistant", "content": t}]} for t in ("a", "bb"))
    ),
    "SystemTurn.content": (
        COUNT, *({"messages": [user("a"), {"role": "system", "content": t}, user("a")]} for t in ("a", "bb"))
    ),
    "CustomTool.name": (COUNT, *({"tools": [custom(name=t)]} for t in ("f", "longer"))),
    "CustomTool.description": (COUNT, *({"tools": [custom(description=t)]} for t in ("f", "longer"))),
    "CustomTool.input_schema": (COUNT, *({"tools": [custom(input_schema=s)]} for s in ({"type": "object"}, SCHEMA))),
    "ToolChoiceTool.name": (
        MESSAGES,
        *({"tools": [custom(), custom(name="g")], "max_tokens": 90, "tool_choice": {"type": "tool", "name": t}}
          for t in "fg"),
    ),
    "ToolChoiceAny.type": (
        MESSAGES, *({"tools": [custom(input_schema=SCHEMA)], "max_tokens": 900, "seed": 1, "tool_choice": {"type": t}}
                    for t in ("auto", "any")),
    ),
    "ToolChoiceAny.disable_parallel_tool_use": (
        MESSAGES, *({"tools": [custom(input_schema=SCHEMA)], "max_tokens": 900, "seed": 1, "tool_choice":
                     {"type": "any", "disable_parallel_tool_use": one}} for one in (False, True)),
    ),
    "OutputConfig.format": (
        MESSAGES, {"max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {}
    ),
    "OutputSchema.json_schema": (
        MESSAGES,
        *({"max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": s}}}
          for s in (SCHEMA, OTHER_SCHEMA)),
    ),
}  # fmt: skip

ELSEWHERE = {
    "priority": "test_limits.py",
    "cache_salt": "test_limits.py",
    f"{RESPONSES} store": "test_openai_client.py",
    f"{RESPONSES} previous_response_id": "test_openai_client.py",
    "ItemReference.id": "a test of the responses",
    "ToolChoiceTool.disable_parallel_tool_use": "the choice is one call anyway",
}
"""Effects that two answers alone do not show."""
