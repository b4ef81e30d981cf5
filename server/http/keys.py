"""API keys: which are valid, and the limits and use of their clients.

A line of the file of `--api-key-file` is a key, or `sha256:` and the digest of one, optionally followed by settings:

    sk-4f9c2b81                # a comment
    sha256:9f86d081...15b0f00a08 name=team-a requests_per_minute=60 tokens_per_minute=100000 max_parallel_requests=8

Lines with the same name are keys of the same client, so that a key can be replaced.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...engine.config import nearest
from ..flags import ConfigError
from .errors import ApiError

logger = logging.getLogger("pyllm.server")

POLL_SECONDS = 1.0  # how often to look whether the file has changed
MAX_BYTES, MAX_KEYS = 2**20, 1024
MOST = 10**12
TICK_NS = 2 * 10**9
SHARED_SECRET = b"PyLLM"  # nothing that all servers could read would be a secret to the readers of the shared data
DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may use; None means unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    max_parallel_requests: int | None = None


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key, by its SHA-256 digest, with its client's name and limits."""

    digest: bytes
    key: bytes | None = None  # None if only the digest is known
    name: str = ""
    limits: Limits = Limits()


@dataclass(slots=True)
class Allowance:
    """A limit per minute, which may be used up at once and then refills steadily."""

    limit: int
    used: float = 0.0  # of the limit; may exceed it
    at: float = field(default_factory=time.monotonic)

    def seconds_until(self, amount: float) -> float:
        """Return the seconds until `amount` more fits."""
        now = time.monotonic()
        self.used, self.at = max(self.used - (now - self.at) * self.limit / 60, 0.0), now
        return max((self.used + amount - self.limit) * 60 / self.limit, 0.0)

    def headers(self, kind: str) -> dict[str, str]:
        """Return OpenAI's headers about a limit."""
        reset = self.seconds_until(self.limit)
        return {
            f"x-ratelimit-limit-{kind}": str(self.limit),
            f"x-ratelimit-remaining-{kind}": str(max(int(self.limit - self.used), 0)),
            f"x-ratelimit-reset-{kind}": f"{math.ceil(reset)}s",
        }


