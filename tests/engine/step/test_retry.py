"""A step that fails: who is to blame, what the others get, and that the books are right afterwards."""

from __future__ import annotations

import json
import logging

import pytest
from support.faults import FaultyRunner
from support.paged_runner import expected, finish, make_core, message, tokens_of

from pyllm import LLM, SamplingParams
from pyllm.engine.grammar.state import GrammarState
from pyllm.engine.messages import StepOutputs, TokenOutput
from pyllm.engine.step.core import EngineCore
from pyllm.engine.step.drafting import Drafter
from pyllm.engine.step.request import Request

PROMPTS = {f"r{n}": [n + 1] * (3 * n + 1) for n in range(7)}


def fail_when(core: EngineCore, judge) -> list[list[str]]:
    """Let each step fail that `judge` says of its requests' ids; the list gets the ids of all that are tried."""
    execute, tried = core.runner.execute, []

    def faulty(sequences):
        tried.append([sequence.request.request_id for sequence in sequences])
        if judge(tried[-1]):
            raise RuntimeError("a secret of the inside")
        return execute(sequences)

    core.runner.execute = faulty
    return tried


def start(**sizes) -> EngineCore:
    core = make_core(**sizes)
    for name, prompt in PROMPTS.items():
        core.add_request(message(name, prompt, max_tokens=9, ignore_eos=True))
    return core


def check_others(outputs: dict[str, list[TokenOutput]], failed: set[str]) -> None:
    for name, prompt in PROMPTS.items():
        if name in failed:
            assert (outputs[name][-1].finish_reason, outputs[name][-1].refused) == ("error", False)
        else:
            params = message("", [1], max_tokens=9, ignore_eos=True).params
            assert tokens_of(outputs[name]) == expected(prompt, params)[0]


@pytest.mark.parametrize("sizes", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 3}, {"num_blocks": 16}])
@pytest.mark.parametrize("failed", [{"r0"}, {"r6"}, {"r2", "r3"}, {"r0", "r1", "r2", "r3", "r4", "r5"}, set(PROMPTS)])
def test_only_those_to_blame_end_and_the_others_are_unchanged(failed, sizes):
    core = start(**sizes)
    fail_when(core, lambda names: bool(failed & set(names)))
    check_others(finish(core), failed)


def test_a_fault_that_strikes_later_ends_its_request_there():
    core = start()
    tried = fail_when(core, lambda names: "r4" in names and len(tried) > 5)
    outputs = finish(core)
    check_others(outputs, {"r4"})
    assert 0 < len(tokens_of(outputs["r4"])) < 9


@pytest.mark.parametrize("times", [1, 3])
def test_a_step_that_fails_temporarily_ends_no_request(times):
    core = start()
    tried = fail_when(core, lambda names: len(tried) <= times and len(names) > 1)
    check_others(finish(core), set())


def test_a_request_alone_is_tried_twice():
    core = make_core()
    core.add_request(message("r", [1, 2], max_tokens=3, ignore_eos=True))
    tried = fail_when(core, lambda names: len(tried) == 1)
    assert finish(core)["r"][-1].finish_reason == "length"


@pytest.mark.parametrize("count", [1, 7])
def test_engine_that_fails_every_step_gives_up(count):
    core = make_core()
    for name, prompt in list(PROMPTS.items())[:count]:
        core.add_request(message(name, prompt, max_tokens=9))
    tried = fail_when(core, lambda names: True)
    with pytest.raises(RuntimeError, match="a secret of the inside"):
        core.step()
    assert len(tried) <= 2 * count + 2


def test_a_page_that_others_share_is_not_touched_by_the_trial():
    core = make_core()
    prompt = list(range(1, 17))
    params = {"max_tokens": 4, "ignore_eos": True}
    core.add_request(message("first", prompt, **params))
    before = tokens_of(finish(core)["first"])
    core.add_request(message("bad", prompt, **params))
    fail_when(core, lambda names: "bad" in names)
    finish(core)
    core.add_request(message("last", prompt, **params))
    outputs = finish(core)["last"]
    assert tokens_of(outputs) == before
    assert outputs[0].num_cached_tokens > 0


def test_a_token_that_cannot_be_taken_ends_its_request_alone(monkeypatch):
    core = start()
    core.step()
    append = Request.append

    def faulty(self, token_id):
        append(self, token_id)
        if self.request_id == "r3":
            raise RuntimeError("not taken")

    monkeypatch.setattr(Request, "append", faulty)
    outputs: dict[str, list[TokenOutput]] = {}
    while core.has_work:
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    core.check_idle()
    assert outputs["r3"][-1].finish_reason == "error"
    assert {outputs[name][-1].finish_reason for name in PROMPTS if name != "r3"} == {"length"}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=200)


def test_failed_grammar_mask_ends_its_request_alone(llm, monkeypatch, caplog):
    fill = GrammarState.fill

    def faulty(self, bits):
        if self is spoiled[0]:
            raise ValueError("no mask")
        fill(self, bits)

    spoiled = [None]
    grammar = json.dumps({"grammars": [{"lark_grammar": "start: /[a-z]{40}/"}]})
    each = [SamplingParams(max_tokens=20, ignore_eos=True, seed=n, grammar=grammar if n else None) for n in range(3)]
    prompts = [[5 + n] * 9 for n in range(3)]
    alone = llm.generate(prompts, each)
    monkeypatch.setattr(GrammarState, "fill", faulty)
    step = llm.core.step

    def step_and_spoil() -> StepOutputs:
        outputs = step()
        spoiled[0] = next((r.grammar for r in llm.core.scheduler.running if r.request_id == "2"), None)
        return outputs

    monkeypatch.setattr(llm.core, "step", step_and_spoil)
    with caplog.at_level(logging.ERROR, logger="pyllm.engine"):
        mixed = llm.generate(prompts, each)
    assert mixed[:2] == alone[:2]
    assert mixed[2].finish_reason == "error"
    assert "no mask" in caplog.text


def test_retried_step_reads_its_prompt_once(llm, monkeypatch):
    prompts = [[7 + n] * 60 for n in range(3)]
    expected_states = llm.embed(prompts)
    failing = iter([True])
    execute = llm.core.runner.execute

    def fail_at_the_end(sequences):
        sampled = execute(sequences)
        if next(failing, False):
            raise RuntimeError("too late")
        return sampled

    monkeypatch.setattr(llm.core.runner, "execute", fail_at_the_end)
    assert llm.embed(prompts) == expected_states


def test_a_guess_that_cannot_be_made_costs_its_request_nothing(tiny_checkpoint, monkeypatch):
    llm = LLM(
        str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=200,
        speculative_config={"method": "ngram"},
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    whole = llm.generate([[5, 6, 7] * 9], params)
    monkeypatch.setattr(Drafter, "propose", lambda self, tokens, most: 1 / 0)
    assert llm.generate([[5, 6, 7] * 9], params) == whole


@pytest.mark.parametrize(
    "text", ["hang", "hang@", "burn@marked", "hang@bad", "hang@0", "hang@#", "hang@0#1", "slow@marked,exit@c0ffee"]
)
def test_a_fault_that_would_hit_no_request_or_any_is_refused(text):
    with pytest.raises(ValueError, match="a fault is kind@marker"):
        FaultyRunner(make_core().runner, text)
