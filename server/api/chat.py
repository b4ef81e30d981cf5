"""The chat completions endpoint."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import Response

from ...engine.client.output_processor import RequestOutput
from ...engine.errors import RequestError
from ...engine.messages import MAX_LOGPROBS
from ..chat.conversation import Conversation, ToolChoice
from ..chat.parts import Part, Thought
from ..chat.served_model import ServedModel
from ..chat.turn import Turn, prepare_turn
from ..generation.generation import Choice, Generation
from ..generation.streaming import Chunks, EventStream, join_fields, show_details
from ..generation.token_details import ShownLogprobs, show_prompt_logprobs
from ..http.body import off_loop_if_large
from ..http.errors import Items, JsonResponse, PiecewiseResponse, encode_json
from ..http.middleware import RequestContext
from . import reading
from .fields import ChoiceDetails, GenerationRequest, PromptLogprob, TokenLogprob, Usage
from .types import MAX_TOKENS, MAX_TOOLS, StrictModel, ToolName


class FunctionName(StrictModel):
    name: ToolName


class NamedToolChoice(StrictModel):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    """Some of the tools, and whether the model must call one of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(StrictModel):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


NamedTools = Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")]
WireToolChoice = Literal["none", "auto", "required"] | NamedTools


class ChatCompletionRequest(GenerationRequest, reading.TemplateOptions):
    """Body of `POST /v1/chat/completions`."""

    messages: reading.Messages
    tool_choice: WireToolChoice | None = Field(None, description="auto if there are tools, else none.")
    parallel_tool_calls: bool | None = Field(None, description="If false, at most one call.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Takes precedence over max_tokens."
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The rest of the context by default.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs.")


class ChatLogprobs(StrictModel):
    """Log-probabilities of an answer's tokens, before penalties and temperature."""

    content: list[TokenLogprob]


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(StrictModel):
    role: Literal["assistant"]
    content: str | None = Field(description="Null if there are only calls or reasoning.")
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[reading.ToolCall] | None = None


class ChatChoice(ChoiceDetails):
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(StrictModel):
    """Response body of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class FunctionDelta(StrictModel):
    """A piece of a call's function: the name comes once, the arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCallDelta(StrictModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(StrictModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ChoiceDetails):
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(StrictModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


async def create_chat_completion(context: RequestContext, body: ChatCompletionRequest, model: ServedModel) -> Response:
    """Answer a chat in one response or as a stream; a refused request gets a plain error response."""
    turn = await prepare_turn(await off_loop_if_large(read_conversation, body, model), model)
    generation = reading.start_generation(context, body, model, [turn.prompt], turn.params, "messages")
    head = {"id": f"chatcmpl-{context.request_id}", "created": int(time.time()), "model": body.model}
    if body.stream:
        head["object"] = "chat.completion.chunk"
        chunks = ChatChunks(head, generation, body, model, turn)
        return EventStream(generation, chunks, model.flags.sse_keep_alive_interval)
    await generation.collect()

    def answer() -> Response:
        choices = [_choice_json(index, choice, body, turn, model) for index, choice in enumerate(generation.choices)]
        content = head | {"object": "chat.completion", "choices": choices, "usage": generation.usage()}
        if body.return_token_ids:
            content["prompt_token_ids"] = turn.prompt
        if body.prompt_logprobs is not None:
            positions = generation.choices[0].prompt_logprobs
            content["prompt_logprobs"] = Items(show_prompt_logprobs(turn.prompt, positions, model.tokenizer))
        return PiecewiseResponse(content) if generation.is_large else JsonResponse(content)

    # Encoding the log-probabilities of a long prompt takes long, so it runs in a thread.
    small = body.prompt_logprobs is None or generation.is_large
    return answer() if small else await asyncio.to_thread(answer)


def read_conversation(body: ChatCompletionRequest, model: ServedModel) -> Conversation:
    """Return the conversation that a request asks for; raises `RequestError`."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return reading.read_chat(
        body.messages,
        body,
        sampling={**reading.read_sampling(body, model), "logprobs": logprobs},
        max_tokens=body.max_completion_tokens or body.max_tokens,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        answer_format=reading.read_response_format(body),
        keep_tokens=body.truncate_prompt_tokens,
    )


def _tool_choice(choice: WireToolChoice | None) -> ToolChoice:
    match choice:
        case NamedToolChoice():
            return ToolChoice("named", (choice.function.name,))
        case AllowedToolsChoice():
            names = tuple(tool.function.name for tool in choice.allowed_tools.tools)
            return ToolChoice(choice.allowed_tools.mode, names)
        case _:
            return ToolChoice(choice or "auto")


def _choice_json(
    index: int, choice: Choice, body: ChatCompletionRequest, turn: Turn, model: ServedModel
) -> dict[str, Any]:
    """Return one choice of a response that is not streamed."""
    read = turn.read_whole(choice)
    message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
    if read.reasoning:
        message |= {"reasoning_content": read.reasoning, "reasoning": read.reasoning}
    if read.calls:
        message["tool_calls"] = [call.to_openai() for call in read.calls]
    reason = read.finish_reason if choice.finish_reason == "stop" else choice.finish_reason
    entry: dict[str, Any] = {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
    if body.logprobs:
        writer = ShownLogprobs(model.tokenizer, turn.params.skip_special_tokens)
        entry["logprobs"] = {"content": Items(writer.whole(choice.logprobs, choice.text))}
    return entry | show_details(choice, body, model.tokenizer)


class ChatChunks(Chunks):
    """Writes chat completion chunks."""

    content_field, empty = b"delta", b"{}"

    def __init__(
        self, head: dict[str, Any], generation: Generation, body: ChatCompletionRequest, model: ServedModel, turn: Turn
    ) -> None:
        super().__init__(head, generation, model.tokenizer, body)
        self._turn = turn
        self._readers = [turn.reader() for _ in self.choices]
        choices = self.choices if self.with_logprobs else []
        self._logprobs = [ShownLogprobs(model.tokenizer, turn.params.skip_special_tokens) for _ in choices]
        self._prompt_due = body.prompt_logprobs is not None

    def opening(self) -> bytes:
        """Return the assistant's role for every choice; the content is null if only calls can follow."""
        prompt = self.choices[0].prompt_token_ids
        ids = join_fields({"prompt_token_ids": prompt} if self.body.return_token_ids else {})
        role = b'{"role":"assistant","content":%s}' % (b"null" if self._turn.must_call else b'""')
        return b"".join(self.chunk(index, role, chunk_fields=ids) for index in range(len(self.choices)))

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """Return chunks for new text."""
        deltas = _deltas(self._turn.read(self._readers[index], output)) or ([self.empty] if self.shows_tokens else [])
        if not deltas:
            return b""
        shown = _logprobs(self._logprobs[index].add(output.logprobs, output.text) if self.with_logprobs else [])
        details, prompt = self.details(output), self._about_prompt(index)
        first = self.chunk(index, deltas[0], logprobs=shown, choice_fields=details, chunk_fields=prompt)
        return first + b"".join(self.chunk(index, delta) for delta in deltas[1:])

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return chunks for the text that the reader held back and for the finish reason."""
        prompt, reader = self._about_prompt(index), self._readers[index]
        cut = self._turn.cut_off(output.finish_reason, output.stop_reason)
        held = b"".join(self.chunk(index, delta) for delta in _deltas(reader.finish(cut)))
        if self.with_logprobs and (hidden := self._logprobs[index].finish()):
            held += self.chunk(index, self.empty, logprobs=_logprobs(hidden))
        reason = reader.finish_reason if output.finish_reason == "stop" else output.finish_reason
        return held + self.last(index, reason, output.stop_reason, prompt)

    def _about_prompt(self, index: int) -> bytes:
        """Return the prompt's log-probabilities, once: they are complete when the first choice has a token."""
        if not self._prompt_due or index:
            return b""
        self._prompt_due = False
        choice = self.choices[0]
        shown = show_prompt_logprobs(choice.prompt_token_ids, choice.prompt_logprobs, self.tokenizer)
        return join_fields({"prompt_logprobs": Items(shown)})


def _logprobs(entries: list[dict[str, Any]]) -> bytes:
    return encode_json({"content": entries}) if entries else b"null"


def _deltas(parts: list[Part]) -> list[bytes]:
    """Return one delta per part: clients concatenate deltas across chunks only, so each part gets its own chunk."""
    deltas = []
    for part in parts:
        if isinstance(part, str):
            deltas.append(b'{"content":%s}' % encode_json(part))
            continue
        if isinstance(part, Thought):
            text = encode_json(part.text)
            deltas.append(b'{"reasoning_content":%s,"reasoning":%s}' % (text, text))
            continue
        call: dict[str, Any] = {"index": part.index, "function": {"arguments": part.arguments}}
        if part.id is not None:
            call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
        deltas.append(b'{"tool_calls":[%s]}' % encode_json(call))
    return deltas
