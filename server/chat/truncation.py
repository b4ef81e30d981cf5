"""Shortens prompts, so that they and their answers fit the context: by tokens, or by messages of a chat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...engine.errors import RequestError
from .conversation import Message
from .served_model import ServedModel
from .template import TokenIds, require_list

Messages = Sequence[Message]
Prompts = str | list[int] | list[str] | list[list[int]]  # one prompt or several
Render = Callable[[Messages], Awaitable[TokenIds]]


def prompt_room(context: int, max_tokens: int | None) -> int:
    """Return how many tokens a prompt that may be shortened can keep.

    It leaves room for `max_tokens`, or for one token if that is more than half of the context: such a limit is not a
    wish to lose the prompt.
    """
    return context - (1 if max_tokens is None or max_tokens > context // 2 else max_tokens)


def truncate_prompt(prompt: TokenIds, keep: int | None, model: ServedModel, max_tokens: int | None) -> TokenIds:
    """Return the last `keep` ids of a prompt, -1 keeps those of `prompt_room`; raises `RequestError`."""
    if keep is None:
        return prompt
    if keep == -1:
        keep = prompt_room(model.engine.info.config.max_model_len, max_tokens)
    if not keep:
        raise RequestError("truncate_prompt_tokens must be -1 or at least 1.", param="truncate_prompt_tokens")
    return prompt[-keep:]


async def render_newest(messages: Messages, first: int, room: int, render: Render) -> TokenIds:
    """Return the prompt of the `first` messages and as many of the newest as fit `room` tokens.

    The last message always stays and, if it is a call's result, so does the call; results of dropped calls are dropped.
    If even these messages are too many, return their prompt or raise the `RequestError` of `render`.
    """

    async def fitting(start: int) -> TokenIds | None:
        try:
            prompt = await render([*messages[:first], *_since(messages, start)])
        except RequestError as error:
            if error.code == "context_length_exceeded":
                return None
            raise
        return prompt if len(prompt) <= room else None

    if len(messages) - first <= 1:
        return await render(messages)
    if (everything := await fitting(first)) is not None:
        return everything
    newest = len(messages) - 1
    while newest > first and messages[newest].role == "tool":
        newest -= 1
    best = await render([*messages[:first], *_since(messages, newest)])
    if len(best) > room:
        return best
    # From the newest in growing steps, so that at most about twice as many are rendered as fit: a request may have
    # thousands of messages for a context with room for ten.
    low, step = first, 1
    while newest - low > 1:
        start = max(newest - step, (low + newest) // 2)
        if (prompt := await fitting(start)) is None:
            low = start
        else:
            newest, best, step = start, prompt, 2 * step
    return best


def _since(messages: Messages, start: int) -> Messages:
    """Return the messages from `start`, without the results of calls before it."""
    chosen = messages[start:]
    called = {call.id for message in chosen for call in message.calls}
    return [m for m in chosen if m is messages[-1] or m.role != "tool" or m.call_id in called]


async def encode_prompts(
    given: Prompts, model: ServedModel, field: str, *, add_bos: bool, keep: int | None, max_tokens: int | None
) -> list[list[int]]:
    """Return the token ids of one or more prompts, cut as `truncate_prompt` does.

    Raises `RequestError`, which names the request's `field`.
    """
    prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    any_length = keep is not None
    encoded = [
        await model.encode(prompt, field, add_bos=add_bos, any_length=any_length) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    context = model.engine.info.config.max_model_len
    return [require_list(truncate_prompt(prompt, keep, model, max_tokens), context, field) for prompt in encoded]
