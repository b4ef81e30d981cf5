"""Renders chat messages to prompt token ids with the checkpoint's own Jinja template."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import minijinja

from ...engine.errors import RequestError
from ...model.long_text import IndivisibleTextError
from ...model.tokenizer import Tokenizer
from .conversation import Message, Tool, ToolCall

# The family's own plain-text format, for checkpoints without a template.
FALLBACK = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}\n\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

_QUOTED = r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' """
_PIECE = re.compile(  # a tag, or text that only looks like one: a comment or raw text
    rf"""\{{\#.*?(?:\#\}}|\Z) | \{{%[-+]?\s*raw\s*[-+]?%\}}.*?(?:\{{%[-+]?\s*endraw\s*[-+]?%\}}|\Z)
    | (?P<open>\{{%[-+]?)\s*(?P<end>end)?generation\s*(?P<close>[-+]?%\}})
    | (?P<tag>\{{[{{%](?:{_QUOTED}|(?!%\}}|\}}\}})[^"'])*)""",
    re.DOTALL | re.VERBOSE,
)
MAX_SOURCE, MAX_TAG, MAX_BRANCHES = 2**20, 4000, 1000
"""Characters of a template and, apart from texts, of one tag, and the `elif`s of a template: the compiler nests deeper
with each operator and each branch, and exhausting its stack ends the process."""

FUEL = 5_000_000
"""Template instructions per rendering: about a tenth of a second. A long chat needs about ten thousand."""
MAX_CHARACTERS = 4_000_000  # of the longest rendered prompt
MAX_DEPTH = 64  # levels of nested lists and objects in a template's input

# Noncharacters: Unicode gives them no meaning, no text needs them, and no template or normalisation touches them.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Template variables that a request may not set; names ending in `_token` are refused too."""
FUNCTIONS = frozenset({"range", "namespace", "dict", "debug", "cycler", "joiner", "lipsum"})

SECTION_MARKS = (
    ("<|think_start|>", "<|think_end|>", "<|final_start|>", "<|final_end|>"),
    ("<think>", "</think>", "<final>", "</final>"),
)
"""The marks of reasoning and of an answer, under the names that they may have as special tokens."""


SLACK = 2**16  # tokens by which a prompt may exceed the context before it is refused without counting the rest
TokenIds: TypeAlias = "list[int] | array[int]"  # an array, which takes half of the memory, if there are very many


