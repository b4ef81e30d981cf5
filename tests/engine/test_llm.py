"""The engine as a library."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.reference import full_forward

from pyllm import LLM, SamplingParams
from pyllm.engine.errors import EngineStartError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return LLM(str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=64)


def reference_logits(folder, ids: list[int]) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    return full_forward(load_file(folder / "model.safetensors"), config, ids)[0]


def test_texts_and_token_ids_are_prompts_alike(llm):
    text = "Hello there"
    ids = llm.tokenizer.encode(text)
    by_text, by_ids = llm.generate([text, ids], GREEDY)
    assert by_text == by_ids
    assert by_text.prompt_token_ids == ids
    assert len(by_text.token_ids) == 12
    assert by_text.finish_reason == "length"
    # Half a character at the end stays unsaid.
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids)[: len(by_text.text)]
    assert set(llm.tokenizer.decode(by_text.token_ids)[len(by_text.text) :]) <= {"\N{REPLACEMENT CHARACTER}"}


def test_each_prompt_may_have_its_own_params(llm):
    each = [
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=4, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2),
    ]
    together = llm.generate(["one", "two", "three"], each)
    assert [len(completion.token_ids) for completion in together] == [3, 9, 5]
    assert [len(completion.logprobs) for completion in together] == [0, 0, 5]
    alone = [llm.generate([prompt], own)[0] for prompt, own in zip(["one", "two", "three"], each, strict=True)]
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in together]


def test_params_that_do_not_match_the_prompts_are_refused(llm):
    with pytest.raises(ValueError):  # noqa: PT011
        llm.generate(["a", "b"], [GREEDY])
    assert len(llm.generate(["a"], GREEDY)) == 1


def test_a_stop_string_ends_the_text_before_it(llm):
    free = llm.generate(["Stop"], GREEDY)[0]
    assert len(free.text) > 3
    stop = free.text[2:4]
    stopped = llm.generate(["Stop"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(stop,)))[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert len(stopped.token_ids) < 12
    assert not llm.core.has_work


def test_a_stop_id_asked_for_is_the_reason(llm):
    free = llm.generate(["Stop"], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(free[3],))
    stopped = llm.generate(["Stop"], params)[0]
    assert stopped.token_ids == free[: free.index(free[3]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", free[3])


def test_logprobs_are_those_of_a_full_forward(llm, tiny_checkpoint):
    prompt = llm.tokenizer.encode("Logs of what")
    params = SamplingParams(temperature=1.3, seed=5, max_tokens=10, ignore_eos=True, logprobs=4, repetition_penalty=1.5)
    completion = llm.generate([prompt], params)[0]
    scores = reference_logits(tiny_checkpoint, prompt + completion.token_ids).log_softmax(-1)
    for i, (token, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = scores[len(prompt) - 1 + i]
        assert found.token_id == token
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-3)
        best = row.topk(4)
        assert [score for _, score in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(row[id_].item() == pytest.approx(score, abs=1e-3) for id_, score in found.top)


def test_min_tokens_keeps_the_end_away(llm):
    free = llm.generate(["End"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))[0].token_ids
    stops = {"stop_token_ids": tuple(set(free)), "min_tokens": 6}
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **stops)
    held = llm.generate(["End"], params)[0].token_ids
    assert len(held) >= 6
    assert not set(held[:6]) & set(free)


def test_max_tokens_none_fills_the_context(llm):
    prompt = [5] * (llm.core.info.config.max_model_len - 8)
    completion = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))[0]
    assert len(completion.token_ids) == 8
    assert completion.finish_reason == "length"


def test_max_tokens_is_limited_to_what_each_prompt_leaves(llm):
    context = llm.core.info.config.max_model_len
    prompts = [[5] * (context - 8), [5] * (context - 1), [5] * (context - 20)]
    for limit in (4096, 10**6, 2**63 - 1, 10):
        found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True))
        assert [len(completion.token_ids) for completion in found] == [8, 1, min(limit, 20)]
        assert {completion.finish_reason for completion in found} == {"length"}
    with pytest.raises(RequestError, match=rf"context is {context} tokens, but the prompt has {context}"):
        llm.generate([[5] * context], GREEDY)
    with pytest.raises(RequestError, match=rf"min_tokens is 9, .* {context} tokens has room for 8") as error:
        llm.generate(prompts, SamplingParams(max_tokens=50, min_tokens=9))
    assert error.value.param == "min_tokens"


def test_one_impossible_prompt_refuses_the_whole_call(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", []], GREEDY)
    assert not llm.core.has_work
    assert len(llm.generate(["fine"], GREEDY)) == 1


def test_no_prompts_no_completions(llm):
    assert llm.generate([], GREEDY) == []


def test_interrupted_call_leaves_a_usable_engine(llm, monkeypatch):
    with monkeypatch.context() as patch:

        def interrupt(sequences):
            raise KeyboardInterrupt

        patch.setattr(llm.core.runner, "execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one", "two"], GREEDY)
    assert len(llm.generate(["one", "two"], GREEDY)) == 2


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            {"dtype": "float16"},
            "dtype must be one of auto, bfloat16, float32, but got 'float16'; did you mean bfloat16?",
        ),
        ({"block_size": 0}, "block_size must be a whole number between 1 and 1024, but got 0."),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number between 1 and 4096, but got 0."),
        ({"max_num_seq": 5}, "Unknown setting 'max_num_seq'; did you mean max_num_seqs?"),
        ({"speculative_config": {"method": "x"}}, "method in speculative_config must be one of ngram, but got 'x'."),
        ({"speculative_config": {"tokens": 3}}, "Unknown setting 'tokens' in speculative_config"),
        ({"speculative_config": {"prompt_lookup_min": 9}}, "prompt_lookup_min must be no larger than"),
    ],
)
def test_a_setting_that_no_engine_has_is_refused(tiny_checkpoint, setting, sentence):
    with pytest.raises(EngineStartError, match=f"^{re.escape(sentence)}"):
        LLM(str(tiny_checkpoint), **setting)


def test_oversized_cache_is_refused_in_one_sentence(tiny_checkpoint):
    with pytest.raises(EngineStartError, match="--kv-cache-memory-bytes"):
        LLM(str(tiny_checkpoint), num_kv_blocks=10**12, quiet=True)


def test_end_tokens_of_both_files_end_a_text(llm, tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    ids = llm.generate(["Hello there"], GREEDY)[0].token_ids
    end = next(n for n, id_ in enumerate(ids) if n >= 3 and id_ not in ids[:n])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[end]]}))
    flags = {"dtype": "float32", "device": "cpu", "quiet": True, "num_kv_blocks": 64}
    stopped = LLM(str(copy), **flags)
    assert stopped.core.info.eos_token_ids == (0, ids[end])
    (completion,) = stopped.generate(["Hello there"], SamplingParams(temperature=0.0, max_tokens=12))
    assert (completion.token_ids[:end], completion.finish_reason) == (ids[:end], "stop")
    assert len(completion.token_ids) <= end + 1
    assert LLM(str(copy / "model.safetensors"), generation_config="none", **flags).core.info.eos_token_ids == (0,)


def test_a_context_beyond_the_models_must_be_insisted_on(tiny_checkpoint):
    flags = {"dtype": "float32", "device": "cpu", "quiet": True, "num_kv_blocks": 400}
    with pytest.raises(EngineStartError) as refused:
        LLM(str(tiny_checkpoint), max_model_len=5000, **flags)
    for part in ("5000", "256", "--allow-long-max-model-len", "PYLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        assert part in str(refused.value)
    longer = LLM(str(tiny_checkpoint), max_model_len=5000, allow_long_max_model_len=True, **flags)
    assert longer.core.info.config.max_model_len == 5000
