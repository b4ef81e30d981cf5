"""What an answer of a model that reasons has in it, read from each API, whole and streamed."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from support.dialogues import TOOL, WEATHER, Form
from support.serving import PATIENCE, ServerProcess

from pyllm.model.tokenizer import Tokenizer

Json = dict[str, Any]
GREEDY: Json = {"temperature": 0}


@dataclass
class Said:
    """One answer; `whole` is what came, if it came in one piece."""

    reasoning: str = ""
    content: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None  # in the words of chats
    usage: Json = field(default_factory=dict, compare=False)  # what was cached differs
    whole: Json = field(default_factory=dict, compare=False)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


@dataclass
class Reasoner:
    """A served model that reasons."""

    form: Form
    tokenizer: Tokenizer
    server: ServerProcess

    def run(self, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
        """Await all at once."""

        async def gather() -> list[Any]:
            return await asyncio.gather(*calls)

        return asyncio.run(gather())

    def all_apis(self, question: str, **fields: Any) -> list[Said]:
        """A question by itself, asked in each API, whole and streamed."""
        return self.run(self.chat([user(question)], **fields), self.respond(question), self.message([user(question)]))

    async def post(self, path: str, body: Json) -> list[Json]:
        """The answer, or the events of a stream."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE) as client:
            answer = await client.post(path, json=GREEDY | body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            return [answer.json() | {"ignored": answer.headers.get("x-pyllm-ignored")}]
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    async def chat(self, messages: Sequence[Json], **fields: Any) -> Said:
        """The first choice of a chat."""
        return (await self.choices(messages, **fields))[0]

    async def choices(self, messages: Sequence[Json], **fields: Any) -> list[Said]:
        """All choices of a chat, which are the same when they are streamed."""
        path, body = "/v1/chat/completions", {"messages": messages} | fields
        options = {"stream": True, "stream_options": {"include_usage": True}}
        (whole,), events = await asyncio.gather(self.post(path, body), self.post(path, body | options))
        said = []
        for choice in whole["choices"]:
            message = choice["message"]
            assert message.get("reasoning") == message.get("reasoning_content")
            calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            reasoning = message.get("reasoning", "")
            said.append(Said(reasoning, message["content"], calls, choice["finish_reason"], whole["usage"], whole))
            check_same(streamed_chat(events, choice["index"]), said[-1])
        return said

    async def respond(self, items: str | Sequence[Json], **fields: Any) -> Said:
        """A response, which is the same when it is streamed."""
        path, body = "/v1/responses", {"input": items} | fields
        (whole,), events = await asyncio.gather(self.post(path, body), self.post(path, body | {"stream": True}))
        said = read_response(whole)
        check_same(read_response(events[-1]["response"]), said)
        deltas = {kind: "".join(e["delta"] for e in events if e["type"] == f"response.{kind}.delta")
                  for kind in ("reasoning_text", "reasoning_summary_text", "output_text")}  # fmt: skip
        assert deltas["reasoning_text"] + deltas["reasoning_summary_text"] == said.reasoning
        assert deltas["output_text"] == (said.content or "")
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        return said

    async def message(self, messages: Sequence[Json], **fields: Any) -> Said:
        """A message, which is the same when it is streamed."""
        path, body = "/v1/messages", {"model": "reasoner", "max_tokens": 1000, "messages": messages} | fields
        (whole,), events = await asyncio.gather(self.post(path, body), self.post(path, body | {"stream": True}))
        said = read_message(whole)
        check_same(read_message(streamed_message(events)), said)
        return said

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def tokens_of(self, thought: str) -> int:
        """How many tokens of reasoning a thought is: marks of plain text count, except for the opening one."""
        return self.count(f"\n{thought}\n</think>" if self.form.name == "tags" else thought)

    def tools(self, api: str = "chat") -> list[Json]:
        """The tool in the words of an API."""
        if api == "chat":
            return [TOOL]
        schema = WEATHER["parameters"]
        if api == "responses":
            return [{"type": "function", **WEATHER}]
        return [{"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": schema}]


def check_same(streamed: Said, whole: Said) -> None:
    """A stream must add up to what is answered in one piece."""
    assert streamed == whole
    assert counts(streamed) == counts(whole)


def streamed_chat(events: Iterable[Json], index: int) -> Said:
    """Put a streamed choice together."""
    said, calls = Said(), list[list[str]]()
    for event in events:
        said.usage = event.get("usage") or said.usage
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            said.reasoning += delta.get("reasoning") or ""
            said.content = (said.content or "") + (delta.get("content") or "") or None
            for call in delta.get("tool_calls", ()):
                if call.get("id"):
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
            said.finish = choice["finish_reason"] or said.finish
    said.calls = [(name, arguments) for name, arguments in calls]
    return said


def read_response(whole: Json) -> Said:
    said = Said(usage=whole["usage"], whole=whole)
    for item in whole["output"]:
        match item["type"]:
            case "reasoning":
                said.reasoning += "".join(part["text"] for part in item["content"] + item["summary"])
            case "message":
                said.content = "".join(part["text"] for part in item["content"])
            case "function_call":
                said.calls.append((item["name"], item["arguments"]))
    said.finish = "length" if whole["status"] == "incomplete" else "tool_calls" if said.calls else "stop"
    return said


def read_message(whole: Json) -> Said:
    said = Said(usage=whole["usage"], whole=whole)
    for block in whole["content"]:
        match block["type"]:
            case "thinking":
                assert block["signature"]
                said.reasoning += block["thinking"]
            case "text":
                said.content = (said.content or "") + block["text"]
            case "tool_use":
                said.calls.append((block["name"], json.dumps(block["input"])))
    reasons = {"max_tokens": "length", "tool_use": "tool_calls", "end_turn": "stop", "stop_sequence": "stop"}
    said.finish = reasons[whole["stop_reason"]]
    return said


def streamed_message(events: Sequence[Json]) -> Json:
    """Put a streamed message together."""
    whole: Json = events[0]["message"]
    for event in events:
        if event["type"] == "content_block_start":
            whole["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = whole["content"][event["index"]], event["delta"]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            if "partial_json" in delta:
                block["json"] = block.get("json", "") + delta["partial_json"]
        elif event["type"] == "message_delta":
            whole |= event["delta"] | {"usage": event["usage"]}
    for block in whole["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json", "{}"))
    return whole


def counts(said: Said) -> tuple[int, int, int | None]:
    """Tokens of the prompt and of the answer, and those of reasoning, from any API's usage."""
    usage = said.usage
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0)) + usage.get("cache_read_input_tokens", 0)
    details = usage.get("completion_tokens_details", usage.get("output_tokens_details", {}))
    return prompt, usage.get("completion_tokens", usage.get("output_tokens", 0)), details.get("reasoning_tokens")


def alternate(*streams: Iterable[str]) -> list[list[str]]:
    """The lines of several streams, read in turns."""
    read: list[list[str]] = [[] for _ in streams]
    for lines in itertools.zip_longest(*streams):
        for found, line in zip(read, lines, strict=True):
            if line:
                found.append(line)
    return read
