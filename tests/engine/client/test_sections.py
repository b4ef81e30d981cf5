"""Text splits into the same reasoning, answer and calls wherever it is cut."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
import tokenizers
from support.checkpoints import byte_tokenizer
from tokenizers import AddedToken

from pyllm.engine.client.output_processor import OutputProcessor, RequestOutput
from pyllm.engine.client.sections import Piece
from pyllm.engine.messages import Marks, SamplingParams, TokenOutput
from pyllm.model.tokenizer import Tokenizer

TEXT = Marks()
NAMES = ("think_start", "think_end", "final_start", "final_end", "tool_call_start", "tool_call_end")


def tokenizer_with(marks: bool) -> tuple[Tokenizer, Marks]:
    library: tokenizers.Tokenizer = byte_tokenizer()
    if not marks:
        return Tokenizer(library), TEXT
    library.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in NAMES])
    return Tokenizer(library), Marks(ids=tuple(library.token_to_id(f"<|{name}|>") for name in NAMES))


def generate(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, cuts: list[int], reason: str = "length"
) -> list[RequestOutput]:
    processor = OutputProcessor(tokenizer)
    processor.add("a", 1, params)
    outputs, ends = [], [*cuts, len(ids)]
    for begin, end in zip([0, *cuts], ends, strict=True):
        last = reason if end == len(ids) else None
        output = processor.process(TokenOutput(request_id="a", token_ids=ids[begin:end], finish_reason=last))
        if output is None:
            break
        outputs.append(output)
        if output.finish_reason:
            break
    return outputs


def joined(outputs: list[RequestOutput]) -> list[Piece]:
    """The sections, with adjacent ones of a kind joined, without marks."""
    pieces = [piece for output in outputs for piece in output.sections if piece[0] != "mark"]
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(pieces, key=lambda piece: piece[0])]


PLAIN = [
    ("Hello < th.", False, [("content", "Hello < th.")]),
    (" Hi \n", False, [("content", " Hi \n")]),
    ("<think>\nah <b> </thin\n</think>\n<final>\nyes é </fin 🎉\n</final>\n", False,
     [("reasoning", "ah <b> </thin"), ("content", "yes é </fin 🎉")]),
    ("ah\n</think>\n\nyes", True, [("reasoning", "ah"), ("content", "yes")]),
    ("<think>\n\n</think>\n<final>\nyes\n</final>", False, [("content", "yes")]),
    ("ah <think> ", True, [("reasoning", "ah <think> ")]),
    ("<think>ah </thi", False, [("reasoning", "ah </thi")]),
    ("<think>\nah\n</think>\n<final>\nyes \n", False, [("reasoning", "ah"), ("content", "yes \n")]),
    ("Well. <think>ah</think> So.", False, [("content", "Well."), ("reasoning", "ah"), ("content", "So.")]),
    ("<final>a <think> b</think></final> c", False, [("content", "a <think> b</think>c")]),
    ("a </think> b </final>", False, [("content", "a </think> b </final>")]),
    ("<<think>a<</think>b", False, [("content", "<"), ("reasoning", "a<"), ("content", "b")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "inside", "expected"), PLAIN)
def test_marks_of_text_are_found_at_every_cut(text: str, inside: bool, expected: list[Piece]) -> None:
    tokenizer, _ = tokenizer_with(marks=False)
    ids, params = (
        tokenizer.encode(text),
        SamplingParams(max_tokens=None, marks=Marks(starts_in="reasoning" if inside else None)),
    )
    draw = random.Random(0)
    ways = [[], list(range(1, len(ids)))] + [[cut] for cut in range(1, len(ids))]
    ways += [sorted(draw.sample(range(1, len(ids)), min(4, len(ids) - 1))) for _ in range(20)]
    for cuts in ways:
        outputs = generate(tokenizer, ids, params, cuts)
        assert joined(outputs) == expected
        assert "".join(output.text for output in outputs) == text


def test_marks_count_by_their_ids() -> None:
    """Decoded without special tokens the sections would be welded together, and spelled marks are text."""
    tokenizer, marks = tokenizer_with(marks=True)
    begin, end, final, final_end, call, call_end = ([id_] for id_ in marks.ids)
    spelled = tokenizer.encode("<|think_end|>")
    ids = [*begin, *tokenizer.encode("a "), *spelled, *end, *call, *tokenizer.encode("{}"), *call_end]
    ids += [*final, *tokenizer.encode(" b"), *final_end, *tokenizer.encode("c")]
    expected = [("reasoning", "a <|think_end|>"), ("call", "{}"), ("content", " bc")]
    for skip in (True, False):
        params = SamplingParams(max_tokens=None, marks=marks, skip_special_tokens=skip)
        for cuts in ([], list(range(1, len(ids)))):
            assert joined(generate(tokenizer, ids, params, cuts)) == expected
    unclosed = [*tokenizer.encode("a"), *final, *tokenizer.encode("b")]
    inside = SamplingParams(max_tokens=None, marks=Marks(ids=marks.ids, starts_in="reasoning"))
    assert joined(generate(tokenizer, unclosed, inside, [])) == [("reasoning", "a"), ("content", "b")]
    half = ["é".encode()[:1], "é".encode()[1:]]
    tokens = {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
    apart = generate(tokenizer, [tokens[half[0]], *end, tokens[half[1]]], inside, [1, 2])
    assert joined(apart) == [("reasoning", "\ufffd"), ("content", "\ufffd")]


@pytest.mark.parametrize("cuts", [[], [3], list(range(1, 60))])
def test_stop_strings_count_in_the_answer_only(cuts: list[int]) -> None:
    tokenizer, _ = tokenizer_with(marks=False)
    params = SamplingParams(max_tokens=None, marks=TEXT, stop=("stop", "<", "\n\n"))
    for answer, stop in (("yes stop no", "stop"), ("a <b", "<"), ("a<", "<"), ("b\n\nc", "\n\n")):
        ids = tokenizer.encode(f"<think>\nstop <\n\n</think>\n<final>\n{answer}")
        outputs = generate(tokenizer, ids, params, [cut for cut in cuts if cut < len(ids)])
        assert joined(outputs) == [("reasoning", "stop <"), ("content", answer.partition(stop)[0])]
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_tokens_of_reasoning_are_counted() -> None:
    tokenizer, marks = tokenizer_with(marks=True)
    ids = [*tokenizer.encode("abc"), marks.ids[1], *tokenizer.encode("de")]
    params = SamplingParams(max_tokens=None, marks=Marks(ids=marks.ids, starts_in="reasoning"))
    counts = [output.num_reasoning_tokens for output in generate(tokenizer, ids, params, [1, 2, 4])]
    assert counts == [1, 2, 3, 3]
    assert generate(tokenizer, ids, SamplingParams(max_tokens=None), [])[-1].sections == []
