"""Requests that arrive and are aborted at any time, and what each of them must get: what it gets alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import strategies as st
from support.paged_runner import VOCAB, expected, message

from pyllm.engine.messages import EngineRequest
from pyllm.engine.step.core import EngineCore

PROMPTS = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30) | st.integers(1, 30).map(lambda n: [1] * n)
STOP_IDS = st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple)
ABORTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=3)
"""(step after which it is aborted, number of the request)"""


@dataclass(frozen=True)
class Arrival:
    """One request of a crowd."""

    request: EngineRequest
    wait: int  # steps until the next one arrives
    stop_after: int | None  # output tokens after which the client aborts it, as it does at a stop string


def crowds(stop_after: st.SearchStrategy[int | None] | None = None, **params: st.SearchStrategy[Any]):
    """Lists of arrivals, with the sampling parameters `params`."""

    def arrival(prompt, wait, priority, cache_salt, stop_after, params) -> Arrival:
        if "min_tokens" in params:
            params = params | {"min_tokens": min(params["min_tokens"], params["max_tokens"])}
        return Arrival(message("", prompt, priority=priority, cache_salt=cache_salt, **params), wait, stop_after)

    params = {"max_tokens": st.integers(1, 30), "stop_token_ids": STOP_IDS, "ignore_eos": st.booleans(), **params}
    salts = st.sampled_from([None, None, "salt"])
    one = st.builds(
        arrival,
        PROMPTS,
        st.integers(0, 4),
        st.integers(0, 1),
        salts,
        st.none() if stop_after is None else stop_after,
        st.fixed_dictionaries(params),
    )
    return st.lists(one, min_size=1, max_size=9)


def sizes(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of an engine, with enough blocks for one request."""

    def with_blocks(values: dict[str, Any]) -> dict[str, Any]:
        return values | {"num_blocks": -(-64 // values["block_size"]) + values["num_blocks"]}

    return st.fixed_dictionaries({
        "max_num_seqs": st.integers(1, 8), "max_num_batched_tokens": st.integers(1, 40),
        "block_size": st.integers(1, 9), "num_blocks": st.integers(0, 20), "enable_prefix_caching": st.booleans(),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]), **more,
    }).map(with_blocks)  # fmt: skip


def check_crowd(core: EngineCore, crowd: list[Arrival], aborts: list[tuple[int, int]]) -> None:
    """Run a crowd to its end and check every output."""
    wanted: dict[str, tuple[list[int], str]] = {}
    got: dict[str, tuple[list[int], str | None]] = {}
    stop_after = {str(i): arrival.stop_after for i, arrival in enumerate(crowd)}
    pending = list(enumerate(crowd))
    wait = step = 0
    gone: set[str] = set()
    while pending or core.has_work:
        while pending and (wait <= 0 or not core.has_work):
            i, arrival = pending.pop(0)
            request, wait = msgspec.structs.replace(arrival.request, request_id=str(i)), arrival.wait
            core.add_request(request)
            wanted[str(i)] = expected(request.prompt_token_ids, request.params)
        wait -= 1
        before = set(gone)
        for output in core.step().outputs:
            name = output.request_id
            assert name not in before, "nothing comes after an abort"
            if name in gone:  # one step may bring two tokens
                continue
            tokens, reason = got.get(name, ([], None))
            assert reason is None, "nothing comes after the end"
            got[name] = (tokens + output.token_ids, output.finish_reason)
            most = stop_after[name]
            if most is not None and len(got[name][0]) >= most:
                core.abort([name])
                gone.add(name)
        for at, index in aborts:
            if at == step:
                core.abort([str(index)])
                gone |= {str(index)} & set(wanted)
        step += 1
    core.check_idle()
    for name, (tokens, reason) in wanted.items():
        if name not in gone:
            assert got[name] == (tokens, reason)
        elif name in got:
            assert got[name][0] == tokens[: len(got[name][0])]
