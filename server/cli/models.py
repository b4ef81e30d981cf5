"""The two models that `pyllm generate` and `pyllm chat` can ask: an engine of their own, or a running server."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...engine.errors import EngineDeadError, RequestError
from ..chat.conversation import AnswerFormat, Conversation, Message
from ..chat.served_model import ServedModel
from ..chat.structured_output import json_schema_grammar
from ..chat.turn import prepare_prompt, sampling_params
from .load_client import Client, StatusError, Target

TOO_LONG = "context_length_exceeded"
MAX_LINE_BYTES = 32 << 20  # of one event of a server
Asked = str | Sequence[Message]  # a text to continue, or a chat to answer


@dataclass(slots=True)
class Options:
    """How answers are generated; None means the model's default."""

    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_k, top_p, repetition_penalty
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None


class Model(Protocol):
    """Answers one question at a time."""

    name: str

    @property
    def is_alive(self) -> bool:
        """Whether it can answer more questions."""

    def answer(self, asked: Asked, options: Options) -> AsyncGenerator[str, None]:
        """Yield the text as it is generated; closing the iterator stops that.

        Raises `RequestError`, with the code `TOO_LONG` for a chat that leaves too little of the context for an answer,
        `EngineDeadError`, or `OSError` for a server that cannot be reached.
        """

    async def close(self) -> None:
        """End it."""


class EngineModel:
    """An engine in a process of this command."""

    def __init__(self, model: ServedModel) -> None:
        self.name = model.names[0]
        self._model = model

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs."""
        return self._model.engine.is_alive

    async def answer(self, asked: Asked, options: Options) -> AsyncGenerator[str, None]:
        """See `Model.answer`."""
        model = self._model
        grammar = None if options.schema is None else json_schema_grammar(options.schema)
        sampling: dict[str, Any] = {**options.sampling, **({"stop": options.stop} if options.stop else {})}
        ends: tuple[str, ...] = ()
        if isinstance(asked, str):
            prompt = list(await model.encode(asked, "prompt", add_bos=False))
            if grammar is not None:
                await model.engine.check_grammar(grammar)
        else:
            form = AnswerFormat(grammar, "--json-schema", "--json-schema") if grammar else None
            ids, _, grammar = await prepare_prompt(Conversation(messages=asked, answer_format=form), model)
            prompt, limit = list(ids), model.engine.info.config.max_model_len
            if len(prompt) + _room(options.max_tokens, limit) > limit and has_older(asked):
                raise RequestError("The chat leaves too little of the context for an answer.", code=TOO_LONG)
            ends = model.template.stop_strings if grammar is None else ()
        params = sampling_params(sampling, model, options.max_tokens, grammar, ends)
        stream = model.engine.submit(f"terminal-{uuid.uuid4().hex}", prompt, params)
        try:
            async for output in stream:
                if output.finish_reason == "error":
                    raise EngineDeadError(output.error or "The engine failed.")
                yield output.text
        finally:
            stream.abort()

    async def close(self) -> None:
        """End the engine."""
        await self._model.engine.shutdown()


class ServerModel:
    """A model of a running server with an API like OpenAI's."""

    is_alive = True

    def __init__(self, target: Target, limit: int | None) -> None:
        self.name = target.model
        self._client = Client(target)
        self._limit = limit  # tokens of the context, if the server reports them
        self._tokens_per_character = 0.0  # of the last chat

    @classmethod
    async def connect(cls, base_url: str, name: str | None, api_key: str | None) -> ServerModel:
        """Ask the server for its models; choose the one named `name`, or the first. Raises `LoadError`, `OSError`."""
        client = Client(Target(base_url, "", api_key))
        try:
            cards = json.loads(await client.get("/models"))["data"]
            card = next((card for card in cards if card["id"] == name), {"id": name} if name else cards[0])
            limit = card.get("max_model_len")
            return cls(Target(base_url, str(card["id"]), api_key), limit if isinstance(limit, int) else None)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise OSError("it does not list its models: pass --model NAME") from None

    async def answer(self, asked: Asked, options: Options) -> AsyncGenerator[str, None]:
        """See `Model.answer`."""
        body: dict[str, Any] = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        body |= options.sampling | ({"stop": list(options.stop)} if options.stop else {})
        body |= {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
        if options.schema is not None:
            schema = {"name": "answer", "schema": options.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if isinstance(asked, str):
            path, body["prompt"] = "/completions", asked
        else:
            path, body["messages"] = "/chat/completions", [{"role": m.role, "content": m.text} for m in asked]
            self._check_room(asked, options)
        size = len(asked) if isinstance(asked, str) else sum(len(message.text or "") for message in asked)
        try:
            async with contextlib.aclosing(self._events(path, json.dumps(body).encode())) as events:
                async for event in events:
                    for choice in event.get("choices") or ():
                        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                        size += len(text)
                        yield text
                    if usage := event.get("usage"):
                        self._tokens_per_character = (usage.get("total_tokens") or 0) / max(size, 1)
        except StatusError as error:
            raise _refusal(error) from None

    def _check_room(self, asked: Sequence[Message], options: Options) -> None:
        """Raise `RequestError` for a chat that leaves too little room, judging by the tokens of the chat before."""
        size = self._tokens_per_character * sum(len(message.text or "") for message in asked)
        if self._limit is not None and has_older(asked) and size + _room(options.max_tokens, self._limit) > self._limit:
            raise RequestError("The chat leaves too little of the context for an answer.", code=TOO_LONG)

    async def _events(self, path: str, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a stream; raises `StatusError`, `OSError` or `RequestError`."""
        rest = b""
        async with contextlib.aclosing(self._client.stream(path, body)) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > MAX_LINE_BYTES:
                    raise OSError("its answer is not a stream of events")
                for line in lines:
                    if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                        continue
                    try:
                        event = json.loads(data)
                    except ValueError:
                        raise OSError(f"one of its events cannot be parsed: {data[:100]!r}") from None
                    if isinstance(event, dict) and event.get("error"):
                        raise RequestError(_message(event))
                    if isinstance(event, dict):
                        yield event

    async def close(self) -> None:
        """Close the connection."""
        self._client.close()


def has_older(messages: Sequence[Message]) -> bool:
    """Return whether there are messages before the last one that can be left out."""
    return sum(message.role != "system" for message in messages) > 1


def _room(max_tokens: int | None, limit: int) -> int:
    """Return how many tokens of the context are kept for an answer."""
    return max_tokens or limit // 4


def _refusal(error: StatusError) -> RequestError:
    """Return the server's error message."""
    try:
        body = json.loads(error.body)
        message, code = _message(body), body.get("error", body).get("code")
    except (ValueError, AttributeError):
        message, code = error.body[:300].decode(errors="replace").strip(), None
    if code != TOO_LONG and error.status == 400 and "context" in message and "tokens" in message:  # as vLLM words it
        code = TOO_LONG
    return RequestError(message or f"The server answered with status {error.status}.", code=code)


def _message(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message") if isinstance(error, dict) else error)
