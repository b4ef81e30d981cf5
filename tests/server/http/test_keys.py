"""Keys from a file: whose they are, what they may use, and what becomes of a change."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time

import pytest
from support.answers import error_of
from support.async_engines import until

from pyllm.server.flags import ConfigError
from pyllm.server.http.errors import ApiError
from pyllm.server.http.keys import KeyRing, Limits

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
DIGEST = hashlib.sha256(b"secret-two").hexdigest()


@pytest.fixture
def clock(monkeypatch):
    """A function that moves the time forward."""
    ahead, real = [0.0], time.monotonic

    def pass_time(seconds):
        ahead[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    return pass_time


def write(path, text, mode=0o600):
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def ring(path, *keys):
    return KeyRing(keys, str(path), b"s" * 32)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_line_has_a_key_or_its_digest_a_name_and_limits(tmp_path):
    text = f"""
        # keys of the office
        secret-one\t#plain
        SHA256:{DIGEST.upper()} name=two requests_per_minute=5 tokens-per-minute=70 max_parallel_requests=2
        schlüssel#3 name=three
        sha256:{hashlib.sha256(b"new-three").hexdigest()} name=three
    """
    keys = ring(write(tmp_path / "keys", "\ufeff" + text.replace("\n", "\r\n")), "given")
    found = {word: keys.find([word.encode()]) for word in ("secret-one", "secret-two", "schlüssel#3", "given")}
    assert [found[word].label for word in ("secret-two", "schlüssel#3")] == ["two", "three"]
    assert found["secret-two"].limits == Limits(5, 70, 2)
    assert found["secret-one"].limits == found["given"].limits == Limits()
    assert keys.find([b"new-three"]) is found["schlüssel#3"], "lines of one name are one client"
    assert len({account.owner for account in found.values()}) == 4
    for word in ("", "secret", "secret-one ", "name=two", DIGEST, f"sha256:{DIGEST}", "#"):
        assert keys.find([word.encode()]) is None, word
    assert keys.find([], found["given"].owner) is found["given"]
    labels = " ".join(account.label + account.owner for account in keys.accounts.values())
    assert "secret" not in labels


def test_an_unnamed_key_has_one_owner_wherever_it_is_given(tmp_path):
    path = write(tmp_path / "keys", "alpha\nbeta name=b")
    inside, outside = ring(path), KeyRing(("alpha", "beta"), None, b"s" * 32)
    owners = [[keys.find([key]).owner for key in (b"alpha", b"beta")] for keys in (inside, outside)]
    assert owners[0][0] == owners[1][0]
    assert owners[0][1] != owners[1][1], "a named one belongs to the name"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no keys"),
        ("# none\n\n", "has no keys"),
        ("sk-1\nsk-1", "line 2: this key appears twice"),
        ("sk-1 sk-2", "line 1: a key may be followed by name, requests_per_minute"),
        ("\nsk-1 limit=sk-2", "line 2: a key may be followed by"),
        ("sk-1 request_per_minute=5", "did you mean requests_per_minute?"),
        ("sk-1 requests_per_minute=0", "line 1: requests_per_minute must be a whole number from 1 to 1000000000000"),
        ("sk-1 tokens_per_minute=-1", "tokens_per_minute must be"),
        ("sk-1 tokens_per_minute=1e9", "tokens_per_minute must be"),
        ("sk-1 tokens_per_minute=" + "9" * 5000, "tokens_per_minute must be"),
        ("sk-1 max_parallel_requests=²", "max_parallel_requests must be"),
        ("sk-1 max_parallel_requests=", "max_parallel_requests must be"),
        ("sk-1 name=", "name must be 1 to 64"),
        ("sk-1 name=a/b", "name must be 1 to 64"),
        ("sk-1 name=" + "n" * 65, "name must be 1 to 64"),
        ("sk-1 name=a name=b", "name appears twice"),
        ("sk-1 name=a tokens_per_minute=5\nsk-2 name=a", "line 2: the keys of a must have the same limits"),
        ("sha256:sk-1", "sha256: must be followed by 64 hexadecimal digits"),
        (f"sha256:{DIGEST}", "a digest needs a name"),
        (f"sha256:{DIGEST} name=a\nsecret-two", "line 2: this key appears twice"),
        ("sk-1\n" * 1 + "".join(f"sk-{n}\n" for n in range(2, 1100)), "more than 1024 keys"),
        ("sk-1 #" + "x" * 2**20, "more than 1048576 bytes"),
        (b"sk-\xff1", "is not UTF-8 text"),
        (b"\0" * 3000, "line 1: a key has characters that cannot be printed"),
        ("sk-1\nsk-\u200b2", "line 2: a key has characters that cannot be printed"),
        ("pipe", "is not a file"),
        ("folder", "Is a directory"),
        ("missing", "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, reason):
    path = tmp_path / "keys"
    if text == "pipe":
        os.mkfifo(path)
    elif text == "folder":
        path.mkdir()
    elif text != "missing":
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        ring(path)
    assert str(caught.value).startswith(f"--api-key-file {path}")
    assert "\n" not in str(caught.value)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(("text", "mode", "warns"), [
    ("sk-1", 0o644, True), ("sk-1", 0o640, False), (f"sha256:{DIGEST} name=a", 0o644, False),
])  # fmt: skip
def test_keys_that_every_user_can_read_are_a_warning(tmp_path, caplog, text, mode, warns):
    ring(write(tmp_path / "keys", text, mode))
    assert ("chmod 600" in caplog.text) == warns
    assert "sk-1" not in caplog.text


def test_a_change_holds_without_a_restart(tmp_path, caplog, clock):
    path = tmp_path / "keys"
    write(path, "old name=a requests_per_minute=9\nother")
    keys = ring(path)
    first, other = keys.find([b"old"]), keys.find([b"other"])
    first.enter(background=False)
    write(path, "new name=a requests_per_minute=9\nother tokens_per_minute=5")
    clock(2)
    assert keys.find([b"old"]) is None
    assert keys.find([b"new"]) is first, "the client is the same"
    assert first.requests.used > 0.5
    assert other.limits.tokens_per_minute == 5
    for broken in ("new name=\n", "", None):
        path.unlink() if broken is None else write(path, broken)
        caplog.clear()
        for _ in range(3):
            clock(2)
            assert keys.find([b"new"]) is first
            assert keys.find([b"old"]) is None
        (record,) = caplog.records
        assert record.getMessage().startswith(f"--api-key-file {path}")
        assert record.getMessage().endswith("The keys read before stay valid.")
    replaced = tmp_path / "replaced"
    write(replaced, "newest")
    replaced.rename(path)
    clock(2)
    assert keys.find([b"newest"]) is not None
    assert keys.find([b"new"]) is keys.find([b"other"]) is None


@pytest.fixture
def limited(make_harness, tmp_path):
    """Return a harness whose file has the line."""
    return lambda line: make_harness(api_key_file=write(tmp_path / "keys", line + "\nfree\n"))


def test_requests_a_minute_are_bounded(limited, clock):
    harness = limited("key name=team requests_per_minute=2")
    ask = lambda: harness.post("/v1/chat/completions", CHAT, headers=bearer("key"))  # noqa: E731
    first, second, third = ask(), ask(), ask()
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)] == ["1", "0", "0"]
    assert third.headers["x-ratelimit-reset-requests"] == "60s"
    error = error_of(third)
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert error.message == "This API key has reached its limit of 2 requests a minute. Retry in 30 s."
    assert third.headers["retry-after"] == "30"
    other = harness.post("/v1/messages", CHAT, headers={"x-api-key": "key"})
    assert other.json()["error"]["type"] == "rate_limit_error"
    assert harness.get("/v1/models", **bearer("key")).status_code == 200, "only work counts"
    assert (
        "x-ratelimit-limit-requests" not in harness.post("/v1/chat/completions", CHAT, headers=bearer("free")).headers
    )
    clock(30)
    assert [ask().status_code, ask().status_code] == [200, 429]
    text = harness.get("/metrics").text
    labels = 'key="team",model_name="org/tiny"'
    for name, value in (("requests_total", 3), ("refused_total", 3), ("running", 0), ("waiting", 0)):
        assert f"pyllm:key_{name}{{{labels}}} {value}.0" in text


def test_tokens_a_minute_are_bounded(limited, clock):
    harness = limited("key name=team tokens_per_minute=60")
    ask = lambda **fields: harness.post("/v1/completions", {"prompt": [3] * 20} | fields, headers=bearer("key"))  # noqa: E731
    answer = ask(max_tokens=35, ignore_eos=True)
    assert answer.json()["usage"]["total_tokens"] == 55
    assert answer.headers["x-ratelimit-limit-tokens"] == "60"
    refused = ask()
    assert (refused.status_code, error_of(refused).code) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "15"
    clock(15)
    assert ask(max_tokens=50, ignore_eos=True, n=2).status_code == 200, "what is generated may go beyond it"
    assert int(ask().headers["retry-after"]) > 100
    clock(1000)
    assert ask(max_tokens=1).status_code == 200
    large = ask(prompt=[3] * 61)
    assert (large.status_code, error_of(large).code) == (400, "tokens_per_minute_exceeded")
    text = harness.get("/metrics").text
    labels = 'key="team",model_name="org/tiny"'
    assert f"pyllm:key_prompt_tokens_total{{{labels}}} 60.0" in text
    assert f"pyllm:key_generation_tokens_total{{{labels}}} 136.0" in text


def test_parallel_requests_are_bounded(limited):
    harness = limited("key name=team max_parallel_requests=2")
    harness.engine.hold_after = 1

    async def flood(client):
        post = lambda: client.post("/v1/chat/completions", json=CHAT, headers=bearer("key"))  # noqa: E731
        held = [asyncio.ensure_future(post()) for _ in range(2)]
        await until(lambda: len(harness.engine.running) == 2)
        await asyncio.sleep(0.05)
        shown = (await client.get("/metrics")).text
        third = await post()
        free = asyncio.ensure_future(client.post("/v1/chat/completions", json=CHAT, headers=bearer("free")))
        await asyncio.sleep(0.05)
        harness.engine.release.set()
        return third, [(await answer).status_code for answer in [*held, free]], (await post()).status_code, shown

    third, held, after, shown = harness.run(flood)
    assert (third.status_code, error_of(third).code, third.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert held == [200, 200, 200]
    assert after == 200
    assert 'pyllm:key_running{key="team",model_name="org/tiny"} 2.0' in shown
    assert harness.service.keys.find([b"key"]).num_parallel == 0


def test_lines_of_batches_are_counted_but_not_limited(tmp_path):
    account = ring(write(tmp_path / "keys", "key requests_per_minute=1 max_parallel_requests=1")).find([b"key"])
    for _ in range(3):
        account.enter(background=True)
        account.leave()
    account.enter(background=False)
    with pytest.raises(ApiError, match="limit of 1 requests at a time"):
        account.enter(background=False)
    account.leave()
    with pytest.raises(ApiError, match="limit of 1 requests a minute"):
        account.enter(background=False)
    assert account.num_requests == 4


def test_what_is_stored_belongs_to_the_name(limited):
    harness = limited("one name=team\ntwo name=team")
    kept = harness.post("/v1/responses", {"input": "Remember", "max_output_tokens": 2}, headers=bearer("one")).json()
    statuses = {key: harness.get(f"/v1/responses/{kept['id']}", **bearer(key)).status_code for key in ("two", "free")}
    assert statuses == {"two": 200, "free": 404}


def test_a_file_of_keys_guards_like_the_flag(limited):
    harness = limited("one")
    assert harness.get("/health").status_code == 200
    assert harness.get("/v1/models").status_code == 401
    assert harness.get("/v1/models", **bearer("two")).status_code == 401
    for key in ("one", "free"):
        assert harness.post("/v1/chat/completions", CHAT, headers=bearer(key)).status_code == 200
    assert len(set(harness.engine.clients)) == 2, "fair between them"