@dataclass(eq=False, slots=True)
class Account:
    """One client: its limits, and its current and past use."""

    label: str  # in metrics
    owner: str  # names the client in stored data, without revealing a key
    shared_owner: str = ""  # the same in what several servers share
    limits: Limits = Limits()
    requests: Allowance | None = None
    tokens: Allowance | None = None
    num_parallel: int = 0  # requests being answered
    num_running: int = 0  # sequences that have started
    num_waiting: int = 0  # sequences that have not started
    num_requests: int = 0
    num_refused: int = 0  # requests with the status 429
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0

    def limit(self, limits: Limits) -> None:
        """Set the limits; unchanged limits keep what has been used of them."""
        old, self.limits = self.limits, limits
        if limits.requests_per_minute != old.requests_per_minute:
            self.requests = Allowance(limits.requests_per_minute) if limits.requests_per_minute else None
        if limits.tokens_per_minute != old.tokens_per_minute:
            self.tokens = Allowance(limits.tokens_per_minute) if limits.tokens_per_minute else None

    def enter(self, *, background: bool) -> None:
        """Count a request until `leave`; raise `ApiError` 429 if a limit is reached. Batch lines have no limits."""
        if not background:
            most = self.limits.max_parallel_requests
            if most is not None and self.num_parallel >= most:
                raise self._refusal(f"{most} requests at a time", 1)
            if self.requests is not None and (seconds := self.requests.seconds_until(1)):
                raise self._refusal(f"{self.requests.limit} requests a minute", seconds)
            if self.tokens is not None and (seconds := self.tokens.seconds_until(1)):
                raise self._refusal(f"{self.tokens.limit} tokens a minute", seconds)
            if self.requests is not None:
                self.requests.used += 1
        self.num_parallel += 1
        self.num_requests += 1

    def leave(self) -> None:
        """End a request that `enter` counted."""
        self.num_parallel -= 1

    def check_prompt(self, count: int) -> None:
        """Raise `ApiError` if a prompt has more tokens than the limit allows now (429) or ever (400)."""
        if self.tokens is None:
            return
        if count > self.tokens.limit:
            message = f"The prompt has {count} tokens, but this API key's limit is {self.tokens.limit} tokens a minute."
            raise ApiError(400, message, code="tokens_per_minute_exceeded")
        if seconds := self.tokens.seconds_until(count):
            raise self._refusal(f"{self.tokens.limit} tokens a minute", seconds)

    def spend(self, count: int) -> None:
        """Count tokens against the limit."""
        if self.tokens is not None:
            self.tokens.used += count

    def follow(self, prompt_tokens: int, generation_tokens: int, *, starts: bool) -> None:
        """Count tokens that a sequence has read and generated; `starts` if they are its first."""
        self.num_waiting -= starts
        self.num_running += starts
        self.num_prompt_tokens += prompt_tokens
        self.num_generation_tokens += generation_tokens

    def finish(self, *, started: bool) -> None:
        """Count the end of a sequence."""
        self.num_running -= started
        self.num_waiting -= not started

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers about the limits."""
        found = self.requests.headers("requests") if self.requests is not None else {}
        return found | (self.tokens.headers("tokens") if self.tokens is not None else {})

    @staticmethod
    def _refusal(limit: str, seconds: float) -> ApiError:
        wait = max(math.ceil(seconds), 1)
        message = f"This API key has reached its limit of {limit}. Retry in {wait} s."
        return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(wait)})


class KeyRing:
    """The valid keys: those of `--api-key`, and those of a file, which is read again after a change."""

    def __init__(self, keys: Sequence[str], path: str | None, secret: bytes) -> None:
        """`secret` goes into the names of owners; raises `ConfigError` for a file that cannot be used."""
        self.guards = bool(keys) or path is not None
        self.accounts: dict[str, Account] = {}  # by owner
        self._given = [KeyLine(hashlib.sha256(key.encode()).digest(), key.encode()) for key in keys]
        self._path = path
        self._secret = secret
        self._by_digest: list[tuple[bytes, Account]] = []
        self._stamp: tuple[int, ...] = ()
        self._lines: list[KeyLine] = []
        self._problem = ""
        self._looked = time.monotonic()
        if path is not None:
            self._stamp, self._lines = _read(path)
        self._use(self._lines)

    def find(self, given: Sequence[bytes], batch_owner: str | None = None) -> Account | None:
        """Return the client that has one of the keys, or that owns the batch to which this line belongs."""
        if self._path is not None and time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked = time.monotonic()
            self._read_again(self._path)
        digests = [hashlib.sha256(key).digest() for key in given]
        # All keys are compared, so that timing does not reveal a near match.
        found = [account for d in digests for own, account in self._by_digest if hmac.compare_digest(d, own)]
        if not found and batch_owner is not None:
            return self.accounts.get(batch_owner)
        return found[0] if found else None

    def _read_again(self, path: str) -> None:
        """Use the file if it has changed; a version that cannot be used is logged and ignored."""
        try:
            self._stamp, lines = _read(path, self._stamp, self._lines)
        except ConfigError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("%s The keys read before stay valid.", error)
            return
        self._problem = ""
        if lines != self._lines:
            self._lines = lines
            self._use(lines)
            logger.info("Read %d keys from %s", len(lines), path)

    def _use(self, lines: list[KeyLine]) -> None:
        before, self.accounts, self._by_digest = self.accounts, {}, []
        for line in lines + self._given:
            named = b"\0" + line.name.encode() if line.name else line.key or line.digest
            owner = hashlib.blake2b(named, key=self._secret, digest_size=16).hexdigest()
            if owner not in self.accounts:
                shared = hashlib.blake2b(named, key=SHARED_SECRET, digest_size=16).hexdigest()
                account = before.get(owner) or Account("", owner, shared)
                account.label = line.name or "key-" + owner[:8]
                account.limit(line.limits)
                self.accounts[owner] = account
            self._by_digest.append((line.digest, self.accounts[owner]))


def _read(
    path: str, known: tuple[int, ...] = (), lines: list[KeyLine] | None = None
) -> tuple[tuple[int, ...], list[KeyLine]]:
    """Return the file's stamp and lines; `lines` if its stamp is the `known` one. Raises `ConfigError`.

    Warns if other users can read keys in it.
    """
    flag = f"--api-key-file {path}"
    try:
        # A pipe without a writer must not stop the server.
        with os.fdopen(os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{flag} is not a file.")
            stamp = found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
            # Two changes within one tick of the clock leave the same stamp.
            if stamp == known and lines is not None and time.time_ns() - found.st_mtime_ns > TICK_NS:
                return stamp, lines
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{flag} has more than {MAX_BYTES} bytes.")
    try:
        lines = list(parse(data.decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} is not UTF-8 text.") from None
    except ConfigError as error:
        raise ConfigError(f"{flag}{error}") from None
    if stamp != known and found.st_mode & stat.S_IROTH and any(line.key is not None for line in lines):
        logger.warning("Every user of this machine can read the keys in %s: chmod 600, or write digests.", path)
    return stamp, lines


def parse(text: str) -> Iterator[KeyLine]:
    """Yield the lines of a key file; raise `ConfigError` with the place and the reason, but no part of a key."""
    seen: set[bytes] = set()
    limits: dict[str, Limits] = {}
    for number, row in enumerate(text.split("\n"), 1):
        words = [*itertools.takewhile(lambda word: not word.startswith("#"), row.split())]
        if not words:
            continue
        try:
            line = _parse_line(words)
        except ValueError as error:
            raise ConfigError(f", line {number}: {error}.") from None
        if line.digest in seen:
            raise ConfigError(f", line {number}: this key appears twice.")
        if line.name and limits.setdefault(line.name, line.limits) != line.limits:
            raise ConfigError(f", line {number}: the keys of {line.name} must have the same limits.")
        seen.add(line.digest)
        if len(seen) > MAX_KEYS:
            raise ConfigError(f" has more than {MAX_KEYS} keys.")
        yield line
    if not seen:
        raise ConfigError(" has no keys.")


def _parse_line(words: list[str]) -> KeyLine:
    """Read a key and its settings; raise `ValueError`."""
    word, settings = words[0], dict[str, str]()
    if not word.isprintable():
        raise ValueError("a key has characters that cannot be printed")
    known = ("name", *Limits.__dataclass_fields__)
    for text in words[1:]:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            hint = nearest(name, known).rstrip(".") if equals and len(name) < 30 else ""
            raise ValueError(f"a key may be followed by {', '.join(known)}, each with = and a value{hint}")
        if name in settings:
            raise ValueError(f"{name} appears twice")
        settings[name] = value
    name = settings.pop("name", "")
    if ("name" in [text.partition("=")[0] for text in words]) and not NAME.fullmatch(name):
        raise ValueError("name must be 1 to 64 letters, digits or characters of _.@-")
    numbers = {}
    for limit, value in settings.items():
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= MOST):
            raise ValueError(f"{limit} must be a whole number from 1 to {MOST}")
        numbers[limit] = int(value)
    if not word.lower().startswith("sha256:"):
        return KeyLine(hashlib.sha256(word.encode()).digest(), word.encode(), name, Limits(**numbers))
    if (found := DIGEST.fullmatch("sha256:" + word[7:])) is None:
        raise ValueError("sha256: must be followed by 64 hexadecimal digits")
    if not name:
        raise ValueError("a digest needs a name, which owns the data stored for its client")
    return KeyLine(bytes.fromhex(found[1]), None, name, Limits(**numbers))
