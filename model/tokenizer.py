"""Text to token ids and back, for the byte-level BPE tokenizers of the family."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from .config import CheckpointError, DeepConfig

LARGE_TEXT = 4000
"""Characters from which tokenising takes long enough for others to notice."""
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A `tokenizer.json` and what its neighbours say of special tokens and of the chat template.

    Safe to use from several threads: nothing but a cache of texts changes after construction.

    Attributes:
        vocab_size: highest id + 1 (the network's logits may be wider: padding rows).
        bos_token_id, eos_token_id, pad_token_id: None where the checkpoint names none.
        special_ids: ids that are control marks, not text.
        chat_template: Jinja source, or None.
        adds_bos: the post-processor puts a beginning-of-sequence token before every text.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        names: Mapping[str, str] | None = None,
        ids: Mapping[str, int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap `library`.

        Args:
            library: the loaded tokenizer; it becomes this object's own.
            names: spelling of special tokens by role (`bos_token`, `eos_token`, `pad_token`, `unk_token`, or any
                other key), as the tokenizer's own configuration gives them.
            ids: ids by role, for roles without a name; one whose token is plain text is not believed.
            chat_template: Jinja source.
        """
        known = {role: name for role, name in (names or {}).items() if library.token_to_id(name) is not None}
        names = {**_special_tokens(library, ids or {}), **known}
        library.no_truncation()
        library.no_padding()
        # A token that a configuration calls special is one, even where tokenizer.json does not say so.
        library.add_special_tokens(list(names.values()))
        library.encode_special_tokens = True
        self._library = library
        self.chat_template = chat_template

        added = library.get_added_tokens_decoder()
        role_ids = [library.token_to_id(names[role]) if role in names else None for role in SPECIAL_NAMES]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = role_ids[:3]
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._bytes = _piece_bytes(library, {id_: token.content for id_, token in added.items()})
        self._visible_bytes = [b"" if id_ in self.special_ids else piece for id_, piece in enumerate(self._bytes)]
        self._texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.vocab_size = len(self._bytes)
        self.adds_bos = (
            self.bos_token_id is not None
            and library.encode("a").ids[:1] == [self.bos_token_id]
            and library.encode("a", add_special_tokens=False).ids[:1] != [self.bos_token_id]
        )
        self._special_by_text = {token.content: id_ for id_, token in added.items() if token.special}
        self._special_pattern = _pattern(token for token in added.values() if token.special)
        self._added_pattern = _pattern(added.values())

    @classmethod
    def from_folder(cls, folder: str | Path, config: DeepConfig | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Args:
            folder: holds `tokenizer.json`, and perhaps `tokenizer_config.json`, `special_tokens_map.json`,
                `chat_template.jinja` and `config.json`.
            config: gives the ids of special tokens that no file names; None reads them in `config.json`.

        Raises `CheckpointError` when `tokenizer.json` is missing, broken or not a byte-level BPE.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json: copy it there from where the checkpoint came.")
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}): fetch it again.") from None
        if "ByteLevel" not in repr(library.decoder):
            raise CheckpointError(f"{path} is not a byte-level BPE tokenizer, the only kind that this family uses.")
        settings = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json") if config is None else config.to_dict()
        names = {**_special_names(_read_json(folder / "special_tokens_map.json")), **_special_names(settings)}
        ids = {role: _first_id(model.get(f"{role}_id")) for role in SPECIAL_NAMES}
        return cls(
            library,
            names=names,
            ids={role: id_ for role, id_ in ids.items() if id_ is not None},
            chat_template=_find_chat_template(folder, settings, model),
        )

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Ids of plain text: a special token spelled in it stays text, and nothing is put behind it.

        With `add_bos`, the beginning-of-sequence token (if there is one) comes first.
        """
        text = _well_formed(text)
        if len(text) < LARGE_TEXT:
            ids = self._library.encode(text, add_special_tokens=False).ids
        else:  # this one lets other threads run meanwhile
            ids = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def encode_prompt(self, text: str, *, guard: str = "") -> list[int]:
        """Ids of text in which special tokens are recognised, such as a rendered chat; adds no other special token.

        Args:
            text: the whole prompt.
            guard: a character which `shield` has put into foreign parts. It is taken out again, and the text before
                and behind it is tokenised apart wherever it would be one token of its own otherwise.
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
        """Ids of text with guards, in which no special token is recognised."""
        if not guard or guard not in text:
            return self.encode(text)
        ids: list[int] = []
        before, *parts = text.split(guard)
        for part in parts:
            # The library leaves special tokens alone, but not the others that were added.
            match = self._added_pattern.match(before[-1:] + part)
            if match is not None and match[match.lastindex or 0] not in self._special_by_text:
                ids += self.encode(before)
                before = part
            else:
                before += part
        return ids + self.encode(before)

    def shield(self, text: str, guard: str) -> str:
        """Put the character `guard` inside each token spelled in `text` that was added to the vocabulary.

        Those are marks of the format (the end of a turn, the beginning of a call): in foreign text they are words.
        """
        # One character at a time, so that overlapping spellings are all broken.
        return re.sub(rf"(?={self._added_pattern.pattern}).", lambda match: match[0] + guard, text, flags=re.DOTALL)

    def spells_added(self, text: str) -> bool:
        """Whether `text` spells a token that was added to the vocabulary, special or not."""
        return self._added_pattern.search(text) is not None

    def spells_special(self, text: str) -> bool:
        """Whether `text` spells a special token."""
        return self._special_pattern.search(text) is not None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids outside the vocabulary nothing."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return b"".join(pieces[id_] for id_ in ids if id_ < len(pieces)).decode("utf-8", "replace")

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A fresh incremental decoder."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return DecodeStream(pieces, self._texts[skip_special_tokens])

    def token_bytes(self, id_: int) -> bytes:
        """The exact bytes of one token: its share of UTF-8 text, b"" outside the vocabulary."""
        return self._bytes[id_] if id_ < len(self._bytes) else b""

    def token_text(self, id_: int) -> str:
        """One token as text, for people: pieces of characters become U+FFFD."""
        return self.token_bytes(id_).decode("utf-8", "replace")


