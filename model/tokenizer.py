"""Text to token ids and back, for the byte-level BPE tokenizers of the family."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from .files import CheckpointError, folder_of, read_json, read_text, shown

MAX_BYTES = 256 << 20  # of tokenizer.json; the largest published one has 40 MB
MAX_ID = 2**22  # as in `DeepConfig`
LARGE_TEXT = 4000  # from this many characters, tokenising takes so long that other threads should run meanwhile
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
EXTRAS = ("additional_special_tokens", "extra_special_tokens")  # keys for special tokens without a role


class Tokenizer:
    """A checkpoint's `tokenizer.json`, special tokens and chat template.

    Safe to use from several threads, since only a cache of texts changes after construction.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,  # which this object changes
        *,
        names: Mapping[str, str] | None = None,  # special tokens by role, or any other key
        ids: Mapping[str, int] | None = None,  # by role, for roles without a name; ignored if the token is plain text
        chat_templates: Mapping[str, str]
        | None = None,  # Jinja sources; "default", and "tool_use" for chats with tools
        template_origin: str = "",  # where they come from, for messages
    ) -> None:
        known = {role: name for role, name in (names or {}).items() if library.token_to_id(name) is not None}
        names = {**_special_tokens(library, ids or {}), **known}
        library.no_truncation()
        library.no_padding()
        # A token that a configuration calls special is one, even if tokenizer.json does not say so.
        library.add_special_tokens(list(names.values()))
        library.encode_special_tokens = True
        self._library = library
        self.chat_templates = chat_templates or {}
        self.template_origin = template_origin

        added = library.get_added_tokens_decoder()
        role_ids = [library.token_to_id(names[role]) if role in names else None for role in ROLES]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = role_ids[:3]
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._bytes = _piece_bytes(library, {id_: token.content for id_, token in added.items()})
        self._visible_bytes = [b"" if id_ in self.special_ids else piece for id_, piece in enumerate(self._bytes)]
        self._texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.vocab_size = len(self._bytes)  # the logits may be wider: padding rows
        self.adds_bos = (  # whether the post-processor puts one before every text
            self.bos_token_id is not None
            and library.encode("a").ids[:1] == [self.bos_token_id]
            and library.encode("a", add_special_tokens=False).ids[:1] != [self.bos_token_id]
        )
        self._special_by_text = {token.content: id_ for id_, token in added.items() if token.special}
        self._special_pattern = _pattern(token for token in added.values() if token.special)
        self._added_pattern = _pattern(added.values())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Besides `tokenizer.json`, this reads `tokenizer_config.json`, `special_tokens_map.json`, the files of chat
        templates and `config.json` if they exist. Raises `CheckpointError` for a file that is missing, broken or
        unsupported.
        """
        folder = folder_of(Path(folder))
        path = folder / "tokenizer.json"
        text = read_text(path, most=MAX_BYTES)
        if text is None:
            raise CheckpointError(f"{folder} has no tokenizer.json: copy it there from the checkpoint's source.")
        library = _parse(path, text)
        model = read_json(folder / "config.json") or {}
        names: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            names |= _special_names(folder / name, read_json(folder / name) or {})
        values = {role: model.get(f"{role}_id") for role in ROLES}
        firsts = {role: v[0] if isinstance(v, list) and v else v for role, v in values.items()}
        templates, origin = find_chat_templates(folder)
        ids = {role: id_ for role, id_ in firsts.items() if isinstance(id_, int)}
        try:
            return cls(library, names=names, ids=ids, chat_templates=templates, template_origin=str(origin))
        except BaseException as error:  # the library raises bare Exception, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{path} cannot be used as a tokenizer ({error!s:.200}): fetch it again.") from None

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Encode plain text: a special token spelled in it stays text, and only `add_bos` adds one, in front."""
        text = _well_formed(text)
        if len(text) < LARGE_TEXT:
            ids = self._library.encode(text, add_special_tokens=False).ids
        else:  # this method lets other threads run meanwhile
            ids = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def encode_prompt(self, text: str, *, guard: str = "") -> list[int]:
        """Encode text in which special tokens are recognised, such as a rendered chat; add no other special token.

        The character `guard`, which `shield` put into foreign parts, is removed. Where the text around it would become
        one added token, the parts before and after it are encoded separately.
        """
        ids: list[int] = []
        text = _well_formed(text)
        start = 0
        for match in self._special_pattern.finditer(text):
            if guard and text.startswith(guard, match.end()):
                continue
            ids += self._encode_guarded(text[start : match.start()], guard)
            ids.append(self._special_by_text[match[match.lastindex or 0]])
            start = match.end()
        return ids + self._encode_guarded(text[start:], guard)

    def _encode_guarded(self, text: str, guard: str) -> list[int]:
        """Encode text with guards, in which no special token is recognised."""
        if not guard or guard not in text:
            return self.encode(text)
        ids: list[int] = []
        before, *parts = text.split(guard)
        for part in parts:
            # The library treats special tokens as text, but not the other added ones.
            match = self._added_pattern.match(before[-1:] + part)
            if match is not None and match[match.lastindex or 0] not in self._special_by_text:
                ids += self.encode(before)
                before = part
            else:
                before += part
        return ids + self.encode(before)

    def shield(self, text: str, guard: str) -> str:
        """Put the character `guard` inside each added token that `text` spells.

        Added tokens are control marks (the end of a turn, the start of a call); in foreign text they are only text.
        """
        # One character at a time, so that overlapping spellings are all broken up.
        return re.sub(rf"(?={self._added_pattern.pattern}).", lambda match: match[0] + guard, text, flags=re.DOTALL)

    def spells_added(self, text: str) -> bool:
        """Whether `text` spells a token that was added to the vocabulary, special or not."""
        return self._added_pattern.search(text) is not None

    def spells_special(self, text: str) -> bool:
        """Whether `text` spells a special token."""
        return self._special_pattern.search(text) is not None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`; bytes that are not UTF-8 become U+FFFD, and ids outside the vocabulary are skipped."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return b"".join(pieces[id_] for id_ in ids if id_ < len(pieces)).decode("utf-8", "replace")

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Return a new incremental decoder."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return DecodeStream(pieces, self._texts[skip_special_tokens])

    def token_bytes(self, id_: int) -> bytes:
        """Return the exact bytes of one token, b"" for an id outside the vocabulary."""
        return self._bytes[id_] if id_ < len(self._bytes) else b""

    def token_text(self, id_: int) -> str:
        """Return one token as text, with U+FFFD for parts of characters."""
        return self.token_bytes(id_).decode("utf-8", "replace")


class DecodeStream:
    """Decodes ids one by one into whole characters, as `Tokenizer.decode` does for all of them at once."""

    # The library's own stream holds all text back while it ends in U+FFFD, so a model that writes broken UTF-8 stalls,
    # and it decodes a window of ids again at each step. Byte-level pieces are plain bytes, so Python's incremental
    # decoder is exact, with constant work per token.
    __slots__ = ("_decoder", "_pieces", "_texts", "_whole")

    def __init__(self, pieces: list[bytes], texts: dict[int, str]) -> None:
        self._pieces = pieces  # the bytes of each id
        self._texts = texts  # those that were found to be whole characters, for all streams
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole = True  # no character is unfinished

    def step(self, id_: int) -> str:
        """Return the text that `id_` completes, which may be empty."""
        if self._whole and (known := self._texts.get(id_)) is not None:
            return known
        if id_ >= len(self._pieces):
            return ""
        began_whole = self._whole
        text = self._decoder.decode(self._pieces[id_])
        self._whole = not self._decoder.getstate()[0]
        if began_whole and self._whole:
            self._texts[id_] = text
        return text


# The byte of each character of a byte-level piece: printable bytes are themselves, others U+0100 and on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


def _parse(path: Path, text: str) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`; raise `CheckpointError` if it is broken or of a kind that the family does not use."""
    try:
        library = tokenizers.Tokenizer.from_str(text)
        highest = max(library.get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error!s:.200}): fetch it again.") from None
    if "ByteLevel" not in repr(library.decoder):
        raise CheckpointError(f"{path} is not a byte-level BPE tokenizer, the only kind that this family uses.")
    if highest >= MAX_ID:
        raise CheckpointError(
            f"{path} has a token with the id {highest}, but ids must be below {MAX_ID}: fetch it again."
        )
    if missing := _undeclared_tokens(library):
        raise CheckpointError(f"{path}: the post_processor uses {shown(missing)} without declaring it: fetch it again.")
    return library


def _undeclared_tokens(library: tokenizers.Tokenizer) -> list[str]:
    """List the tokens that a template of the post-processor uses without declaring them: the library would panic."""
    state = json.loads(library.post_processor.__getstate__()) if library.post_processor else {}
    used: list[str] = []
    for processor in [state, *state.get("processors", ())]:
        if processor.get("type") == "TemplateProcessing":
            pieces = [
                piece["SpecialToken"]["id"]
                for piece in processor["single"] + processor["pair"]
                if "SpecialToken" in piece
            ]
            used += [name for name in pieces if name not in processor["special_tokens"]]
    return used


def _piece_bytes(library: tokenizers.Tokenizer, added: Mapping[int, str]) -> list[bytes]:
    """List the bytes of each id up to the highest; b"" for ids without a token."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, id_ in vocabulary.items():
        try:
            pieces[id_] = bytes([_ALPHABET[character] for character in piece])
        except KeyError:
            pieces[id_] = piece.encode("utf-8")
    for id_, content in added.items():  # not in the byte alphabet
        pieces[id_] = content.encode("utf-8")
    return pieces


