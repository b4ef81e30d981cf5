"""Released text: whole characters, stop strings across any token border, and how requests end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from pyllm.engine.client.output_processor import OutputProcessor, RequestOutput, StopMatcher
from pyllm.engine.messages import SamplingParams, TokenLogprobs, TokenOutput
from pyllm.model.tokenizer import Tokenizer

EOS, USER = 0, 1


def byte_level() -> Tokenizer:
    """A tokenizer with a token per byte and some for `ab`, `abc`, `User` …"""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["abc abcab User: ab User: abc éa éa"], trainer)
    return Tokenizer(library, names={"eos_token": "</s>"})


TOKENIZER = byte_level()
SINGLE_BYTES = {TOKENIZER.token_bytes(id_): id_ for id_ in range(2, TOKENIZER.vocab_size)}


def bytewise(text: str) -> list[int]:
    """One id per byte of the text."""
    return [SINGLE_BYTES[bytes([byte])] for byte in text.encode()]


def run(
    steps: Sequence[list[int]], params: SamplingParams, *, finish: TokenOutput | None = None
) -> tuple[str, list[RequestOutput]]:
    """Feed one list of ids per step until the request ends; return all text, and all outputs."""
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", 3, params)
    outputs = []
    for ids in steps:
        output = processor.process(TokenOutput(request_id="r", token_ids=ids))
        assert output is not None
        outputs.append(output)
        if output.finish_reason is not None:
            break
    else:
        last = processor.process(finish or TokenOutput(request_id="r", token_ids=[], finish_reason="length"))
        assert last is not None
        outputs.append(last)
    assert len(processor) == 0
    return "".join(output.text for output in outputs), outputs


def truth(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The cut at the stop string that is complete first; of several there, the longest."""
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


texts = st.text(alphabet="abcé🎉 ", max_size=40)
stop_lists = st.lists(st.text(alphabet="abcé🎉 ", min_size=1, max_size=5), max_size=4)


@given(texts, stop_lists, st.booleans(), st.data())
def test_released_text_is_independent_of_token_borders(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    ids = data.draw(st.sampled_from([TOKENIZER.encode(text), bytewise(text)]))
    borders = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    steps = [ids[start:end] for start, end in pairwise(borders)]
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    released, outputs = run(steps, params)
    expected, stop = truth(text, stops, include)
    assert released == expected
    assert outputs[-1].stop_reason == stop
    assert outputs[-1].finish_reason == ("length" if stop is None else "stop")


@given(texts, stop_lists, st.data())
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher = StopMatcher(stops, include=False)
    fed = released = ""
    while fed != text:
        piece = text[len(fed) :][: data.draw(st.integers(1, 8))]
        fed += piece
        new, stop = matcher.feed(piece)
        released += new
        if stop is not None:
            return
        begins = [fed[start:] for start in range(len(fed) + 1) if any(s.startswith(fed[start:]) for s in stops)]
        assert released == fed.removesuffix(begins[0] if stops else "")


def test_work_does_not_grow_with_the_length_of_stop_strings() -> None:
    def work(length: int) -> float:
        start = time.process_time()
        for _ in range(1000):
            matcher = StopMatcher([character * length for character in "abcd"], include=False)
            for piece in ("a", "bc", "aab", "xyz"):
                matcher.feed(piece)
        return time.process_time() - start

    short = work(10)
    assert work(2000) < 8 * max(short, 0.02)


def test_a_mismatch_after_a_long_match_costs_no_more() -> None:
    def work(length: int) -> float:
        matchers = [StopMatcher(["a" * length], include=False) for _ in range(100)]
        for matcher in matchers:
            matcher.feed("a" * (length - 1))
        start = time.process_time()
        assert {matcher.feed("b") for matcher in matchers} == {("a" * (length - 1) + "b", None)}
        return time.process_time() - start

    short = work(100)
    assert work(10_000) < 8 * max(short, 0.01)


def test_stop_string_across_token_border_is_not_leaked() -> None:
    released, outputs = run([[id_] for id_ in bytewise("Hi.\n\nUser: you")], SamplingParams(stop=("\n\nUser:",)))
    assert released == "Hi."
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "\n\nUser:")
    assert [output.text for output in outputs[:3]] == ["H", "i", "."]


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    released, outputs = run([bytewise("a\n\nUs"), bytewise("ual")], SamplingParams(stop=("\n\nUser:",)))
    assert [output.text for output in outputs[:2]] == ["a", "\n\nUsual"]
    assert released == "a\n\nUsual"


def test_held_back_text_is_released_at_the_end() -> None:
    ended = TokenOutput(request_id="r", token_ids=[EOS], finish_reason="stop", stop_token_id=EOS)
    released, outputs = run([bytewise("a\n\nUser")], SamplingParams(stop=("\n\nUser:",)), finish=ended)
    assert outputs[0].text == "a"
    assert released == "a\n\nUser"


def test_stop_string_that_is_complete_first_wins() -> None:
    for steps in ([bytewise("xabcd")], [[id_] for id_ in bytewise("xabcd")]):
        assert run(steps, SamplingParams(stop=("abcd", "bc")))[0] == "xa"
        assert run(steps, SamplingParams(stop=("bc", "abc")))[0] == "x"


def test_stop_string_included_on_request_and_nothing_behind_it() -> None:
    params = SamplingParams(stop=("b",), include_stop_str_in_output=True)
    assert run([bytewise("abc")], params)[0] == "ab"


