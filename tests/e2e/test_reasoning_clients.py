"""The clients that the test environment has show reasoning apart from the answer, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from support.dialogues import SUM, weather
from support.reasoning_client import Reasoner
from support.serving import PATIENCE

PARIS = weather()
RESULT = json.dumps({"temperature": 7, "sky": "cloudy"})
MODEL = "reasoner"


@pytest.fixture
def openai(reasoner: Reasoner) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{reasoner.server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def claude(reasoner: Reasoner) -> Iterator[Anthropic]:
    with Anthropic(base_url=reasoner.server.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def langchain(reasoner: Reasoner) -> Iterator[Callable[..., ChatOpenAI]]:
    """Makes models whose connections are closed, which its own are not."""
    with httpx.Client(timeout=PATIENCE) as client:
        yield partial(ChatOpenAI, model=MODEL, base_url=f"{reasoner.server.url}/v1", api_key="none", max_retries=0,
                      temperature=0, http_client=client)  # type: ignore[arg-type]  # fmt: skip


def test_openai_chats(reasoner: Reasoner, openai: OpenAI) -> None:
    def ask(messages: Sequence[Any], **fields: Any) -> Any:
        """The message, which a stream must add up to."""
        options = {"model": MODEL, "messages": messages, "temperature": 0, "tools": reasoner.tools()} | fields
        whole = openai.chat.completions.create(**options).choices[0].message
        with openai.chat.completions.stream(**options) as stream:
            thoughts = [e.chunk.choices[0].delta.model_dump().get("reasoning_content") for e in stream
                        if e.type == "chunk" and e.chunk.choices]  # fmt: skip
            last = stream.get_final_completion().choices[0].message
        assert "".join(filter(None, thoughts)) == (whole.model_extra or {}).get("reasoning_content", "")
        assert (last.content or None) == whole.content
        assert [c.function.arguments for c in last.tool_calls or ()] == [
            c.function.arguments for c in whole.tool_calls or ()
        ]
        return whole

    plain = ask([{"role": "user", "content": SUM.question}])
    assert (plain.reasoning_content, plain.reasoning, plain.content) == (SUM.thought, SUM.thought, SUM.answer)
    question = {"role": "user", "content": PARIS.question}
    called = ask([question])
    assert (called.reasoning_content, called.content) == (PARIS.thought, None)
    (call,) = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    answer = ask([question, called.model_dump(exclude_none=True), result])
    assert (answer.reasoning_content, answer.content) == (PARIS.after, PARIS.answer)


@pytest.mark.parametrize("summary", ["auto", None])
def test_openai_responses(reasoner: Reasoner, openai: OpenAI, summary: Any) -> None:
    def ask(items: Any) -> Any:
        """The response, which a stream must add up to."""
        options = {"model": MODEL, "input": items, "temperature": 0, "tools": reasoner.tools("responses")}
        options |= {"reasoning": {"summary": summary}} if summary else {}
        whole = openai.responses.create(**options)
        with openai.responses.stream(**options) as stream:
            kind = "response.reasoning_summary_text.delta" if summary else "response.reasoning_text.delta"
            thoughts = [event.delta for event in stream if event.type == kind]
            last = stream.get_final_response()
        assert "".join(thoughts) == thought(last) == thought(whole)
        assert last.output_text == whole.output_text
        return whole

    def thought(response: Any) -> str:
        (item,) = (item for item in response.output if item.type == "reasoning")
        return "".join(part.text for part in [*item.summary, *item.content])

    plain = ask(SUM.question)
    assert (thought(plain), plain.output_text) == (SUM.thought, SUM.answer)
    assert plain.usage.output_tokens_details.reasoning_tokens == reasoner.tokens_of(SUM.thought or "")
    called = ask(PARIS.question)
    assert (thought(called), called.output_text) == (PARIS.thought, "")
    result = {"type": "function_call_output", "call_id": called.output[-1].call_id, "output": RESULT}
    answer = ask([{"role": "user", "content": PARIS.question}, *called.output, result])
    assert (thought(answer), answer.output_text) == (PARIS.after, PARIS.answer)


def test_anthropic_messages(reasoner: Reasoner, claude: Anthropic) -> None:
    def ask(messages: Sequence[Any], **fields: Any) -> list[Any]:
        """The blocks, which a stream must add up to."""
        options = {"model": MODEL, "max_tokens": 500, "messages": messages, "tools": reasoner.tools("messages"),
                   "extra_body": {"temperature": 0}, **fields}  # fmt: skip
        whole = claude.messages.create(**options).content
        with claude.messages.stream(**options) as stream:
            thoughts = [event.thinking for event in stream if event.type == "thinking"]
            last = stream.get_final_message().content
        assert "".join(thoughts) == "".join(block.thinking for block in whole if block.type == "thinking")
        for streamed, block in zip(last, whole, strict=True):
            assert streamed.to_dict() | {"id": None} == block.to_dict() | {"id": None}
        return list(whole)

    thinking, text = ask([{"role": "user", "content": SUM.question}])
    assert (thinking.thinking, text.text) == (SUM.thought, SUM.answer)
    enabled = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    question = {"role": "user", "content": PARIS.question}
    thinking, use = ask([question], **enabled)
    assert (thinking.thinking, use.name, use.input) == (PARIS.thought, "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": RESULT}
    history = [question, {"role": "assistant", "content": [thinking, use]}, {"role": "user", "content": [result]}]
    thinking, text = ask(history, **enabled)
    assert (thinking.thinking, text.text) == (PARIS.after, PARIS.answer)


def test_langchain_by_responses(reasoner: Reasoner, langchain: Callable[..., ChatOpenAI]) -> None:
    """Its chats drop all reasoning; its responses show summaries."""
    options: dict[str, Any] = {"use_responses_api": True, "reasoning": {"summary": "auto"}, "output_version": "v1"}
    llm = langchain(**options).bind_tools(reasoner.tools())

    def ask(messages: Sequence[Any]) -> AIMessage:
        """The message, which a stream must add up to."""
        whole, chunks = llm.invoke(messages), list(llm.stream(messages))
        total = sum(chunks[1:], chunks[0])
        assert thought(total) == thought(whole)
        assert total.text == whole.text
        assert [call["args"] for call in total.tool_calls] == [call["args"] for call in whole.tool_calls]
        return whole

    def thought(message: Any) -> str:
        return "".join(block.get("reasoning", "") for block in message.content_blocks if block["type"] == "reasoning")

    plain = ask([HumanMessage(SUM.question)])
    assert (thought(plain), plain.text) == (SUM.thought, SUM.answer)
    called = ask([HumanMessage(PARIS.question)])
    (call,) = called.tool_calls
    assert (thought(called), called.text, call["args"]) == (PARIS.thought, "", {"city": "Paris"})
    answer = ask([HumanMessage(PARIS.question), called, ToolMessage(RESULT, tool_call_id=call["id"])])
    assert (thought(answer), answer.text) == (PARIS.after, PARIS.answer)


def test_langchain_by_chats(reasoner: Reasoner, langchain: Callable[..., ChatOpenAI]) -> None:
    llm = langchain(stream_usage=True).bind_tools(reasoner.tools())
    plain = llm.invoke(SUM.question)
    assert plain.text == SUM.answer
    assert plain.usage_metadata is not None
    assert plain.usage_metadata["output_token_details"]["reasoning"] == reasoner.tokens_of(SUM.thought or "")
    assert "".join(chunk.text for chunk in llm.stream(SUM.question)) == SUM.answer
    called = llm.invoke(PARIS.question)
    (call,) = called.tool_calls
    result = ToolMessage(RESULT, tool_call_id=call["id"])
    assert llm.invoke([HumanMessage(PARIS.question), called, result]).text == PARIS.answer
