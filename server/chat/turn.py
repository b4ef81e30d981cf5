"""One turn of a conversation: the prompt and parameters for the engine, and the meaning of the generated text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from types import NoneType
from typing import Any

from ...engine.client.output_processor import RequestOutput
from ...engine.errors import RequestError
from ...engine.messages import Marks, SamplingParams, Section
from ...model.long_text import IndivisibleTextError
from ...model.tokenizer import Tokenizer
from ..generation.generation import Choice
from ..http.body import is_large, off_loop, off_loop_if_large
from ..http.errors import encode_json, shorten
from .conversation import Conversation, Message, Sampling, ToolCall, ToolChoice
from .parts import CallPiece, Part, Thought, TurnReader
from .reasoning import GrammarMarks, locate, read_section, switch_ids, without_reasoning
from .served_model import LARGE_TEXT, TOKENIZING_FACTOR, ServedModel
from .template import (
    MAX_DEPTH,
    ChatTemplate,
    ChatTemplateError,
    TokenIds,
    collect_ids,
    is_deeper,
    require_list,
    too_long,
)
from .tool_calls import ToolCallFormat
from .tool_choice import ToolOptions, read_tools
from .truncation import prompt_room, render_newest, truncate_prompt

MAX_VARIABLE_BYTES = 2**14
FLAGS = ("enable_thinking", "include_reasoning")  # the booleans among the switches of a reasoning model
LARGE_CHAT = 50  # chats of at least this many messages are rendered off the event loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A conversation as the engine's input, and how to read the generated text."""

    prompt: list[int]
    params: SamplingParams
    reader: Callable[[], TurnReader]  # makes a reader for one choice
    must_call: bool = False  # the turn consists of nothing but tool calls
    turn_ends: tuple[str, ...] = ()  # plain texts with which the model ends a turn
    shows_reasoning: bool = True

    def read(self, reader: TurnReader, output: RequestOutput | Choice) -> list[Part]:
        """Let a reader read the text of an output; return its parts."""
        if not output.sections:
            return reader.feed(output.text)
        return [part for piece in output.sections for part in self.read_section(reader, *piece)]

    def read_section(self, reader: TurnReader, section: Section, text: str) -> list[Part]:
        """Let a reader read a piece of a section; return its parts."""
        parts = read_section(reader, section, text)
        return [part for part in parts if self.shows_reasoning or not isinstance(part, Thought)]

    def read_whole(self, choice: Choice) -> ParsedTurn:
        """Read a choice that is finished."""
        reader = self.reader()
        found = [*self.read(reader, choice), *reader.finish(self.cut_off(choice.finish_reason, choice.stop_reason))]
        return ParsedTurn(_join(found), reader.finish_reason, reader.unfinished or choice.is_reasoning)

    def cut_off(self, reason: str | None, stop: str | int | None) -> str | None:
        """Return the hidden stop string with which the client cut the text off, "" for another limit, None for none."""
        if isinstance(stop, str) and stop not in self.turn_ends:
            return "" if self.params.include_stop_str_in_output else stop
        return "" if reason == "length" or isinstance(stop, int) else None