def test_tokens_and_logprobs_behind_a_stop_string_are_dropped() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", 1, SamplingParams(stop=("b",), logprobs=0))
    ids = bytewise("abc")
    logprobs = [TokenLogprobs(token_id=id_, logprob=-1.0, top=[]) for id_ in ids]
    output = processor.process(TokenOutput(request_id="r", token_ids=ids, logprobs=logprobs))
    assert output is not None
    assert (output.text, output.token_ids, output.logprobs) == ("a", ids[:2], logprobs[:2])
    assert output.num_output_tokens == 2


def test_stop_strings_are_text_before_min_tokens() -> None:
    params = SamplingParams(stop=("b",), min_tokens=3, max_tokens=10)
    assert run([[id_] for id_ in bytewise("bbabab")], params)[0] == "bba"


def test_stop_string_before_min_tokens_does_not_match_later() -> None:
    params = SamplingParams(stop=("b", "abcc"), min_tokens=3, max_tokens=10)
    assert run([[id_] for id_ in bytewise("abca")], params)[0] == "abca"


def test_stop_string_begun_before_min_tokens_still_ends_after_it() -> None:
    params = SamplingParams(stop=("abc",), min_tokens=3, max_tokens=10)
    released, outputs = run([[id_] for id_ in bytewise("abcz")], params)
    assert (released, outputs[-1].stop_reason) == ("", "abc")


def test_eos_token_is_counted_but_has_no_text() -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    ended = TokenOutput(request_id="r", token_ids=[EOS], finish_reason="stop", stop_token_id=EOS)
    released, outputs = run([bytewise("ab")], params, finish=ended)
    assert released == "ab"
    last = outputs[-1]
    assert (last.token_ids, last.finish_reason, last.stop_reason, last.num_output_tokens) == ([EOS], "stop", None, 3)


def test_stop_id_is_the_reason_and_hidden_by_default() -> None:
    stop_id = bytewise("!")[0]
    ended = TokenOutput(request_id="r", token_ids=[stop_id], finish_reason="stop", stop_token_id=stop_id)
    for include, text in ((False, "ab"), (True, "ab!")):
        params = SamplingParams(stop_token_ids=(stop_id,), include_stop_str_in_output=include)
        released, outputs = run([bytewise("ab")], params, finish=ended)
        assert (released, outputs[-1].stop_reason) == (text, stop_id)


def test_stop_string_wins_over_length_at_the_same_token() -> None:
    limit = TokenOutput(request_id="r", token_ids=bytewise("b"), finish_reason="length")
    released, outputs = run([bytewise("a")], SamplingParams(stop=("b",)), finish=limit)
    assert (released, outputs[-1].finish_reason, outputs[-1].stop_reason) == ("a", "stop", "b")


def test_characters_are_released_whole_and_a_broken_rest_never() -> None:
    released, outputs = run([[id_] for id_ in bytewise("é🎉")[:-1]], SamplingParams())
    assert [output.text for output in outputs] == ["", "é", "", "", "", ""]
    assert released == "é"


def test_special_tokens_show_only_on_request() -> None:
    assert run([[USER, *bytewise("a")]], SamplingParams())[0] == "a"
    assert run([[USER, *bytewise("a")]], SamplingParams(skip_special_tokens=False))[0] == "<|user|>a"


def test_late_outputs_are_ignored_and_the_id_is_free() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", 1, SamplingParams(stop=("a",)))
    late = TokenOutput(request_id="r", token_ids=bytewise("a"))
    output = processor.process(late)
    assert output is not None
    assert output.finish_reason == "stop"
    assert processor.process(late) is None
    assert processor.abort("r") is None
    processor.add("r", 1, SamplingParams())
    assert len(processor) == 1


def test_abort_ends_a_request_with_what_was_held_back() -> None:
    processor = OutputProcessor(TOKENIZER)
    for request_id in ("gone", "failed"):
        processor.add(request_id, 1, SamplingParams(stop=("ab",)))
        processor.process(TokenOutput(request_id=request_id, token_ids=bytewise("xa")))
    gone, failed = processor.abort("gone"), processor.abort("failed", error="The engine has ended.")
    assert gone is not None
    assert failed is not None
    assert (gone.text, gone.finish_reason, gone.error) == ("a", "abort", None)
    assert (failed.finish_reason, failed.error) == ("error", "The engine has ended.")


def test_counts_and_times_add_up() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", 7, SamplingParams())
    first = processor.process(
        TokenOutput(request_id="r", token_ids=bytewise("ab"), num_cached_tokens=4, scheduled_time=5.0)
    )
    second = processor.process(TokenOutput(request_id="r", token_ids=bytewise("c"), scheduled_time=9.0))
    assert first is not None
    assert second is not None
    assert (second.num_prompt_tokens, second.num_output_tokens, second.num_cached_tokens) == (7, 3, 4)
    assert second.times.scheduled == 5.0
    assert second.times.arrival <= second.times.first_token == first.times.last_token <= second.times.last_token


def test_requests_do_not_share_text_state() -> None:
    processor = OutputProcessor(TOKENIZER)
    texts = {"a": "é🎉é", "b": "xéy🎉", "c": "abcabc"}
    released = dict.fromkeys(texts, "")
    for request_id in texts:
        processor.add(request_id, 1, SamplingParams(stop=("abca",)))
    for n in range(9):
        for request_id, text in texts.items():
            output = processor.process(TokenOutput(request_id=request_id, token_ids=bytewise(text)[n : n + 1]))
            released[request_id] += output.text if output is not None else ""
    assert released == texts | {"c": ""}