class ChatTemplateError(RequestError):
    """Messages that the chat template cannot render; the message is one sentence to show the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="messages", code="chat_template_error")


class ChatTemplate:
    """Renders conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, source: str, origin: str = "the checkpoint") -> None:
        """Compile `source`, which is from the file `origin`; raises `ChatTemplateError` if it is not Jinja."""
        self._tokenizer = tokenizer
        self.source = source
        # A model with tokens for both sections learned to find them in every answer, though its template may write the
        # words only: an earlier answer then has empty reasoning.
        marks = next((m for m in SECTION_MARKS if all(map(tokenizer.spells_special, m)) and m[2] not in source), ())
        self._answer_marks = ("".join(marks[:3]), marks[3]) if marks else ("", "")
        # trim_blocks and lstrip_blocks are off: the models were fine-tuned on the output of plain Jinja.
        self._environment = minijinja.Environment(
            fuel=FUEL,
            debug=False,
            filters={"tojson": _tojson},
            globals={
                "raise_exception": _raise_exception,
                "strftime_now": lambda form: datetime.now().strftime(form),
            },
            auto_escape_callback=lambda _name: False,
            finalizer=lambda value: "" if value is None else NotImplemented,
        )
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        texts = ["" if id_ is None else tokenizer.token_text(id_) for id_ in ids]
        self._tokens = dict(zip(("bos_token", "eos_token", "pad_token"), texts, strict=True))
        try:
            self._environment.add_template("chat", _prepared(source))
            variables = self._environment.undeclared_variables_in_template("chat")
        except (minijinja.TemplateError, ValueError) as error:
            reason = f"is not valid Jinja ({getattr(error, 'message', error)}): correct it, or pass another"
            raise ChatTemplateError(f"The chat template of {origin} {reason} with --chat-template.") from None
        self._knows_generation_prompt = "add_generation_prompt" in variables
        self.knows_tools = "tools" in variables  # it describes the tools
        self.knows_calls = "tool_calls" in source  # it writes calls of tools
        # The variables that a request may set.
        self.variables = frozenset(name for name in variables - RESERVED - FUNCTIONS if not name.endswith("_token"))
        # The text that ends the assistant's turn if the format marks turns by plain text (`\n\nUser:`). Empty if a
        # special token ends it, since the engine stops there.
        self.stop_strings = self._find_stop_strings()
        self.with_tools = self  # the template for chats with tools

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, override: str | None = None, origin: str = "") -> ChatTemplate:
        """Compile `override`, from the file `origin`, else the checkpoint's templates, else the family's own format."""
        sources, origin = tokenizer.chat_templates, origin or tokenizer.template_origin
        if override is not None or not sources:
            return cls(tokenizer, FALLBACK if override is None else override, origin)
        if "default" not in sources:
            reason = f"names its chat templates {', '.join(sources)!r:.200}, and none is the default"
            raise ChatTemplateError(f"{origin} {reason}: pass the one to use with --chat-template.")
        template = cls(tokenizer, sources["default"], origin)
        if "tool_use" in sources:
            template.with_tools = cls(tokenizer, sources["tool_use"], origin)
        return template

    def render(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Return the ids of `render_pieces`."""
        return [id_ for piece in self.render_pieces(messages, **options) for id_ in piece]

    def render_pieces(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Iterator[list[int]]:
        """Yield the token ids of the prompt piece by piece, with the leading token that the model was tuned with.

        Special tokens are recognised only where the template writes them; in a message, the same text stays plain text.
        The prompt ends with the opening of an assistant's turn, or inside the last message if it is to be continued.
        Raises `ChatTemplateError` if the template refuses the messages, does too much work, writes too much, or leaves
        a message out.
        """
        if add_generation_prompt and continue_final_message:
            message = "continue_final_message and add_generation_prompt cannot both be true."
            raise RequestError(message, param="continue_final_message")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if not messages:
            raise ChatTemplateError("messages must not be empty.")
        described = None if tools is None else [_describe(tool) for tool in tools]
        given: Any = [[self._prepare(message) for message in messages], described, variables or {}]
        texts = self.source + json.dumps(given, ensure_ascii=False)
        free = (c for c in NONCHARACTERS if c not in texts)
        guard, mark = next(free, ""), next(free, "")
        if not mark:
            raise ChatTemplateError("The messages have too many Unicode noncharacters.")
        chat, described, variables = self._shielded(given, guard)
        text = self._text(chat, {"tools": described, **variables}, mark, add_generation_prompt, continue_final_message)
        del messages, described, given, texts, chat  # each as long as the prompt
        pieces = filter(None, self._tokenizer.prompt_pieces(text, guard=guard))
        first, bos = next(pieces, []), self._tokenizer.bos_token_id
        if self._tokenizer.adds_bos and bos is not None and first[:1] != [bos]:
            yield [bos]
        yield first
        yield from pieces

    def _text(
        self, chat: list[dict[str, Any]], given: dict[str, Any], mark: str, generation: bool, continuation: bool
    ) -> str:
        """Return the prompt as text; `mark` is a character that occurs nowhere in it."""
        if continuation:
            last = {**chat[-1], "content": (chat[-1].get("content") or "") + mark}
            before, found, _ = self._run([*chat[:-1], last], given).rpartition(mark)
            if not found:
                raise ChatTemplateError("The model's chat template leaves out the message to continue.")
            return before
        plain = self._run(chat, given)
        self._require_all_written(chat, given, mark)
        if not generation:
            return plain
        if self._knows_generation_prompt:
            prompted = self._run(chat, given, add_generation_prompt=True)
            if prompted != plain:
                return prompted
        # The template ignores add_generation_prompt: cut the text before an assistant's words, without the last space,
        # which in training was part of the first word's token.
        before, found, _ = self._run([*chat, {"role": "assistant", "content": mark}], given).rpartition(mark)
        return before.removesuffix(self._answer_marks[0]).removesuffix(" ") if found else plain

    def _run(self, chat: list[dict[str, Any]], given: dict[str, Any], add_generation_prompt: bool = False) -> str:
        if start := self._answer_marks[0]:
            chat = [
                {**m, "content": f"{start}{m['content'].strip()}{self._answer_marks[1]}"}
                if m["role"] == "assistant" and m["content"] is not None
                else m
                for m in chat
            ]
        try:
            text = self._environment.render_template(
                "chat", messages=chat, add_generation_prompt=add_generation_prompt, **given, **self._tokens
            )
        except minijinja.TemplateError as error:
            message = f"The model's chat template cannot render these messages: {error.message}."
            if error.kind == "OutOfFuel":
                message = "The messages take too long to render with the model's chat template: send fewer."
            raise ChatTemplateError(message) from None
        if len(text) > MAX_CHARACTERS:
            raise ChatTemplateError(f"The rendered chat has {len(text)} characters; the limit is {MAX_CHARACTERS}.")
        return text

    def _prepare(self, message: Message) -> dict[str, Any]:
        """Return a message in OpenAI's shape, which templates expect."""
        shown: dict[str, Any] = {"role": message.role, "name": message.name, "tool_call_id": message.call_id}
        if message.role == "developer" and "developer" not in self.source:
            shown["role"] = "system"  # the same role under OpenAI's newer name
        if message.calls:
            shown["tool_calls"] = [_with_parsed_arguments(call) for call in message.calls]
        # Templates test `content is none` only for calls; elsewhere they join it to other text.
        content = message.text if message.text is not None or message.calls else ""
        return {key: value for key, value in shown.items() if value is not None} | {"content": content}

    def _require_all_written(self, chat: list[dict[str, Any]], given: dict[str, Any], mark: str) -> None:
        """Raise `ChatTemplateError` if the template silently drops a message, because of its role or its place."""
        doubtful = {n for n, m in enumerate(chat) if m["content"] and m["role"] not in ("user", "assistant")}
        if not doubtful:
            return
        marked = [{**m, "content": m["content"] + mark} if n in doubtful else m for n, m in enumerate(chat)]
        if self._run(marked, given).count(mark) < len(doubtful):
            roles = " or ".join(sorted({chat[n]["role"] for n in doubtful}))
            raise ChatTemplateError(f"The model's chat template has no place for a {roles} message at that position.")

    def _shielded(self, value: Any, guard: str) -> Any:
        """Return `value` with `guard` inside each spelled-out special token; `encode_prompt` removes it."""
        if isinstance(value, str):
            return self._tokenizer.shield(value, guard) if self._tokenizer.spells_added(value) else value
        if isinstance(value, Mapping):
            return {self._shielded(key, guard): self._shielded(item, guard) for key, item in value.items()}
        return [self._shielded(item, guard) for item in value] if isinstance(value, (list, tuple)) else value

    def _find_stop_strings(self) -> tuple[str, ...]:
        question, answer, following = NONCHARACTERS[:3]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            last = self._run(chat, {"tools": None}).partition(answer)[2]
            text = self._run([*chat, {"role": "user", "content": following}], {"tools": None})
        except ChatTemplateError:
            return ()
        between = text.partition(answer)[2].partition(following)[0]
        # The end that every turn has, last or not, if it is visible; else everything up to the user's next words.
        end = last.rstrip()
        stop = end if end and between.startswith(end) else between.rstrip()
        return () if not stop or self._tokenizer.spells_special(between) else (stop,)


def collect_ids(
    pieces: Iterator[list[int]], tokenizer: Tokenizer, context: int, field: str, *, any_length: bool
) -> TokenIds:
    """Return the ids of all pieces.

    Raises `RequestError`, which names the request's `field`, if a piece cannot be tokenised, or as soon as they are far
    too many, unless `any_length`.
    """
    ids = array("I")
    try:
        for piece in pieces:
            ids.extend(piece)
            if not any_length and len(ids) > context + SLACK:
                raise too_long(len(ids), context, field)
    except IndivisibleTextError as error:
        raise RequestError(str(error), param=field) from None
    return ids if len(ids) > context + SLACK else tokenizer.shared(ids)


def require_list(ids: TokenIds, context: int, param: str) -> list[int]:
    """Return the ids of a prompt for the engine; raises `RequestError` if they are far too many."""
    if isinstance(ids, array):
        if len(ids) > context + SLACK:
            raise too_long(len(ids), context, param)
        return ids.tolist()
    return ids


def too_long(fewest: int, context: int, param: str) -> RequestError:
    """Return the error for a prompt of at least `fewest` tokens, which cannot fit the context."""
    message = f"This model's context is {context} tokens, but the prompt has at least {fewest} tokens."
    return RequestError(message, param=param, code="context_length_exceeded")


def _describe(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's shape, which templates expect."""
    strict = {} if tool.strict is None else {"strict": tool.strict}
    return {"type": "function", "function": tool.describe() | strict}


def _with_parsed_arguments(call: ToolCall) -> dict[str, Any]:
    """Return a call in OpenAI's shape, with its arguments as an object if they are the JSON text of one."""
    shown = call.to_openai()
    try:
        parsed = json.loads(call.arguments)
        json.dumps(parsed, ensure_ascii=False).encode()  # a lone surrogate is not text
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict) and not is_deeper(parsed, MAX_DEPTH):
        shown["function"]["arguments"] = parsed
    return shown


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested more than `levels` deep."""
    inner = [value] if isinstance(value, (dict, list)) else []
    while inner and levels:
        levels -= 1
        rows: Iterable[Iterable[Any]] = (each.values() if isinstance(each, dict) else each for each in inner)
        inner = [item for row in rows for item in row if isinstance(item, (dict, list))]
    return bool(inner)


def _prepared(source: str) -> str:
    """Return the source for minijinja: without transformers' `generation` tags, which mark the text to train on.

    Raises `ValueError` for a source that is too large to compile.
    """
    if len(source) > MAX_SOURCE:
        raise ValueError(f"it has {len(source)} characters; the limit is {MAX_SOURCE}")
    branches = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal branches
        if tag := match["tag"]:
            branches += re.match(r"\{%[-+]?\s*elif\b", tag) is not None
            if len(re.sub(_QUOTED, "", tag, flags=re.DOTALL | re.VERBOSE)) > MAX_TAG or branches > MAX_BRANCHES:
                raise ValueError(f"it has a tag of more than {MAX_TAG} characters, or more than {MAX_BRANCHES} elifs")
        return match[0] if match["open"] is None else f"{match['open']} {match['end'] or ''}with {match['close']}"

    return _PIECE.sub(replace, source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # The library's own filter escapes <, > and & for HTML, which no chat model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"The model's chat template refuses these messages: {str(message).rstrip('.')[:200]}.")