def _special_tokens(library: tokenizers.Tokenizer, ids: Mapping[str, int]) -> dict[str, str]:
    """Find the tokens of those `ids` by role that are control marks, as declared or by their form `<...>`."""
    # Without ids, a configuration means 0, 1 and 2, which may be letters in a tokenizer that has no such marks.
    special = {id_ for id_, token in library.get_added_tokens_decoder().items() if token.special}
    spelled = {role: (id_, library.id_to_token(id_) or "") for role, id_ in ids.items() if 0 <= id_ < 2**32}
    return {role: text for role, (id_, text) in spelled.items() if id_ in special or re.fullmatch("<.+>", text)}


def _pattern(added: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Match any of these tokens as the library does: the longest first, with the spaces that it swallows."""
    alternatives = []
    for token in sorted(added, key=lambda token: -len(token.content)):
        body = f"({re.escape(token.content)})"
        if token.single_word:
            body = rf"(?<!\w){body}(?!\w)"
        alternatives.append(r"\s*" * token.lstrip + body + r"\s*" * token.rstrip)
    return re.compile(f"(?:{'|'.join(alternatives)})" if alternatives else r"(?!)")


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _special_names(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Read the special tokens in the file at `path` by role; those without a role get a key of their own."""

    def require(condition: bool, name: str, kind: str) -> None:
        if not condition:
            raise CheckpointError(f"{path}: {name} must be {kind}, but got {shown(settings[name])}: fetch it again.")

    entries: dict[str, Any] = {}
    for name in EXTRAS:
        extra = settings.get(name) or []
        require(isinstance(extra, (list, dict)), name, "a list of tokens")
        entries |= {
            f"{name}_{n}": entry for n, entry in enumerate(extra.values() if isinstance(extra, dict) else extra)
        }
        require(all(isinstance(_content(entry), str) for entry in entries.values()), name, "a list of tokens")
    declared = settings.get("added_tokens_decoder") or {}
    require(isinstance(declared, dict), "added_tokens_decoder", "an object of tokens by id")
    entries |= {f"added_{id_}": entry for id_, entry in declared.items()
                if isinstance(entry, dict) and entry.get("special")}  # fmt: skip
    for role in ROLES:
        entries[role] = settings.get(role)
        require(entries[role] is None or isinstance(_content(entries[role]), str), role, "a token")
    names = {role: _content(entry) for role, entry in entries.items()}
    return {role: name for role, name in names.items() if isinstance(name, str) and name}


def _content(entry: Any) -> Any:
    """Return the text of a token, which may be written as an object with its properties."""
    return entry.get("content") if isinstance(entry, dict) else entry


def find_chat_templates(folder: Path) -> tuple[dict[str, str], Path]:
    """Return a checkpoint's chat templates by name, and the file that they come from.

    As in transformers, the files `chat_template.jinja` ("default") and `additional_chat_templates/NAME.jinja` replace
    what `tokenizer_config.json` has; then come `chat_template.json` and `config.json`. Raises `CheckpointError`.
    """
    files = {"default": folder / "chat_template.jinja"}
    named = (folder / "additional_chat_templates").glob("*.jinja")
    files |= {path.name.removesuffix(".jinja"): path for path in sorted(named)}
    found = {name: text for name, path in files.items() if (text := read_text(path)) is not None}
    if found:
        return found, files[next(iter(found))]
    for name in ("tokenizer_config.json", "chat_template.json", "config.json"):
        path = folder / name
        if (value := (read_json(path) or {}).get("chat_template")) is not None:
            return _named_templates(path, value), path
    return {}, folder


def _named_templates(path: Path, value: Any) -> dict[str, str]:
    """Return the templates that `chat_template` holds: one, an object of them by name, or a list with their names."""
    pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else [("default", value)]
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    if not pairs or not all(isinstance(part, str) and part.strip() for pair in pairs for part in pair):
        kinds = 'a template, or templates by name such as {"default": "…", "tool_use": "…"}'
        raise CheckpointError(f"{path}: chat_template must be {kinds}, but got {shown(value)}: fetch it again.")
    return dict(pairs)
