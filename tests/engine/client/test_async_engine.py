"""The engine in its own process: streams, aborts, the queue, and what its outputs carry."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import msgspec
import pytest
from support.async_engines import ENDLESS, config, read, start, until
from support.checkpoints import TINY

from pyllm import LLM, SamplingParams
from pyllm.engine.client.async_engine import AsyncEngine
from pyllm.engine.client.output_processor import RequestOutput, Wakeup
from pyllm.engine.errors import EngineBusyError, EngineStartError, RequestError
from pyllm.engine.messages import Loading, StartFailed, encode_frame
from pyllm.model.cpu.backend import available
from pyllm.model.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True, scope="module")
def _one_thread_in_the_engine() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
async def engine(tiny_checkpoint, anyio_backend) -> AsyncIterator[AsyncEngine]:
    engine = await start(tiny_checkpoint)
    yield engine
    await engine.shutdown()


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_what_is_loaded_is_logged(tiny_checkpoint, caplog):
    ours, theirs = socket.socketpair()
    with theirs, caplog.at_level("INFO", "pyllm.engine"):
        for message in (Loading(done=3 * 10**9, total=14 * 10**9), StartFailed(message="It is a test.")):
            theirs.sendall(encode_frame(message))
        process = SimpleNamespace(socket=ours, end=lambda seconds: 0, kill=ours.close)
        with pytest.raises(EngineStartError, match=r"It is a test\."):
            await AsyncEngine.start(config(tiny_checkpoint), Tokenizer.from_folder(tiny_checkpoint), process)
    assert caplog.messages == ["Loading the weights: 3.00 of 14.00 GB (21%)"]


async def test_a_stream_gives_what_the_library_gives(engine, tiny_checkpoint):
    each = [
        SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=11, max_tokens=9, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, seed=12, top_p=0.9, max_tokens=9, ignore_eos=True),
    ]
    llm = LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=200)
    prompts = [llm.tokenizer.encode(text) for text in ("One", "Two words", "And three words")]
    expected = llm.generate(prompts, each)
    streams = [engine.submit(f"lib-{i}", *pair) for i, pair in enumerate(zip(prompts, each, strict=True))]
    for stream, completion, prompt in zip(streams, expected, prompts, strict=True):
        outputs = await read(stream)
        assert ids(outputs) == completion.token_ids
        assert "".join(output.text for output in outputs) == completion.text
        found = [(entry.token_id, entry.logprob) for output in outputs for entry in output.logprobs]
        assert [token for token, _ in found] == [entry.token_id for entry in completion.logprobs]
        scores = [entry.logprob for entry in completion.logprobs]
        assert [score for _, score in found] == pytest.approx(scores, abs=1e-4)
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
        last = outputs[-1]
        assert (last.num_prompt_tokens, last.num_output_tokens) == (len(prompt), 9)
        assert 0 < last.times.arrival <= last.times.scheduled <= last.times.first_token <= last.times.last_token
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_hundred_requests_at_once_all_end_whole(engine):
    rng = random.Random(0)
    streams, sizes = [], []
    for i in range(100):
        sizes.append(rng.randint(1, 12))
        params = SamplingParams(max_tokens=sizes[-1], ignore_eos=True, temperature=1.0)
        streams.append(engine.submit(f"many-{i}", [rng.randrange(4, 270) for _ in range(rng.randint(1, 30))], params))
    answers = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 30)
    assert [len(ids(outputs)) for outputs in answers] == sizes
    assert all(outputs[-1].finish_reason == "length" for outputs in answers)
    await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
    assert engine.stats.kv_cache_usage == 0


async def test_an_abort_ends_the_stream_and_frees_the_blocks(engine):
    streams = [engine.submit(f"abort-{i}", [5 + i] * 20, ENDLESS) for i in range(4)]
    for stream in streams:
        await anext(stream)
    await until(lambda: engine.stats.num_running == 4 and engine.stats.kv_cache_usage > 0)
    for stream in streams:
        stream.abort()
        stream.abort()
    for stream in streams:
        assert all(output.finish_reason is None for output in await read(stream))
    await until(lambda: engine.stats.num_running == 0)
    assert engine.stats.kv_cache_usage == 0


async def test_an_abort_before_anything_happened_leaves_nothing(engine):
    for i in range(20):
        engine.submit(f"early-{i}", [9] * 30, ENDLESS).abort()
    assert len(await read(engine.submit("after", [9], SamplingParams(max_tokens=2, ignore_eos=True)))) == 2
    await until(lambda: engine.stats.num_running == 0)
    assert engine.stats.kv_cache_usage == 0


async def test_an_abort_wakes_the_reader(engine):
    stream = engine.submit("waits", [9] * 10, ENDLESS)
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    stream.abort()
    await asyncio.wait_for(reader, 1)


async def test_an_id_may_be_used_again_at_once_after_an_abort(engine):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = ids(await read(engine.submit("second-alone", [100, 101], params)))
    for _ in range(20):
        first = engine.submit("again", [7] * 5, ENDLESS)
        await anext(first)
        first.abort()
        assert ids(await read(engine.submit("again", [100, 101], params))) == expected


async def test_a_stop_string_ends_the_request_in_the_engine_too(engine):
    unstopped = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    free = await read(engine.submit("free", [40, 41, 42], unstopped))
    text = "".join(output.text for output in free)
    stop = text[3:5]
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, stop=(stop,))
    outputs = await read(engine.submit("stopped", [40, 41, 42], params))
    assert "".join(output.text for output in outputs) == text[: text.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    await until(lambda: engine.stats.num_running == 0)
    assert engine.stats.kv_cache_usage == 0


async def test_a_request_that_can_never_run_is_refused_at_once(engine):
    for prompt in ([], [100_000], [5] * 300):
        with pytest.raises(RequestError):
            engine.submit("bad", prompt, SamplingParams(max_tokens=5))
    assert ids(await read(engine.submit("bad", [5], SamplingParams(max_tokens=2, ignore_eos=True))))


async def test_two_running_requests_of_one_name_do_not_mix(engine):
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    apart = [ids(await read(engine.submit("alone", [token], params))) for token in (5, 6)]
    streams = [engine.submit("twin", [token], params) for token in (5, 6)]
    assert [ids(await read(stream)) for stream in streams] == apart


async def test_the_listener_sees_every_step(engine):
    seen = []
    engine.step_listener = seen.append
    try:
        await read(engine.submit("heard", [5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True)))
        await until(lambda: bool(seen) and seen[-1].stats.num_running == 0)
    finally:
        engine.step_listener = None
    assert sum(len(output.token_ids) for step in seen for output in step.outputs) == 4
    assert sum(step.stats.step_tokens for step in seen) == 3 + 3


async def test_one_wakeup_serves_many_streams(engine):
    wakeup = Wakeup()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    streams = [engine.submit(f"shared-{i}", [5 + i], params, wakeup=wakeup) for i in range(3)]
    taken = [[] for _ in streams]
    while not all(outputs and outputs[-1].finish_reason for outputs in taken):
        await asyncio.wait_for(wakeup.wait(), 5)
        for outputs, stream in zip(taken, streams, strict=True):
            outputs += stream.drain()
    assert [len(ids(outputs)) for outputs in taken] == [6, 6, 6]
    assert streams[0].drain() == []


async def test_requests_beyond_the_queue_are_refused(tiny_checkpoint):
    small = dataclasses.replace(config(tiny_checkpoint), max_num_seqs=2, max_num_queued_reqs=3)
    engine = await AsyncEngine.start(small, Tokenizer.from_folder(tiny_checkpoint))
    try:
        with pytest.raises(RequestError, match="at most 5 sequences at once, but got 6"):
            engine.check_room(6)
        engine.check_room(5)
        streams = [engine.submit(f"run-{i}", [5] * 10, ENDLESS) for i in range(5)]
        with pytest.raises(EngineBusyError, match="at most 3 requests can wait") as caught:
            engine.submit("late", [5], ENDLESS)
        assert caught.value.retry_after == 1, "nothing is known of the pace yet"
        await until(lambda: (engine.stats.num_running, engine.stats.num_waiting) == (2, 3))
        with pytest.raises(EngineBusyError):
            engine.check_room()
        for stream in streams[:2]:
            stream.abort()
        engine.check_room(2)
        with pytest.raises(EngineBusyError):
            engine.check_room(3)
    finally:
        await engine.shutdown()


async def test_queue_place_is_free_as_soon_as_a_request_ends(tiny_checkpoint):
    """All that run end in one step, while others wait: at that moment nothing runs.

    They begin in one step only if they arrive together, so there are several attempts.
    """
    small = dataclasses.replace(config(tiny_checkpoint), max_num_seqs=2, max_num_queued_reqs=3)
    engine = await AsyncEngine.start(small, Tokenizer.from_folder(tiny_checkpoint))
    left, refusals, seen = 5, [], set()

    def look(message):
        nonlocal left
        left -= sum(output.finish_reason is not None for output in message.outputs)
        seen.add((engine.stats.num_running, engine.stats.num_waiting))
        try:
            engine.check_room(5 - left)
        except EngineBusyError as error:
            refusals.append((left, str(error)))

    engine.step_listener = look
    try:
        for attempt in range(50):
            left = 5
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            for stream in [engine.submit(f"r{attempt}-{n}", [5], params) for n in range(5)]:
                await read(stream)
            assert refusals == []
            if any(running == 0 and waiting > 0 for running, waiting in seen):
                return
        pytest.fail("no step ended all running requests while others waited")
    finally:
        await engine.shutdown()


async def test_retry_after_follows_the_completion_rate(tiny_checkpoint, monkeypatch):
    small = dataclasses.replace(config(tiny_checkpoint), max_num_seqs=1, max_num_queued_reqs=9)
    engine = await AsyncEngine.start(small, Tokenizer.from_folder(tiny_checkpoint))
    try:
        ended_before_a_pause = engine.submit("first", [5], SamplingParams(max_tokens=1, ignore_eos=True))
        await read(ended_before_a_pause)
        assert engine._seconds_until(100) == 1
        short = [engine.submit("short", [5], SamplingParams(max_tokens=1, ignore_eos=True)) for _ in range(4)]
        engine.submit("long", [5] * 10, ENDLESS)
        for stream in short:
            await read(stream)
        await until(lambda: (engine.stats.num_running, engine.stats.num_waiting) == (1, 0))
        for _ in range(9):
            engine.submit("long", [5] * 10, ENDLESS)
        now = time.monotonic()
        for seconds, expected in ((0, {1}), (20, range(10, 20)), (10_000, {60})):  # two places; four ended so long ago
            monkeypatch.setattr(time, "monotonic", lambda ago=seconds: now + ago)
            with pytest.raises(EngineBusyError) as caught:
                engine.check_room(2)
            assert caught.value.retry_after in expected
        monkeypatch.undo()
    finally:
        await engine.shutdown()


async def test_a_salt_keeps_prefixes_apart(engine):
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = [random.Random(1).randrange(4, 270) for _ in range(64)]
    cached = []
    for salt in ("a", "a", "b", None, None):
        cached.append((await read(engine.submit("salted", prompt, params, cache_salt=salt)))[-1].num_cached_tokens)
    assert cached[0] == cached[2] == cached[3] == 0
    assert min(cached[1], cached[4]) > 0


async def test_a_prompt_s_states_and_logprobs_cross_the_border(engine, tiny_checkpoint):
    llm = LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=200)
    prompt = llm.tokenizer.encode("What crosses the border")
    rules = {"logit_bias": {40: 3.5}, "bad_words": ((41,), (42, 43)), "allowed_token_ids": tuple(range(30, 90))}
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=2, **rules)
    streams = [
        engine.submit("asking", prompt, params),
        engine.submit("mean", prompt, SamplingParams(), pooling="mean"),
        engine.submit("last", [7] * engine.info.config.max_model_len, SamplingParams(), pooling="last"),
    ]
    asking, mean, last = [await read(stream) for stream in streams]
    expected = llm.generate([prompt], params)[0]
    assert ids(asking) == expected.token_ids
    prompts = zip(asking[0].prompt_logprobs, expected.prompt_logprobs, strict=True)
    pairs = [*prompts, *zip([entry for output in asking for entry in output.logprobs], expected.logprobs, strict=True)]
    for found, wanted in pairs:
        if available(TINY):  # to the bit; plain torch rounds by the shape of the step
            assert found == wanted
        assert (found.token_id, found.rank) == (wanted.token_id, wanted.rank)
        assert [token for token, _ in found.top] == [token for token, _ in wanted.top]
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)
    assert all(output.prompt_logprobs == [] for output in asking[1:])
    for outputs, wanted in ((mean, llm.embed([prompt])), (last, llm.embed([[7] * 256], "last"))):
        assert [output.finish_reason for output in outputs] == ["stop"]
        assert outputs[0].embedding == pytest.approx(wanted[0], abs=1e-6)
        assert outputs[0].times.arrival < outputs[0].times.scheduled < outputs[0].times.last_token
    with pytest.raises(RequestError, match="257 tokens"):
        engine.submit("long", [7] * (engine.info.config.max_model_len + 1), SamplingParams(), pooling="mean")


async def test_each_client_keeps_a_share_of_a_full_queue(tiny_checkpoint):
    small = dataclasses.replace(config(tiny_checkpoint), max_num_seqs=2, max_num_queued_reqs=4)
    engine = await AsyncEngine.start(small, Tokenizer.from_folder(tiny_checkpoint))
    try:
        streams = []
        for client, places in (("greedy", 6), ("other", 3), ("third", 2)):
            streams += [engine.submit(client, [5] * 10, ENDLESS, client=client) for _ in range(places)]
            for full in {stream.client for stream in streams}:
                with pytest.raises(EngineBusyError, match="at most 4 requests can wait"):
                    engine.submit("more", [5], ENDLESS, client=full)
        with pytest.raises(EngineBusyError):
            engine.submit("without a name", [5], ENDLESS)
        for stream in streams:
            stream.abort()
        assert len(await read(engine.submit("after", [9], SamplingParams(max_tokens=2, ignore_eos=True)))) == 2
    finally:
        await engine.shutdown()


async def test_the_size_of_unfinished_requests_is_bounded(tiny_checkpoint, monkeypatch):
    """They are held in both processes: a queue of long lists would take gigabytes."""
    monkeypatch.setattr("pyllm.engine.client.async_engine.MAX_HELD_BYTES", 36_000)
    listed = msgspec.structs.replace(ENDLESS, allowed_token_ids=tuple(range(4, 204)))
    engine = await start(tiny_checkpoint)
    try:
        streams = [engine.submit(f"list-{n}", [5], listed, client="a") for n in range(4)]
        with pytest.raises(EngineBusyError, match="too much memory"):
            engine.submit("more", [5], listed, client="a")
        streams.append(engine.submit("other", [5], listed, client="b"))  # its share is free
        streams.pop(0).abort()
        streams.pop(0).abort()
        engine.submit("again", [5], listed, client="a").abort()
    finally:
        await engine.shutdown()
