"""Text to token ids and back, for the byte-level BPE tokenizers of the family."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, takewhile
from pathlib import Path

import tokenizers

from .expressions import is_panic
from .files import folder_of, read_json
from .long_text import IndivisibleTextError, LongTextEncoder
from .tokenizer_files import ROLES, find_chat_templates, read_library, refuse_panics, special_names

SAMPLE = "Some text, 12.5 é 中\n"
LARGE_TEXT = 4000  # for texts of at least this many characters, other threads should run during tokenising
SLICE = 2**16  # characters searched at a time, since no other thread runs during a search


class Tokenizer:
    """A checkpoint's `tokenizer.json`, special tokens and chat template.

    Safe to use from several threads, since only a cache of texts changes after construction.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,  # changed by this object
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
        # A token that a configuration lists as special is special, even if tokenizer.json does not mark it so.
        library.add_special_tokens(list(names.values()))
        library.encode_special_tokens = True
        self._library = library
        self.chat_templates = chat_templates or {}
        self.template_origin = template_origin
        self.origins: dict[str, str] = {}  # the name of the file from which each role's token comes
        added = library.get_added_tokens_decoder()
        role_ids = [library.token_to_id(names[role]) if role in names else None for role in ROLES]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = role_ids[:3]
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._bytes = _piece_bytes(library, {id_: token.content for id_, token in added.items()})
        self._visible_bytes = [b"" if id_ in self.special_ids else piece for id_, piece in enumerate(self._bytes)]
        self._texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._ids = list(range(len(self._bytes)))
        self.vocab_size = len(self._bytes)  # the logits may be wider: padding rows
        self.adds_bos = (  # whether the post-processor puts one before every text
            self.bos_token_id is not None
            and library.encode("a").ids[:1] == [self.bos_token_id]
            and library.encode("a", add_special_tokens=False).ids[:1] != [self.bos_token_id]
        )
        self._special_by_text = {token.content: id_ for id_, token in added.items() if token.special}
        self._special = AddedTokens(token for token in added.values() if token.special)
        self._added = AddedTokens(added.values())
        swallowing = AddedTokens(t for t in added.values() if not t.special and (t.lstrip or t.rstrip))
        self._long = LongTextEncoder(library, max(map(len, self._bytes), default=0), self._added, swallowing)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Besides `tokenizer.json`, this reads `tokenizer_config.json`, `special_tokens_map.json`, the files of chat
        templates and `config.json` if they exist. Raises `CheckpointError` for a file that is missing, broken or
        unsupported.
        """
        model = read_json(folder_of(Path(folder)) / "config.json") or {}
        folder = folder_of(Path(folder), "tokenizer.json")
        path = folder / "tokenizer.json"
        names: dict[str, str] = {}
        files: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            found = special_names(folder / name, read_json(folder / name) or {})
            names |= found
            files |= dict.fromkeys(found, name)
        values = {role: model.get(f"{role}_id") for role in ROLES}
        firsts = {role: v[0] if isinstance(v, list) and v else v for role, v in values.items()}
        templates, origin = find_chat_templates(folder)
        ids = {role: id_ for role, id_ in firsts.items() if isinstance(id_, int)}
        with refuse_panics(path):
            library = read_library(path)
            tokenizer = cls(library, names=names, ids=ids, chat_templates=templates, template_origin=str(origin))
            for role in ROLES:
                known = role in names and library.token_to_id(names[role]) is not None
                tokenizer.origins[role] = files[role] if known else "config.json"
            tokenizer.encode(SAMPLE)  # some tokenizers fail only at their first text
            return tokenizer

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Encode plain text: a special token spelled in it stays text, and only `add_bos` adds one, in front."""
        return [id_ for piece in self.encode_pieces(text, add_bos=add_bos) for id_ in piece]

    def encode_pieces(self, text: str, *, add_bos: bool = False) -> Iterator[list[int]]:
        """Yield the ids of `encode` piece by piece, in memory that does not grow with the text.

        Raises `IndivisibleTextError` for a text that this tokenizer cannot encode.
        """
        text = _well_formed(text)
        if add_bos and self.bos_token_id is not None:
            yield [self.bos_token_id]
        try:
            if len(text) < LARGE_TEXT:
                yield self._library.encode(text, add_special_tokens=False).ids
            else:  # other threads can run meanwhile
                yield from self._long.encode(text)
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = "on which a regular expression of this model's tokenizer takes too many steps"
            raise IndivisibleTextError(f"The text has a part {reason}.") from None

    def encode_prompt(self, text: str, *, guard: str = "") -> list[int]:
        """Return the ids of `prompt_pieces`."""
        return [id_ for piece in self.prompt_pieces(text, guard=guard) for id_ in piece]

    def prompt_pieces(self, text: str, *, guard: str = "") -> Iterator[list[int]]:
        """Encode text in which special tokens are recognised, such as a rendered chat; add none in front.

        The character `guard`, which `shield` puts into text from outside, is removed. If the text around it would
        become one added token, the parts before and after it are encoded separately.
        """
        text = _well_formed(text)
        start = 0
        for begin, end, token in self._special.find(text):
            if guard and text.startswith(guard, end):
                continue
            yield from self._encode_guarded(text[start:begin], guard)
            yield [self._special_by_text[token.content]]
            start = end
        yield from self._encode_guarded(text[start:], guard)

    def _encode_guarded(self, text: str, guard: str) -> Iterator[list[int]]:
        """Encode text with guards, in which no special token is recognised."""
        if not guard or guard not in text:
            yield from self.encode_pieces(text)
            return
        first, *parts = text.split(guard)
        joined = [first]
        for part in parts:
            # The library treats special tokens as text, but not the other added ones.
            token = self._added.starting(joined[-1][-1:] + part)
            if token is not None and not token.special:
                yield from self.encode_pieces("".join(joined))
                joined = []
            joined.append(part)
        yield from self.encode_pieces("".join(joined))

    def shield(self, text: str, guard: str) -> str:
        """Put the character `guard` inside each added token that `text` spells.

        Added tokens are control marks (the end of a turn, the start of a call); in outside text they are only text.
        """
        # Overlapping spellings too, so that all are broken up.
        cuts = [begin + 1 for begin, _, _ in self._added.spelled(text, 0, len(text))]
        return guard.join(text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True))

    def spells_added(self, text: str) -> bool:
        """Whether `text` spells a token that was added to the vocabulary, special or not."""
        return next(self._added.find(text), None) is not None

    def spells_special(self, text: str) -> bool:
        """Whether `text` spells a special token."""
        return next(self._special.find(text), None) is not None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`; bytes that are not UTF-8 become U+FFFD, and ids outside the vocabulary are skipped."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return b"".join(pieces[id_] for id_ in ids if id_ < len(pieces)).decode("utf-8", "replace")

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Return a new incremental decoder."""
        pieces = self._visible_bytes if skip_special_tokens else self._bytes
        return DecodeStream(pieces, self._texts[skip_special_tokens])

    def shared(self, ids: Iterable[int]) -> list[int]:
        """Return a list of `ids` that shares its integers with all others, which takes a fifth of the memory."""
        return list(map(self._ids.__getitem__, ids))

    def token_bytes(self, id_: int) -> bytes:
        """Return the exact bytes of one token, b"" for an id outside the vocabulary."""
        return self._bytes[id_] if id_ < len(self._bytes) else b""

    def token_text(self, id_: int) -> str:
        """Return one token as text, with U+FFFD for parts of characters."""
        return self.token_bytes(id_).decode("utf-8", "replace")


class AddedTokens:
    """Finds added tokens in text as the library does: the longest at the first place, in linear time."""

    def __init__(self, tokens: Iterable[tokenizers.AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        self.longest = max(map(len, self._tokens), default=0)
        """The number of characters of the longest added token."""
        pattern = _longest_of(sorted(self._tokens)) if self._tokens else "(?!)"
        self._pattern, self._each = re.compile(pattern), re.compile(f"(?=({pattern}))")

    def find(self, text: str) -> Iterator[tuple[int, int, tokenizers.AddedToken]]:
        """Yield where each token begins and ends, with the white space that it swallows."""
        done = position = 0
        while position < len(text):
            limit = position + SLICE
            match = self._pattern.search(text, position, limit + self.longest)
            if match is None or match.start() >= limit:
                position = limit
                continue
            begin, position = match.span()
            token = self._tokens[match[0]]
            if not _may_be(token, text, begin, position):
                continue
            end = position
            while token.lstrip and begin > done and text[begin - 1].isspace():
                begin -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            yield begin, end, token
            done = position = end

    def spelled(self, text: str, first: int, last: int) -> Iterator[tuple[int, int, tokenizers.AddedToken]]:
        """Yield where each token that begins in this range of a text begins and ends, also where they overlap."""
        for start in range(max(first, 0), last, SLICE):
            stop = min(start + SLICE, last)
            for match in self._each.finditer(text, start, stop + self.longest):
                begin, end = match.span(1)
                if begin < stop and _may_be(token := self._tokens[match[1]], text, begin, end):
                    yield begin, end, token

    def starting(self, text: str) -> tokenizers.AddedToken | None:
        """Return the token with which `text` begins."""
        match = self._pattern.match(text)
        token = self._tokens[match[0]] if match else None
        return token if token and match and _may_be(token, text, 0, match.end()) else None


def _may_be(token: tokenizers.AddedToken, text: str, begin: int, end: int) -> bool:
    """Return whether the spelling of a token counts, which for some depends on the characters next to it."""
    around = (text[begin - 1 : begin] + text[end : end + 1]) if token.single_word else ""
    return not any(character.isalnum() or character == "_" for character in around)


def _longest_of(texts: list[str]) -> str:
    """Return a pattern for the longest of these sorted texts, which looks at each character once."""
    alternatives = []
    for _, group in groupby(filter(None, texts), key=lambda text: text[0]):
        same = list(group)
        prefix = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(same[0], same[-1], strict=False)))
        rest = [text[len(prefix) :] for text in same]
        more = f"(?:{_longest_of(rest)})" + "?" * ("" in rest) if any(rest) else ""
        alternatives.append(re.escape(prefix) + more)
    return "|".join(alternatives)


class DecodeStream:
    """Decodes ids one by one into whole characters, as `Tokenizer.decode` does for all of them at once."""

    # The library's own stream holds all text back while it ends in U+FFFD, so a model that writes broken UTF-8 stalls,
    # and it decodes a window of ids again at each step. Byte-level pieces are plain bytes, so Python's incremental
    # decoder is exact, with constant work per token.
    __slots__ = ("_decoder", "_pieces", "_texts", "_whole")

    def __init__(self, pieces: list[bytes], texts: dict[int, str]) -> None:
        self._pieces = pieces  # the bytes of each id
        self._texts = texts  # texts of ids found to be whole characters, for all streams
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
        begun = self._decoder.getstate()[0]
        if begun[:1] == b"\xed" and begun[1:] >= b"\xa0":  # half of a surrogate, which UTF-8 never has
            text, begun = text + self.finish(), b""
        self._whole = not begun
        if began_whole and self._whole:
            self._texts[id_] = text
        return text

    def finish(self) -> str:
        """Return a replacement for an unfinished character at the end, and start afresh."""
        self._whole = True
        return self._decoder.decode(b"", final=True)


# The byte of each character of a byte-level piece: printable bytes are themselves, others U+0100 and on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


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


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
