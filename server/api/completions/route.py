"""Completions: from prompts to their continuations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from ....engine.client.output_processor import RequestOutput
from ....engine.errors import RequestError
from ....engine.messages import SamplingParams, TokenLogprobs
from ....model.tokenizer import Tokenizer
from ...chat.truncation import encode_prompts
from ...generation.generation import Choice, Generation, sampling_params
from ...generation.served_model import ServedModel
from ...generation.streaming import Chunks, EventStream
from ...generation.token_details import LegacyLogprobs, show_details, show_prompt_logprobs
from ...http.context import RequestContext
from ...http.errors import JsonResponse, encode_json
from ...http.offload import off_loop_if_large
from ..fields import read_response_format, read_sampling
from .wire import CompletionRequest

DEFAULT_MAX_TOKENS = 16


async def create_completion(context: RequestContext, body: CompletionRequest, model: ServedModel) -> Response:
    """Continue each prompt, whole or as a stream; every refusal is raised before the answer begins."""
    params = await _params(body, model)
    prompts = await encode_prompts(
        body.prompt, model, add_bos=bool(body.add_special_tokens),
        keep=body.truncate_prompt_tokens, max_tokens=params.max_tokens,
    )  # fmt: skip
    generation = Generation(
        model, context, prompts, [_fitted(params, prompt, body, model) for prompt in prompts],
        field="prompt", n=body.n or 1, priority=body.priority or 0, cache_salt=body.cache_salt,
        streams=bool(body.stream),
    )  # fmt: skip
    head = {
        "id": f"cmpl-{context.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        chunks = CompletionChunks(head, generation, model.tokenizer, body)
        return EventStream(generation, chunks, model.flags.sse_keep_alive_interval)
    await generation.collect()

    def answer() -> Response:
        choices = [
            _whole(index, choice, body, model.tokenizer, params.skip_special_tokens)
            for index, choice in enumerate(generation.choices)
        ]
        return JsonResponse(head | {"choices": choices, "usage": generation.usage()})

    # Candidates for each token of long prompts are many.
    return answer() if params.prompt_logprobs is None else await asyncio.to_thread(answer)


async def _params(body: CompletionRequest, model: ServedModel) -> SamplingParams:
    """What to ask of the engine for a prompt that leaves room enough; raises `RequestError`."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1 without echo.", param="max_tokens")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    wanted = await off_loop_if_large(read_response_format, body)
    if wanted is not None:
        await model.engine.check_grammar(wanted.grammar, wanted.grammar_field)
    sampling = await off_loop_if_large(read_sampling, body, model)
    params = await off_loop_if_large(
        sampling_params, {**sampling, "logprobs": body.logprobs}, model,
        max_tokens=max_tokens, grammar=None if wanted is None else wanted.grammar,
    )  # fmt: skip
    if not body.echo or body.logprobs is None:
        return params
    most = max(body.logprobs, body.prompt_logprobs or 0)
    return msgspec.structs.replace(params, prompt_logprobs=most)


def _fitted(params: SamplingParams, prompt: list[int], body: CompletionRequest, model: ServedModel) -> SamplingParams:
    """`params` for one prompt: the default of `max_tokens` is no more than the context has left."""
    room = max(model.engine.info.max_model_len - len(prompt), 1)
    if body.max_tokens is not None or room >= DEFAULT_MAX_TOKENS:
        return params
    return msgspec.structs.replace(params, max_tokens=room)


def _best(positions: Sequence[TokenLogprobs], count: int) -> list[TokenLogprobs]:
    """`positions` with no more than `count` candidates each."""
    return [msgspec.structs.replace(position, top=position.top[:count]) for position in positions]


class ShownText:
    """One choice's text and log-probabilities as the client sees them: with echo, the prompt's come first."""

    def __init__(
        self, body: CompletionRequest, choice: Choice, tokenizer: Tokenizer, skip_special_tokens: bool
    ) -> None:
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs
        self._choice = choice
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._legacy = LegacyLogprobs(tokenizer, skip_special_tokens)

    def take(self, text: str, positions: Sequence[TokenLogprobs]) -> tuple[str, dict[str, Any] | None]:
        """The next piece; the log-probabilities are None unless asked for."""
        before: dict[str, Any] = {}
        if self._echo:
            self._echo = False
            prompt = self._choice.prompt_token_ids
            text = self._tokenizer.decode(prompt, self._skip) + text
            if self._logprobs is not None:
                before = self._legacy.take_prompt(prompt, _best(self._choice.prompt_logprobs, self._logprobs))
        if self._logprobs is None:
            return text, None
        shown = self._legacy.take(positions)
        return text, {name: before[name] + shown[name] for name in shown} if before else shown


def _prompt_members(choice: Choice, body: CompletionRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """The members of a choice that show its prompt's tokens, as far as they are asked for."""
    members: dict[str, Any] = {}
    if body.return_token_ids:
        members["prompt_token_ids"] = choice.prompt_token_ids
    if body.prompt_logprobs is not None:
        positions = _best(choice.prompt_logprobs, body.prompt_logprobs)
        members["prompt_logprobs"] = show_prompt_logprobs(choice.prompt_token_ids, positions, tokenizer)
    return members


def _whole(
    index: int, choice: Choice, body: CompletionRequest, tokenizer: Tokenizer, skip_special_tokens: bool
) -> dict[str, Any]:
    """A finished choice."""
    text, logprobs = ShownText(body, choice, tokenizer, skip_special_tokens).take(choice.text, choice.logprobs)
    entry = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    details = show_details(choice, tokenizer, with_ids=body.return_token_ids, with_dynamics=body.return_dynamics)
    return entry | details | _prompt_members(choice, body, tokenizer)


class CompletionChunks(Chunks):
    """Chunks whose choices have text; what is shown of a prompt comes with the first piece of each choice."""

    member, empty = b"text", b'""'

    def __init__(
        self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, body: CompletionRequest
    ) -> None:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        super().__init__(head, generation, tokenizer, with_usage=usage, with_ids=bool(body.return_token_ids))
        self._body = body
        skip = generation.params.skip_special_tokens
        self._texts = [ShownText(body, choice, tokenizer, skip) for choice in self.choices]
        shows_prompt = body.echo or body.return_token_ids or body.prompt_logprobs is not None
        self._without_prompt = set(range(len(self.choices))) if shows_prompt else set()

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """New text with its tokens."""
        text, logprobs = self._texts[index].take(output.text, output.logprobs)
        details = self.details(output)
        if index in self._without_prompt:
            self._without_prompt.remove(index)
            if members := _prompt_members(self.choices[index], self._body, self.tokenizer):
                details += b"," + encode_json(members)[1:-1]
        return self.chunk(index, encode_json(text), logprobs=encode_json(logprobs), more=details)

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """The last chunk of one choice; before it the prompt, where no text has come to bring it."""
        before = b""
        if index in self._without_prompt:
            before = self.piece(index, msgspec.structs.replace(output, text="", token_ids=[], logprobs=[], dynamics=[]))
        return before + super().ending(index, output)
