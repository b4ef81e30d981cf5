"""What is left out of a prompt, so that the rest and an answer to it fit the context: tokens, or messages of a chat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...engine.errors import RequestError
from .conversation import Message
from .served_model import ServedModel

Messages = Sequence[Message]
Render = Callable[[Messages], Awaitable[list[int]]]


def truncate_prompt(prompt: list[int], keep: int | None, model: ServedModel, max_tokens: int | None) -> list[int]:
    """The last `keep` ids of a prompt; -1 keeps what fits beside `max_tokens`; raises `RequestError`."""
    if keep is None:
        return prompt
    room = model.engine.info.max_model_len - (1 if max_tokens is None else max_tokens)
    if keep == -1:
        keep = max(room, 1)
    if not keep:
        raise RequestError("truncate_prompt_tokens must be -1 or at least 1.", param="truncate_prompt_tokens")
    return prompt[-keep:]


async def render_newest(messages: Messages, first: int, room: int, render: Render) -> list[int]:
    """The prompt of as many of the newest messages as fit `room` tokens; results of calls that are gone go too.

    Args:
        messages: of which the `first` ones and the last stay, with the call that a last result is of.
        render: makes a prompt of some of them; raises `RequestError` as `ServedModel.render` does.

    Where even those that stay are too many, their prompt is, or `RequestError` says so.
    """

    async def fitting(start: int) -> list[int] | None:
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
    # From the newest on in growing steps, so that no more is rendered than about twice what fits: a request may
    # bring thousands of messages to a context that has room for ten.
    low, step = first, 1
    while newest - low > 1:
        start = max(newest - step, (low + newest) // 2)
        if (prompt := await fitting(start)) is None:
            low = start
        else:
            newest, best, step = start, prompt, 2 * step
    return best


def _since(messages: Messages, start: int) -> Messages:
    """The messages from `start` on, less the results of calls that are before it."""
    chosen = messages[start:]
    called = {call.id for message in chosen for call in message.calls}
    return [m for m in chosen if m is messages[-1] or m.role != "tool" or m.call_id in called]


async def encode_prompts(
    given: str | list[int] | list[str] | list[list[int]],
    model: ServedModel,
    *,
    add_bos: bool,
    keep: int | None,
    max_tokens: int | None,
) -> list[list[int]]:
    """Return the token ids of one or more prompts, cut as `truncate_prompt` does; raises `RequestError`."""
    prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    encoded = [
        await model.encode(prompt, add_bos=add_bos, any_length=keep is not None) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    return [truncate_prompt(prompt, keep, model, max_tokens) for prompt in encoded]
