"""Log-probabilities next to the text that is shown: their bytes add up to it, and their offsets point into it."""

from __future__ import annotations

import codecs
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.engine.client.output_processor import OutputProcessor, RequestOutput
from pyllm.engine.messages import SamplingParams, TokenLogprobs, TokenOutput
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.flags import DEMO_FOLDER
from pyllm.server.generation.token_details import LegacyLogprobs, ShownLogprobs

TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)
SPECIAL = sorted(TOKENIZER.special_ids)
WORDS = TOKENIZER.encode("Hello, how are you? Été à Paris 👩‍👩‍👧 日本語 {}")
END = TOKENIZER.encode("é")[0]
steps = st.lists(st.lists(st.sampled_from(WORDS + SPECIAL) | st.integers(0, 900), min_size=1, max_size=3), max_size=12)
stops = st.lists(st.text("Hello, éa?", min_size=1, max_size=3) | st.sampled_from(["llo, h", "are", "é"]), max_size=3)


def outputs(params: SamplingParams, ids: list[list[int]], end: int | None) -> list[RequestOutput]:
    """What a request gives whose steps have these ids; the last one may be an end token, which is hidden."""
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", 3, params)
    found = []
    for place, step in enumerate([*ids, [END if end is None else end]]):
        is_last = place == len(ids)
        token = TokenOutput(
            request_id="r",
            token_ids=step,
            logprobs=[TokenLogprobs(token_id=id_, logprob=-1.0, top=[(SPECIAL[0], -1.5)]) for id_ in step],
            finish_reason=("length" if end is None else "stop") if is_last else None,
            stop_token_id=end if is_last else None,
        )
        output = processor.process(token)
        assert output is not None
        found.append(output)
        if output.finish_reason:
            break
    return found


@settings(max_examples=500, deadline=None)
@given(ids=steps, stop=stops, include=st.booleans(), skip=st.booleans(), end=st.sampled_from([None, SPECIAL[0], END]))
def test_the_entries_bytes_are_the_text(
    ids: list[list[int]], stop: list[str], include: bool, skip: bool, end: int | None
) -> None:
    params = SamplingParams(
        logprobs=1, stop=tuple(stop), include_stop_str_in_output=include, skip_special_tokens=skip, max_tokens=99
    )
    found = outputs(params, ids, end)
    text = "".join(output.text for output in found)
    used = [position for output in found for position in output.logprobs]

    whole, stream = (ShownLogprobs(TOKENIZER, skip) for _ in "ab")
    entries = whole.add(used, text) + whole.finish()
    streamed = [entry for output in found for entry in stream.add(output.logprobs, output.text)] + stream.finish()
    assert streamed == entries
    assert [entry["token"] for entry in entries] == [TOKENIZER.token_text(position.token_id) for position in used]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == text
    if skip:
        assert all(top["bytes"] == [] for entry in entries for top in entry["top_logprobs"])

    legacy, pieces = (LegacyLogprobs(TOKENIZER, skip) for _ in "ab")
    joined = add(legacy.write(used, text), legacy.finish())
    parts = [pieces.write(output.logprobs, output.text) for output in found]
    assert add(*parts, pieces.finish()) == joined
    offsets = [*joined["text_offset"], len(text)]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(used) + 1


def add(*objects: dict[str, Any] | None) -> dict[str, Any]:
    """Join objects of the older format."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for one in objects if one for entry in one[name]] for name in names}


@pytest.mark.parametrize(
    ("stop", "shown"), [("ell", ["H"]), ("o, h", ["Hell"]), ("Hello, how", []), ("!", ["Hello", ",", " how"])]
)
def test_a_token_shown_in_part_has_the_bytes_of_that_part(stop: str, shown: list[str]) -> None:
    ids = TOKENIZER.encode("Hello, how")
    found = outputs(SamplingParams(logprobs=0, stop=(stop,)), [[id_] for id_ in ids], SPECIAL[0])
    writer = ShownLogprobs(TOKENIZER, skip_special_tokens=True)
    entries = [entry for output in found for entry in writer.add(output.logprobs, output.text)] + writer.finish()
    decode = codecs.getincrementaldecoder("utf-8")().decode
    assert "".join(decode(bytes(entry["bytes"])) for entry in entries) == "".join(shown)
    if stop == "!":
        assert (entries[-1]["token"], entries[-1]["bytes"]) == (TOKENIZER.token_text(SPECIAL[0]), [])