class DecodeStream:
    """Turns ids into text as they come, never half a character.

    The pieces put together are what `Tokenizer.decode` gives for all ids, less an unfinished character at the end.
    """

    # The library's own stream holds everything back while the text ends in U+FFFD, which for a model that writes
    # broken UTF-8 is a stall of unknown length, and it decodes a window of ids again at each step. Byte-level pieces
    # are plain bytes, so Python's incremental decoder is exact, and constant work per token.
    __slots__ = ("_decoder", "_pieces", "_texts", "_whole")

    def __init__(self, pieces: list[bytes], texts: dict[int, str]) -> None:
        """`pieces` holds the bytes of each id; `texts`, those found to be whole characters, for all streams of them."""
        self._pieces = pieces
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole = True  # no character is begun

    def step(self, id_: int) -> str:
        """The text that `id_` completes, perhaps none; nothing for an id outside the vocabulary."""
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


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level piece: printable bytes are themselves, others U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _piece_bytes(library: tokenizers.Tokenizer, added: Mapping[int, str]) -> list[bytes]:
    """The bytes of each id up to the highest; b"" for ids that no token has."""
    alphabet = _byte_level_alphabet()
    vocabulary = library.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, id_ in vocabulary.items():
        try:
            pieces[id_] = bytes([alphabet[character] for character in piece])
        except KeyError:
            pieces[id_] = piece.encode("utf-8")
    for id_, content in added.items():  # spelled plainly, not in the byte alphabet
        pieces[id_] = content.encode("utf-8")
    return pieces


def _special_tokens(library: tokenizers.Tokenizer, ids: Mapping[str, int]) -> dict[str, str]:
    """Spelling by role of those `ids` whose tokens are control marks, by declaration or by look (`<...>`)."""
    # A configuration without ids means 0, 1 and 2, and these may be letters in a tokenizer that has no such marks.
    special = {id_ for id_, token in library.get_added_tokens_decoder().items() if token.special}
    spelled = {role: (id_, library.id_to_token(id_) or "") for role, id_ in ids.items() if 0 <= id_ < 2**32}
    return {role: text for role, (id_, text) in spelled.items() if id_ in special or re.fullmatch("<.+>", text)}


def _pattern(added: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Matches any of these tokens as the library does: the longest first, with the spaces that it swallows."""
    alternatives = []
    for token in sorted(added, key=lambda token: -len(token.content)):
        body = f"({re.escape(token.content)})"
        if token.single_word:
            body = rf"(?<!\w){body}(?!\w)"
        alternatives.append(r"\s*" * token.lstrip + body + r"\s*" * token.rstrip)
    return re.compile(f"(?:{'|'.join(alternatives)})" if alternatives else r"(?!)")


def _well_formed(text: str) -> str:
    """`text` with each lone surrogate, which UTF-8 cannot carry, as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_json(path: Path) -> dict[str, Any]:
    """The object in an optional JSON file, {} without the file; `CheckpointError` when it is broken."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again.")
    return values


def _special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens that a configuration names, by role; those without a role by their place."""
    extra = settings.get("additional_special_tokens") or []
    declared = settings.get("added_tokens_decoder") or {}
    entries: dict[str, Any] = {role: settings.get(role) for role in SPECIAL_NAMES}
    entries |= {f"additional_{n}": entry for n, entry in enumerate(extra)}
    entries |= {f"added_{id_}": entry for id_, entry in declared.items()
                if isinstance(entry, dict) and entry.get("special")}  # fmt: skip
    names = {role: entry.get("content") if isinstance(entry, dict) else entry for role, entry in entries.items()}
    return {role: name for role, name in names.items() if isinstance(name, str) and name}


def _first_id(value: Any) -> int | None:
    return value[0] if isinstance(value, (list, tuple)) and value else value if isinstance(value, int) else None


def _find_chat_template(folder: Path, settings: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """The checkpoint's chat template: its own file, else the tokenizer's settings, else the model's."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): fetch it again.") from None
    for template in (settings.get("chat_template"), model.get("chat_template")):
        if isinstance(template, list):
            template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None
