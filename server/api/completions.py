"""The completions endpoint: continues prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field
from starlette.responses import Response

from ...engine.client.output_processor import RequestOutput
from ...engine.errors import RequestError
from ...engine.messages import MAX_LOGPROBS, SamplingParams, TokenLogprobs
from ...model.tokenizer import Tokenizer
from ..chat.served_model import ServedModel
from ..chat.truncation import encode_prompts
from ..chat.turn import sampling_params
from ..generation.generation import MAX_SEQUENCES, Choice, Generation
from ..generation.streaming import Chunks, EventStream, join_fields, show_details
from ..generation.token_details import LegacyLogprobs, show_prompt_logprobs
from ..http.body import off_loop_if_large
from ..http.errors import Items, JsonResponse, PiecewiseResponse, encode_json
from ..http.middleware import RequestContext
from .fields import ChoiceDetails, GenerationRequest, PromptLogprob, Usage
from .reading import read_response_format, read_sampling, start_generation
from .types import MAX_PROMPTS, MAX_TOKENS, StrictModel, Text, TokenIds

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description=f"One or more texts or lists of token ids; prompts times n ≤ {MAX_SEQUENCES}.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Default 16; 0 requires echo.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Takes precedence over max_tokens."
    )
    echo: bool | None = Field(None, description="Put the prompt before the text, and its logprobs before the others.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = Field(None, description="Put the begin-of-sequence token before a text prompt.")


class CompletionLogprobs(StrictModel):
    """Log-probabilities in the older format."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ChoiceDetails):
    """One continuation of a prompt; in a stream, a piece of it."""

    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(StrictModel):
    """Response body of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


async def create_completion(context: RequestContext, body: CompletionRequest, model: ServedModel) -> Response:
    """Continue each prompt in one response or as a stream; a refused request gets a plain error response."""
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    params = await _params(body, model)
    keep, add_bos = body.truncate_prompt_tokens, bool(body.add_special_tokens)
    prompts = await encode_prompts(
        body.prompt, model, "prompt", add_bos=add_bos, keep=keep, max_tokens=params.max_tokens
    )
    generation = start_generation(context, body, model, prompts, params, "prompt")
    head: dict[str, Any] = {"id": f"cmpl-{context.request_id}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": body.model}
    skip_special_tokens = params.skip_special_tokens
    writers = [ChoiceWriter(body, choice, model.tokenizer, skip_special_tokens) for choice in generation.choices]
    if body.stream:
        chunks = CompletionChunks(head, generation, model.tokenizer, body, writers)
        return EventStream(generation, chunks, model.flags.sse_keep_alive_interval)
    await generation.collect()

    def answer() -> Response:
        choices = [writer.whole(index) for index, writer in enumerate(writers)]
        content = head | {"choices": choices, "usage": generation.usage()}
        return PiecewiseResponse(content) if generation.is_large else JsonResponse(content)

    # Encoding the log-probabilities of a long prompt takes long, so it runs in a thread.
    small = params.prompt_logprobs is None or generation.is_large
    return answer() if small else await asyncio.to_thread(answer)


async def _params(body: CompletionRequest, model: ServedModel) -> SamplingParams:
    """Return the sampling parameters; raises `RequestError`."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1 without echo.", param="max_tokens")
    wanted = await off_loop_if_large(read_response_format, body)
    if wanted is not None:
        await model.engine.check_grammar(wanted.grammar, wanted.grammar_field)
    sampling = {**await off_loop_if_large(read_sampling, body, model), "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        sampling["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    grammar = None if wanted is None else wanted.grammar
    return await off_loop_if_large(sampling_params, sampling, model, max_tokens=max_tokens, grammar=grammar)


def _best(positions: Sequence[TokenLogprobs], count: int) -> Iterator[TokenLogprobs]:
    """Yield `positions` with at most `count` candidates each."""
    return (msgspec.structs.replace(position, top=position.top[:count]) for position in positions)


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Join two objects of log-probabilities."""
    return {name: first[name] + second[name] for name in first} if first and second else first or second


class ChoiceWriter:
    """Writes one choice; with echo, the prompt's text and log-probabilities come first."""

    def __init__(
        self, body: CompletionRequest, choice: Choice, tokenizer: Tokenizer, skip_special_tokens: bool
    ) -> None:
        self.prompt_due = bool(body.echo or body.return_token_ids or body.prompt_logprobs is not None)
        self._body = body
        self._choice = choice
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._logprobs = LegacyLogprobs(tokenizer, skip_special_tokens)

    def write(self, text: str, positions: Sequence[TokenLogprobs]) -> tuple[str, dict[str, Any] | None]:
        """Return the next piece of text and its log-probabilities, or None if they were not requested."""
        count, before, echoed = self._body.logprobs, None, ""
        if self.prompt_due and self._body.echo:
            prompt = self._choice.prompt_token_ids
            echoed = self._tokenizer.decode(prompt, self._skip)
            if count is not None:
                before = self._logprobs.write_prompt(prompt, _best(self._choice.prompt_logprobs, count), echoed)
        shown = None if count is None else _joined(before, self._logprobs.write(positions, text))
        return echoed + text, shown

    def hidden(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the last tokens, if they begin after the end of the text."""
        return self._logprobs.finish()

    def prompt_fields(self) -> dict[str, Any]:
        """Return the requested details of the prompt's tokens, once."""
        self.prompt_due = False
        fields: dict[str, Any] = {}
        prompt, count = self._choice.prompt_token_ids, self._body.prompt_logprobs
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = prompt
        if count is not None:
            positions = _best(self._choice.prompt_logprobs, count)
            fields["prompt_logprobs"] = Items(show_prompt_logprobs(prompt, positions, self._tokenizer))
        return fields

    def whole(self, index: int) -> dict[str, Any]:
        """Return the finished choice."""
        text, logprobs = self.write(self._choice.text, self._choice.logprobs)
        logprobs = _joined(logprobs, self.hidden())
        shown = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._choice.finish_reason}
        return shown | show_details(self._choice, self._body, self._tokenizer) | self.prompt_fields()


class CompletionChunks(Chunks):
    """Chunks whose choices have text; the first piece of a choice also carries the details of its prompt."""

    content_field, empty = b"text", b'""'

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        tokenizer: Tokenizer,
        body: CompletionRequest,
        writers: list[ChoiceWriter],
    ) -> None:
        super().__init__(head, generation, tokenizer, body)
        self._writers = writers

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """Return new text with its tokens."""
        writer = self._writers[index]
        text, logprobs = writer.write(output.text, output.logprobs)
        details = self.details(output)
        if writer.prompt_due:
            details += join_fields(writer.prompt_fields())
        return self.chunk(index, encode_json(text), logprobs=encode_json(logprobs), choice_fields=details)

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Return the last chunk of a choice, after the prompt's details if no text came before."""
        before = b""
        if self._writers[index].prompt_due:
            before = self.piece(index, msgspec.structs.replace(output, text="", token_ids=[], logprobs=[], dynamics=[]))
        if (hidden := self._writers[index].hidden()) is not None:
            before += self.chunk(index, self.empty, logprobs=encode_json(hidden))
        return before + super().ending(index, output)
