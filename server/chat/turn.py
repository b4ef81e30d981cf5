"""One turn of a chat: from its request to the engine's input, and from its text to content and tool calls.

Chat completions, responses and messages all speak of turns; each of them makes a `ChatCompletionRequest` of its own
request, and shows in its own shape what the turn's reader finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ..api.chat.wire import AssistantMessage, ChatCompletionRequest, Message, ToolMessage
from ..generation.generation import Generation, sampling_params
from ..generation.served_model import ServedModel
from ..http.context import RequestContext
from ..http.errors import encode_json, shorten
from ..http.offload import off_loop_if_large
from .structured import check_grammar, format_grammar
from .template import MAX_DEPTH, is_deeper
from .tool_calls import ToolCallFormat, TurnReader
from .tool_choice import Offer, read_offer
from .truncation import render_newest, truncate_prompt

MAX_VARIABLE_BYTES = 2**14
BETWEEN_PARTS = "\n"
"""What stands between the texts of a message made of parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a chat asks of the engine, and how its text is to be read.

    Attributes:
        reader: makes a reader for one choice.
        must_call: whether the turn is nothing but calls of tools.
    """

    prompt: list[int]
    params: SamplingParams
    reader: Callable[[], TurnReader]
    must_call: bool = False

    def generate(self, model: ServedModel, context: RequestContext, body: ChatCompletionRequest) -> Generation:
        """Submit it; raises as `Generation` does."""
        return Generation(
            model, context, [self.prompt], [self.params],
            field="messages", n=body.n or 1, priority=body.priority or 0, cache_salt=body.cache_salt,
            streams=bool(body.stream),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WholeTurn:
    """What the text of a finished turn means.

    Attributes:
        calls: (id, function's name, arguments as JSON text) of each.
        finish_reason: what to report where the engine says "stop".
    """

    content: str
    calls: list[tuple[str, str, str]]
    finish_reason: str


def read_turn(reader: TurnReader, text: str) -> WholeTurn:
    """Read a whole text with a fresh reader."""
    parts = [reader.feed(text), reader.finish()]
    pieces = [piece for part in parts for piece in part.calls]
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        arguments.setdefault(piece.index, []).append(piece.arguments)
    calls = [(p.id, p.name or "", "".join(arguments[p.index])) for p in pieces if p.id is not None]
    return WholeTurn("".join(part.content for part in parts), calls, reader.finish_reason)


async def prepare_turn(body: ChatCompletionRequest, model: ServedModel, droppable: int | None = None) -> Turn:
    """Render, tokenise and check a chat; raises `RequestError` or `ChatTemplateError`.

    With `droppable`, the oldest messages from that one on are left out where all are too many.
    """
    offer = await off_loop_if_large(_read_offer, body, model.tool_format)
    max_tokens = body.max_completion_tokens or body.max_tokens
    prompt = await _render(body, model, offer, droppable)
    prompt = truncate_prompt(prompt, body.truncate_prompt_tokens, model, max_tokens)
    if max_tokens is None and (default := model.defaults.get("max_tokens")) is not None:
        max_tokens = min(default, max(model.engine.info.max_model_len - len(prompt), 1))
    grammar = await _grammar(body, offer)
    # What ends a turn in plain text may stand inside an answer whose form says where it ends.
    is_free = grammar is None or (offer is not None and offer.mode == "auto")
    params = await off_loop_if_large(
        sampling_params,
        body,
        model,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
        turn_ends=model.template.stop_strings if is_free else (),
    )
    reader, must_call = (TurnReader, False) if offer is None else (offer.reader, offer.mode != "auto")
    return Turn(prompt=prompt, params=params, reader=reader, must_call=must_call)


def _read_offer(body: ChatCompletionRequest, form: ToolCallFormat) -> Offer | None:
    """What the turn's tools are, after what can be checked of a chat by itself."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    _check_results(body)
    return read_offer(body, form)


async def _grammar(body: ChatCompletionRequest, offer: Offer | None) -> str | None:
    """What the turn's text must obey, of its format and its tools."""
    answer = await off_loop_if_large(format_grammar, body)
    if answer is None:
        return await offer.grammar(None) if offer else None
    text, field = answer
    await check_grammar(text, field)
    if offer is None:
        return text
    field = field.partition(".")[0]
    if offer.mode != "auto":
        raise RequestError(f"{field} cannot go together with a tool_choice that requires a call.", param=field)
    if not offer.format.opening:
        raise RequestError(f"{field} cannot go together with tools: this model's calls are JSON too.", param=field)
    return await offer.grammar(text)


async def _render(
    body: ChatCompletionRequest, model: ServedModel, offer: Offer | None, droppable: int | None
) -> list[int]:
    """The prompt, with the tools and in the way that the request asks for."""
    messages, options = await off_loop_if_large(_template_input, body, model, offer)

    async def render(chosen: list[dict[str, Any]]) -> list[int]:
        written = await off_loop_if_large(_written, chosen, model, offer)
        return await model.render(written, any_length=body.truncate_prompt_tokens is not None, **options)

    if droppable is None:
        return await render(messages)
    room = model.engine.info.max_model_len - (body.max_completion_tokens or body.max_tokens or 1)
    return await render_newest(messages, droppable, room, render)


def _template_input(
    body: ChatCompletionRequest, model: ServedModel, offer: Offer | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, for `_written`, and the options for the chat template."""
    template = model.template
    continues = bool(body.continue_final_message)
    prompts = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    _check_continuation(body, continues, prompts)
    variables = body.chat_template_kwargs or {}
    for name, value in variables.items():
        field = f"chat_template_kwargs.{shorten(name)}"
        if name not in template.variables:
            known = ", ".join(sorted(template.variables)) or "none"
            raise RequestError(f"{field} is no variable of this model's chat template (it has {known}).", param=field)
        if is_deeper(value, MAX_DEPTH) or len(encode_json(value)) > MAX_VARIABLE_BYTES:
            limits = f"{MAX_VARIABLE_BYTES} bytes or nested deeper than {MAX_DEPTH} levels"
            raise RequestError(f"{field} is larger than {limits}.", param=field)
    messages = [_plain(message) for message in body.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in offer.tools] if offer else None
    return messages, {
        "tools": tools,
        "add_generation_prompt": prompts,
        "continue_final_message": continues,
        "variables": variables,
    }


def _check_continuation(body: ChatCompletionRequest, continues: bool, prompts: bool) -> None:
    field = "continue_final_message"
    if continues and prompts:
        raise RequestError(f"{field} and add_generation_prompt cannot both be true.", param=field)
    last = body.messages[-1]
    if continues and (last.role not in ("user", "assistant") or (last.role == "assistant" and last.tool_calls)):
        raise RequestError(f"{field} needs a last message by user or assistant without tool_calls.", param=field)


def _check_results(body: ChatCompletionRequest) -> None:
    """Raise `RequestError` for a tool's result that belongs to no call before it."""
    ids: set[str] = set()
    for n, message in enumerate(body.messages):
        if isinstance(message, AssistantMessage):
            ids.update(call.id for call in message.tool_calls or ())
        elif isinstance(message, ToolMessage) and message.tool_call_id not in ids:
            field = f"messages[{n}].tool_call_id"
            raise RequestError(f"{field} is not the id of a tool call in a message before.", param=field)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: parts joined to one text."""
    shown = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    if message.content is not None:
        parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
        shown["content"] = BETWEEN_PARTS.join(parts)
    if isinstance(message, AssistantMessage) and message.tool_calls is not None:
        shown["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return shown


def _written(messages: list[dict[str, Any]], model: ServedModel, offer: Offer | None) -> list[dict[str, Any]]:
    """The messages with what the chat template does not write by itself."""
    if offer and not model.template.knows_tools:
        messages = _instructed(messages, offer.describe())
    return messages if model.template.knows_calls else [_spoken(message, model) for message in messages]


def _instructed(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with more of a system message."""
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def _spoken(message: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    """A message for a template that knows no tools: calls and their results as text of assistant and user."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not (calls := message.get("tool_calls")):
        return message
    form = model.tool_format
    written = form.separator.join(form.write(c["function"]["name"], c["function"]["arguments"]) for c in calls)
    return {"role": "assistant", "content": (message.get("content") or "") + written}