class PlainReader:
    """Reads one choice of a turn without tools: everything is content."""

    finish_reason = "stop"
    unfinished = False

    def feed(self, text: str) -> list[Part]:
        """Return the text."""
        return [text] if text else []

    def finish(self, cut: str | None = None) -> list[Part]:
        """Return nothing, since nothing is held back."""
        return []


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """The meaning of a finished turn's text."""

    parts: list[str | ToolCall | Thought]
    finish_reason: str  # to report when the engine says "stop"
    unfinished: bool  # the text has ended inside reasoning or a call, or before a required call

    @property
    def content(self) -> str | None:
        """The answer's text; None if there are only calls or reasoning, or the text ended inside or before these."""
        text = "".join(part for part in self.parts if isinstance(part, str))
        return text or (None if self.calls or self.reasoning or self.unfinished else "")

    @property
    def reasoning(self) -> str:
        """The text of the reasoning."""
        return "".join(part.text for part in self.parts if isinstance(part, Thought))

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls."""
        return [part for part in self.parts if isinstance(part, ToolCall)]


def _join(found: Sequence[Part]) -> list[str | ToolCall | Thought]:
    """Return the parts, joining adjacent pieces of one text, call or reasoning."""
    parts: list[str | ToolCall | Thought] = []
    for _, group in groupby(found, key=lambda part: (type(part), part.index if isinstance(part, CallPiece) else 0)):
        pieces = list(group)
        first = pieces[0]
        if isinstance(first, str):
            parts.append("".join(map(str, pieces)))
        elif isinstance(first, Thought):
            parts.append(Thought("".join(piece.text for piece in pieces if isinstance(piece, Thought))))
        else:
            arguments = "".join(piece.arguments for piece in pieces if isinstance(piece, CallPiece))
            parts.append(ToolCall(first.id or "", first.name or "", arguments))
    return parts


def tokenizing_bytes(conversation: Conversation) -> int:
    """Return how much memory rendering and tokenising a conversation may take, even if it exceeds the context."""
    return TOKENIZING_FACTOR * sum(len(message.text or "") for message in conversation.messages)


async def prepare_prompt(
    conversation: Conversation, model: ServedModel
) -> tuple[TokenIds, ToolOptions | None, str | None]:
    """Render, tokenise and check a conversation; return also its tools and its grammar. Raises `RequestError`."""
    tools = await off_loop_if_large(_tools, conversation, model)
    prompt = await _render(conversation, model, tools)
    if model.marks is not None:
        _switch_reasoning(prompt, conversation, model)
    if conversation.keep_tokens is not None:
        prompt = truncate_prompt(prompt, conversation.keep_tokens, model, conversation.max_tokens)
    return prompt, tools, await _grammar(conversation, tools, model, prompt)


async def prepare_turn(conversation: Conversation, model: ServedModel) -> Turn:
    """Turn a conversation into the engine's input; raises `RequestError`."""
    ids, tools, grammar = await prepare_prompt(conversation, model)
    prompt = require_list(ids, model.engine.info.config.max_model_len, conversation.messages_field)
    max_tokens = conversation.max_tokens
    if max_tokens is None:
        max_tokens = model.defaults.get("max_tokens")
    # A grammar determines the answer's end, and the plain text that ends a turn may occur inside it, so it is then not
    # used as a stop string.
    is_free = grammar is None or (tools is not None and tools.mode == "auto")
    turn_ends = _template(model, tools).stop_strings if is_free else ()
    params = await off_loop_if_large(
        sampling_params, conversation.sampling, model, max_tokens=max_tokens, grammar=grammar, turn_ends=turn_ends,
        marks=model.marks and locate(model.marks, prompt, conversation, model.tokenizer),
    )  # fmt: skip
    reader, must_call = (PlainReader, False) if tools is None else (tools.reader, tools.mode != "auto")
    shown = conversation.template_variables.get("include_reasoning") is not False
    return Turn(prompt=prompt, params=params, reader=reader, must_call=must_call, turn_ends=turn_ends,
                shows_reasoning=shown)  # fmt: skip


def _switch_reasoning(prompt: TokenIds, conversation: Conversation, model: ServedModel) -> None:
    """Add to a prompt the marks that make the model reason or not, if the request asks and the template cannot."""
    wanted = conversation.template_variables.get("enable_thinking")
    generates = conversation.add_generation_prompt is not False and not conversation.continue_final_message
    if model.marks is None or not model.reasons or not isinstance(wanted, bool) or not generates:
        return
    if "enable_thinking" not in model.template.variables:
        prompt.extend(switch_ids(locate(model.marks, prompt, conversation, model.tokenizer), wanted, model.tokenizer))


def _tools(conversation: Conversation, model: ServedModel) -> ToolOptions | None:
    """Return the tools that the turn may call, None if it may call none; a plain chat needs no checks."""
    has_results = any(message.call_id is not None for message in conversation.messages)
    if conversation.tools or has_results or conversation.tool_choice != ToolChoice():
        return read_tools(conversation, model.tool_format)
    return None


def sampling_params(
    sampling: Sampling, model: ServedModel, max_tokens: int | None, grammar: str | None,
    turn_ends: tuple[str, ...] = (), marks: Marks | None = None,
) -> SamplingParams:  # fmt: skip
    """Merge a request's fields, the model's defaults and, unless `ignore_eos`, `turn_ends`; raises `RequestError`."""
    values: dict[str, Any] = {**model.defaults, **sampling, "max_tokens": max_tokens, "grammar": grammar}
    values["marks"] = marks
    if "bad_words" in values:
        values["bad_words"] = tuple(_spellings(values["bad_words"], model.tokenizer))
    if not values.get("ignore_eos"):
        values["stop"] = values.get("stop", ()) + turn_ends
    return SamplingParams(**values)


