"""Grammars in the engine: what they shape, what they combine with, and whom they cannot harm."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TINY, write_checkpoint

from pyllm import LLM, SamplingParams
from pyllm.engine.errors import RequestError
from pyllm.engine.grammar.checker import WAIT_SECONDS
from pyllm.engine.grammar.state import GrammarState, MaskMaker
from pyllm.engine.messages import CheckGrammar, EngineRequest, GrammarVerdict
from pyllm.model.config import DeepConfig
from pyllm.model.cpu.backend import available

EOS = 0
PROMPT = [5, 6, 7]
DIGITS = "start: /[0-9]{3,8}/"
ENDLESS = "start: /[a-z]+/"
SCHEMA = json.dumps({
    "grammars": [{"json_schema": {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"enum": [1, True, None]}},
        "x-guidance": {"whitespace_pattern": " "},
    }}]
})  # fmt: skip


def of_schema(schema: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


BOMBS = {
    "a large prime": of_schema({"type": "integer", "multipleOf": 215656441}),
    "patterns at once": of_schema({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(5, 30)]}),
    "unending rules": "start: a\na: b\nb: a",
    "rules that repeat": 'start: "a"{1000000}',
    "deep parentheses": "start: /" + "(" * 20_000 + ")" * 20_000 + "/",
    "deep rules": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "many optional properties": of_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}
    ),
    "a reference to itself": of_schema({"$ref": "#"}),
    "no grammar": "start: (",
    "half a character": "start: \ud83d",
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return make_llm(tiny_checkpoint)


def make_llm(folder, **settings: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "quiet": True, "num_kv_blocks": 1024, "seed": 1}
    return LLM(str(folder), **(defaults | settings))


def params(grammar: str | None = None, seed: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(grammar=grammar, **({"seed": seed, "max_tokens": 60} | fields))


def request(name: str, own: SamplingParams, prompt: list[int] = PROMPT) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=own)


def test_every_kind_of_grammar_shapes_the_text(llm):
    regex = json.dumps({"grammars": [{"lark_grammar": "start: /a(b|c){2,5}d/"}]})
    grammars = [DIGITS, regex, SCHEMA, 'start: "yes" | "no"'] * 10
    outputs = llm.generate([PROMPT] * 40, [params(grammar, seed=i) for i, grammar in enumerate(grammars)])
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert all(re.fullmatch("[0-9]{3,8}", output.text) for output in outputs[0::4])
    assert all(re.fullmatch("a[bc]{2,5}d", output.text) for output in outputs[1::4])
    for output in outputs[2::4]:
        value = json.loads(output.text)
        assert set(value) == {"a", "b"}
        assert len(value["a"]) <= 6
        assert value["b"] in (1, None)
    assert {output.text for output in outputs[3::4]} == {"yes", "no"}


def test_complete_text_ends_without_an_eos_token(llm):
    output = llm.generate([PROMPT], params("start: /[0-9]{4}/", skip_special_tokens=False))[0]
    assert output.finish_reason == "stop"
    assert output.stop_reason is None
    assert len(output.token_ids) == len(output.text) == 4


def test_the_end_mark_comes_only_where_the_text_may_end(llm):
    outputs = llm.generate([PROMPT] * 30, [params(DIGITS, seed=i, logit_bias={EOS: 100.0}) for i in range(30)])
    assert {len(output.text) for output in outputs} == {3}
    assert {output.token_ids[-1] for output in outputs} == {EOS}
    # ignore_eos continues for as long as the grammar lets it.
    outputs = llm.generate([PROMPT] * 9, [params(DIGITS, seed=i, ignore_eos=True) for i in range(9)])
    assert {(len(output.text), output.finish_reason) for output in outputs} == {(8, "stop")}


def test_max_tokens_cuts_the_text(llm):
    output = llm.generate([PROMPT], params(ENDLESS, max_tokens=7, ignore_eos=True))[0]
    assert output.finish_reason == "length"
    assert re.fullmatch("[a-z]{7}", output.text)


def test_greedy_penalties_logprobs_seeds_and_stops_go_with_it(llm):
    best = llm.generate([PROMPT] * 2, params(ENDLESS, temperature=0.0, max_tokens=5, ignore_eos=True))
    assert best[0] == best[1]
    costly = params(
        ENDLESS, temperature=0.0, max_tokens=26, ignore_eos=True, presence_penalty=2.0, repetition_penalty=100.0
    )
    varied = llm.generate([PROMPT], costly)[0]
    assert len(set(varied.text)) > len(set(best[0].text))
    scored = llm.generate([PROMPT], params(DIGITS, logprobs=3))[0]
    raw = llm.generate([PROMPT + scored.token_ids[:1]], params(None, logprobs=3, max_tokens=1))[0]
    # Of the raw distribution: the most likely tokens are those of a request without a grammar.
    assert [token for token, _ in scored.logprobs[1].top] == [token for token, _ in raw.logprobs[0].top]
    assert any(token not in scored.token_ids for token, _ in scored.logprobs[0].top)
    first, again, other = llm.generate(
        [PROMPT] * 3, [params(SCHEMA, seed=5), params(SCHEMA, seed=5), params(SCHEMA, seed=6)]
    )
    assert first == again != other
    stopped = llm.generate([PROMPT], params("start: /[ab]{50}/", stop=("aa",)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == "aa"
    b = llm.tokenizer.encode("b")[0]
    stopped = llm.generate([PROMPT], params("start: /[ab]{50}/", stop_token_ids=(b,)))[0]
    assert stopped.stop_reason == b
    assert set(stopped.text) <= {"a"}


@pytest.mark.parametrize("rule", [
    {"min_tokens": 20},
    {"allowed_token_ids": (EOS,)},
    {"bad_words": tuple((token,) for token in range(5, 260))},
    {"logit_bias": dict.fromkeys(range(5, 260), -100.0)},
    {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0},
])  # fmt: skip
def test_no_other_rule_breaks_a_grammar(llm, rule):
    output = llm.generate([PROMPT], params("start: /[0-9]{4,6}/", **rule))[0]
    assert output.finish_reason == "stop"
    assert re.fullmatch("[0-9]{4,6}", output.text)


def test_allowed_tokens_narrow_a_grammar_where_they_can(llm):
    five, six = llm.tokenizer.encode("56")
    output = llm.generate([PROMPT], params("start: /[0-9]{9}/", allowed_token_ids=(five, six)))[0]
    assert re.fullmatch("[56]{9}", output.text)


def test_neighbours_get_the_very_same_tokens(llm):
    plain = [params(None, seed=i, max_tokens=25, logprobs=2, top_p=0.9 if i % 2 else 1.0) for i in range(6)]
    alone = llm.generate([PROMPT] * 6, plain)
    mixed = llm.generate([PROMPT] * 12, [own for i in range(6) for own in (plain[i], params(SCHEMA, seed=i))])
    constrained = llm.generate([PROMPT] * 6, [params(SCHEMA, seed=i) for i in range(6)])
    for found, expected in ((mixed[0::2], alone), (mixed[1::2], constrained)):
        if available(TINY):  # to the bit, log-probabilities too; plain torch rounds by the shape of the step
            assert found == expected
        assert [output.token_ids for output in found] == [output.token_ids for output in expected]
        assert [output.text for output in found] == [output.text for output in expected]


def test_a_preempted_request_continues_where_it_was(tiny_checkpoint, llm):
    own = [params("start: /([0-9][a-z]){30}/", seed=i, max_tokens=60) for i in range(6)]
    small = make_llm(tiny_checkpoint, num_kv_blocks=12, max_model_len=128)
    outputs = small.generate([PROMPT] * 6, own)
    assert small.core.scheduler.num_preemptions > 0
    assert outputs == llm.generate([PROMPT] * 6, own)
    assert all(re.fullmatch("([0-9][a-z]){30}", output.text) for output in outputs)


def test_drafts_do_not_come_between_a_request_and_its_grammar(tiny_checkpoint, llm):
    guessing = make_llm(tiny_checkpoint, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    own = [params("start: /(ab){20}/", max_tokens=50), params(SCHEMA), params(None, temperature=0.0)]
    assert guessing.generate([[5, 6] * 9] * 3, own) == llm.generate([[5, 6] * 9] * 3, own)


def test_a_model_with_several_ends_and_padded_logits(tmp_path):
    config = DeepConfig.from_dict(TINY.to_dict() | {"eos_token_id": [0, 3], "vocab_size": 304})
    write_checkpoint(tmp_path, 3, config)
    llm = make_llm(tmp_path)
    ends = set()
    for output in llm.generate(
        [PROMPT] * 20, [params(ENDLESS, seed=i, logit_bias={0: 100.0, 3: 100.0}) for i in range(20)]
    ):
        assert output.finish_reason == "stop"
        assert re.fullmatch("[a-z]+", output.text)
        ends.add(output.token_ids[-1])
    assert ends == {0, 3}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_grammar_fails_alone_and_in_time(llm, name):
    own = params(None, max_tokens=200, ignore_eos=True, temperature=0.0)
    expected = llm.generate([PROMPT], own)[0].token_ids
    core = llm.core
    core.add_request(request("victim", own))
    core.add_request(request("hostile", params(BOMBS[name], max_tokens=200)))
    core.add_request(request("twin", params(BOMBS[name], max_tokens=200)))
    tokens: list[int] = []
    refused: dict[str, str | None] = {}
    started, meanwhile = time.monotonic(), 0
    while core.has_requests:
        core.wait_for_work()
        for output in core.step().outputs:
            if output.request_id == "victim":
                tokens += output.token_ids
            elif output.finish_reason is not None:
                assert output.finish_reason == "error"
                refused[output.request_id] = output.error
                meanwhile = len(tokens)
    core.check_idle()
    assert tokens == expected
    assert set(refused) == {"hostile", "twin"}
    assert all(error and len(error) < 300 and str(Path.cwd()) not in error for error in refused.values())
    assert time.monotonic() - started < 2 * WAIT_SECONDS
    assert meanwhile > 0


def test_a_request_whose_grammar_compiles_can_be_aborted(llm):
    core = llm.core
    core.add_request(request("slow", params(BOMBS["a large prime"] + " ")))
    core.add_request(request("same", params(BOMBS["a large prime"] + " ")))
    assert not core.has_work
    assert core.has_requests
    assert core.stats().num_waiting == 2
    core.abort(["slow"])
    assert core.stats().num_waiting == 1
    core.check_idle()
    core.abort(["same", "slow"])
    assert not core.has_requests
    core.check_idle()
    # No request waits for the verdict, and the name is free again.
    core.add_request(request("slow", params("start: /[0-9]{3}/", max_tokens=9)))
    core.wait_for_work()
    while core.has_requests:
        core.wait_for_work()
        core.step()
    core.check_idle()


def test_a_check_gets_its_verdict_and_delays_no_request(llm):
    core = llm.core
    core.add_request(request("neighbour", params(None, max_tokens=40, ignore_eos=True)))
    checks = {b"good": DIGITS, b"wrong": "start: (", b"slow": BOMBS["a large prime"] + "  "}
    for key, grammar in checks.items():
        core.check_grammar(CheckGrammar(key=key, grammar=grammar))
    verdicts: dict[bytes, GrammarVerdict] = {}
    steps = []
    while core.has_requests or len(verdicts) < 3:
        core.wait_for_work()
        steps.append(core.step())
        verdicts |= {verdict.key: verdict for verdict in steps[-1].verdicts}
    core.check_idle()
    assert verdicts[b"good"] == GrammarVerdict(key=b"good", outcome="accepted")
    assert {verdicts[key].outcome for key in (b"wrong", b"slow")} == {"refused"}
    assert "too complex" in verdicts[b"slow"].reason
    assert sum(len(output.token_ids) for step in steps for output in step.outputs) == 40
    core.check_grammar(CheckGrammar(key=b"again", grammar=DIGITS))
    assert [verdict.outcome for verdict in core.step().verdicts] == ["accepted"], "it is cached"


@pytest.mark.parametrize(("error", "outcome"), [(TimeoutError("busy"), "busy"), (KeyError("inside"), "failed")])
def test_a_check_that_fails_says_how(llm, monkeypatch, error, outcome):
    def check(self, grammar):
        raise error

    monkeypatch.setattr("pyllm.engine.grammar.checker.GrammarChecker.check", check)
    llm.core.check_grammar(CheckGrammar(key=b"", grammar=f"start: {outcome}"))
    verdicts: list[GrammarVerdict] = []
    while not verdicts:  # a grammar of a test before this one may be ready first
        llm.core.wait_for_work()
        verdicts = llm.core.step().verdicts
    (verdict,) = verdicts
    assert verdict.outcome == outcome
    assert error.args[0] in verdict.reason


def test_an_engine_without_a_tokenizer_refuses_grammars():
    from support.paged_runner import make_core

    core = make_core()
    with pytest.raises(RequestError) as caught:
        core.add_request(request("a", params(DIGITS)))
    assert caught.value.param == "grammar"
    assert not core.has_requests


def test_a_mask_that_never_comes_fails_its_request_only(monkeypatch):
    class Stuck(GrammarState):
        def fill(self, bits):
            if not self.error:
                time.sleep(1.5)
            bits[:] = 255

    class Fine(GrammarState):
        def fill(self, bits):
            bits[:] = 1

    monkeypatch.setattr("pyllm.engine.grammar.state.MASK_SECONDS", 0.2)
    states = [Fine(None, None, 4), Stuck(None, None, 4), Fine(None, None, 4)]
    maker = MaskMaker()
    masks = maker.finish(maker.start(states))
    assert [bool(state.error) for state in states] == [False, True, False]
    allowed = torch.isfinite(masks[[0, 2]]).nonzero()[:, 1].tolist()
    assert allowed == [0, 8, 16, 24, 0, 8, 16, 24]
    again = maker.finish(maker.start([states[0]]))
    assert torch.equal(again[0], masks[0])
    time.sleep(1.5)  # the thread that was left to itself ends
