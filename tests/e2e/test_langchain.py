"""langchain-openai, which many applications are built with."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from support.hostile import same
from support.serving import PATIENCE, ServerProcess


class Person(BaseModel):
    """A person."""

    name: Literal["Ann", "Bob"]
    age: int = Field(ge=0, le=99)


@tool
def add(a: Literal[1, 2, 3], b: Literal[4, 5]) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def connection(server: ServerProcess) -> dict[str, Any]:
    return {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": PATIENCE}


@pytest.fixture(scope="module")
def llm(connection: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(**connection, temperature=1, seed=5, max_tokens=400, stream_usage=True)


def short(llm: ChatOpenAI) -> Any:
    return llm.bind(max_tokens=12)


def test_a_chat_is_answered_with_its_token_counts(llm: ChatOpenAI) -> None:
    answer = short(llm).invoke([SystemMessage("Be brief."), HumanMessage("Hello")])
    assert isinstance(answer, AIMessage)
    assert answer.content
    counts = answer.usage_metadata
    assert counts is not None
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]
    assert counts["input_tokens"] == len("system: Be brief.\nuser: Hello\nassistant:")
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == "tiny"


def test_a_stream_adds_up_and_ends_with_the_counts(llm: ChatOpenAI) -> None:
    whole = short(llm).invoke("Hello")
    chunks = list(short(llm).stream("Hello"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == whole.content
    for count in ("input_tokens", "output_tokens", "total_tokens"):
        assert total.usage_metadata[count] == whole.usage_metadata[count]


def test_the_asynchronous_calls_say_the_same(llm: ChatOpenAI, connection: dict[str, Any]) -> None:
    async def both() -> tuple[str, str]:
        # langchain's own client is never closed, and would be when its event loop has ended.
        async with openai.DefaultAsyncHttpxClient() as client:
            own = ChatOpenAI(**connection, temperature=1, seed=5, max_tokens=12, http_async_client=client)
            whole = await own.ainvoke("Hello")
            return whole.text, "".join([chunk.text async for chunk in own.astream("Hello")])

    whole, streamed = asyncio.run(both())
    assert whole == streamed == short(llm).invoke("Hello").content


def test_a_batch_is_answered_in_order(llm: ChatOpenAI) -> None:
    texts = ["Hello", "Bonjour", "Hi"]
    assert [answer.content for answer in short(llm).batch(texts)] == [short(llm).invoke(text).content for text in texts]


@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_bound_tool_is_called_and_its_result_goes_back(llm: ChatOpenAI, choice: str) -> None:
    bound = llm.bind_tools([add], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("1 + 4?")
    (call,) = answer.tool_calls
    assert call["name"] == "add"
    assert answer.invalid_tool_calls == []
    result = add.invoke(call)
    assert isinstance(result, ToolMessage)
    assert int(result.content) == call["args"]["a"] + call["args"]["b"]
    assert isinstance(short(llm).invoke([HumanMessage("1 + 4?"), answer, result]), AIMessage)


def test_a_streamed_tool_call_adds_up(llm: ChatOpenAI) -> None:
    bound = llm.bind_tools([add], tool_choice="required", parallel_tool_calls=False)
    chunks = list(bound.stream("1 + 4?"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert [(c["name"], c["args"]) for c in total.tool_calls] == [
        (c["name"], c["args"]) for c in bound.invoke("1 + 4?").tool_calls
    ]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [True, None])
def test_structured_output_is_an_object_of_the_asked_type(llm: ChatOpenAI, method: Any, strict: bool | None) -> None:
    found = llm.with_structured_output(Person, method=method, strict=strict, include_raw=True).invoke("Who?")
    assert isinstance(found["parsed"], Person), found
    assert found["parsing_error"] is None


def test_options_reach_the_model(llm: ChatOpenAI, connection: dict[str, Any]) -> None:
    body = {"ignore_eos": True, "allowed_token_ids": [70, 71], "return_token_ids": True}
    held = ChatOpenAI(**connection, temperature=1, max_tokens=9, logprobs=True, top_logprobs=2, extra_body=body)
    answer = held.invoke("Hello")
    assert len(answer.response_metadata["logprobs"]["content"]) == 9
    assert len(set(answer.content)) <= 2
    stopped = ChatOpenAI(**connection, temperature=1, max_tokens=9, stop=[answer.content[0]], extra_body=body)
    assert answer.content[0] not in stopped.invoke("Hello").content


def test_a_refusal_raises_the_clients_error(connection: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        ChatOpenAI(**connection).invoke("Hello " * 10**5)
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(**connection | {"model": "gpt-4o"}).invoke("Hello")


def test_the_responses_api_answers_too(connection: dict[str, Any]) -> None:
    llm = ChatOpenAI(**connection, temperature=0, max_tokens=16, use_responses_api=True)
    answer = llm.invoke("Hello")
    assert answer.text
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in llm.stream("Hello")) == answer.text


def test_documents_and_a_query_are_embedded(connection: dict[str, Any]) -> None:
    options = connection | {"check_embedding_ctx_length": False}
    embeddings = OpenAIEmbeddings(**options)
    red, green = embeddings.embed_documents(["red", "green"])
    assert math.hypot(*red) == pytest.approx(1, abs=1e-4)
    assert red != green
    assert embeddings.embed_query("red") == same(red)

    async def query() -> list[float]:
        async with openai.DefaultAsyncHttpxClient() as client:
            return await OpenAIEmbeddings(**options, http_async_client=client).aembed_query("red")

    assert asyncio.run(query()) == same(red)