def _spellings(words: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of each word at the start of a text and after a space; raises `RequestError`."""
    for word in words:
        try:
            ids = {tuple(tokenizer.encode(text)) for text in (word, f" {word.lstrip()}")}
        except IndivisibleTextError as error:
            raise RequestError(str(error), param="bad_words") from None
        yield from sorted(spelling for spelling in ids if spelling)


async def _grammar(
    conversation: Conversation, tools: ToolOptions | None, model: ServedModel, prompt: TokenIds
) -> str | None:
    """Return the grammar that the turn's format and tools demand, after checking it; None if the text is free."""
    answer, check, marks = conversation.answer_format, model.engine.check_grammar, None
    if model.marks is not None and model.reasons and (answer or tools):
        may_reason = conversation.template_variables.get("enable_thinking") is not False
        located = locate(model.marks, prompt, conversation, model.tokenizer)
        marks = GrammarMarks(located, model.tokenizer, may_reason)
    if answer is not None:
        await check(answer.grammar, answer.grammar_field)
        if tools is None:
            return marks.around(answer.grammar) if marks else answer.grammar
        if tools.mode != "auto":
            answer = None  # calls are the whole turn
        elif not tools.format.opening:
            message = f"{answer.field} cannot be combined with tools: this model writes calls as JSON too."
            raise RequestError(message, param=answer.field)
    found = await off_loop_if_large(tools.grammar, answer.grammar if answer else None, marks) if tools else None
    if found is None:
        return None
    grammar, arguments = found
    try:
        await check(grammar, "tools")
    except RequestError:
        for field, part in arguments.items():  # one by one, to name the tool at fault
            await check(part, field)
        raise
    return grammar


async def _render(conversation: Conversation, model: ServedModel, tools: ToolOptions | None) -> TokenIds:
    """Return the prompt, without the messages that do not fit and may be dropped."""
    template = _template(model, tools)
    await off_loop_if_large(_check_template_options, conversation, template, model)
    context = model.engine.info.config.max_model_len
    field, any_length = conversation.messages_field, conversation.keep_tokens is not None
    written = conversation.messages
    if model.marks is not None and model.reasons:
        written = await off_loop_if_large(without_reasoning, conversation)
    options: dict[str, Any] = {
        "tools": tools.tools if tools else None,
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        "variables": {n: v for n, v in conversation.template_variables.items() if n in template.variables},
    }

    async def render(messages: Sequence[Message]) -> TokenIds:
        messages = await off_loop_if_large(_tools_as_text, messages, model, tools)
        characters = sum(len(message.text or "") for message in messages)
        if not any_length and characters // model.longest_token > context:
            raise too_long(characters // model.longest_token, context, field)
        is_long = len(messages) >= LARGE_CHAT or len(encode_json([messages, options])) >= LARGE_TEXT
        pieces = template.render_pieces(messages, **options)
        work = partial(collect_ids, pieces, model.tokenizer, context, field, any_length=any_length)
        return await off_loop(work) if is_large.get() or is_long else work()

    try:
        if conversation.keep_messages is None:
            return await render(written)
        room = prompt_room(context, conversation.max_tokens)
        return await render_newest(written, conversation.keep_messages, room, render)
    except ChatTemplateError as error:
        error.param = field
        raise


def _template(model: ServedModel, tools: ToolOptions | None) -> ChatTemplate:
    return model.template.with_tools if tools else model.template


def _check_template_options(conversation: Conversation, template: ChatTemplate, model: ServedModel) -> None:
    variables = template.variables if model.marks is None else template.variables | model.switches
    last, field = conversation.messages[-1], "continue_final_message"
    if conversation.continue_final_message and (last.role not in ("user", "assistant") or last.calls):
        needed = "the last message to be from the user or the assistant and to have no tool calls"
        raise RequestError(f"{field} needs {needed}.", param=field)
    for name, value in conversation.template_variables.items():
        field = f"chat_template_kwargs.{shorten(name)}"
        if name not in variables and value is not None:
            known = ", ".join(sorted(variables)) or "none"
            message = f"{field} is not a variable of this model's chat template; its variables: {known}."
            raise RequestError(message, param=field)
        if name not in template.variables and name in FLAGS and not isinstance(value, (bool, NoneType)):
            raise RequestError(f"{field} must be true or false, but got {shorten(str(value))}.", param=field)
        if is_deeper(value, MAX_DEPTH) or len(encode_json(value)) > MAX_VARIABLE_BYTES:
            limits = f"at most {MAX_VARIABLE_BYTES} bytes and {MAX_DEPTH} levels"
            raise RequestError(f"{field} is too large or too deeply nested: {limits}.", param=field)


def _tools_as_text(messages: Sequence[Message], model: ServedModel, tools: ToolOptions | None) -> Sequence[Message]:
    """Return the messages, with tools, calls and results written as text if the template cannot render them."""
    template = _template(model, tools)
    if tools and not template.knows_tools:
        first, text = messages[0], tools.describe()
        if first.role in ("system", "developer"):
            messages = [replace(first, text=f"{first.text}\n\n{text}"), *messages[1:]]
        else:
            messages = [Message("system", text), *messages]
    if not template.knows_calls:
        messages = [_calls_as_text(message, model.tool_format) for message in messages]
    return messages


def _calls_as_text(message: Message, form: ToolCallFormat) -> Message:
    """Return a message for templates without tools: calls and results become text of assistant and user."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.text}\n</tool_response>")
    if not message.calls:
        return message
    written = form.separator.join(form.write(call.name, call.arguments) for call in message.calls)
    return Message("assistant", (message.text or "") + written)
