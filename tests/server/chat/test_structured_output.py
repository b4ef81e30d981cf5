"""What requests ask of the text's form: schemas, expressions, choices and grammars, and what comes of them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
from support.grammars import accepts

from pyllm import LLM, SamplingParams
from pyllm.benchmarks.cpu.check_schemas import check
from pyllm.benchmarks.schemas import schemas
from pyllm.engine.client.async_engine import AsyncEngine
from pyllm.engine.config import EngineConfig
from pyllm.engine.errors import RequestError
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.structured_output import (
    choice_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

NAMES = ["a", "name", "größe", "x y", 'q"t', "nested", "id", "😀", "default", "type"]
PATTERNS = ["^[a-z]{1,6}$", "^\\d{3}-\\d{2}$", "^(red|green|blue)$", "^[A-F0-9]+x$"]
FORMATS = ["date", "time", "ipv4", "uuid", "date-time"]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return LLM(
        str(tiny_checkpoint),
        dtype="float32",
        device="cpu",
        quiet=True,
        num_kv_blocks=4096,
        max_model_len=512,
        max_num_seqs=256,
        seed=1,
        allow_long_max_model_len=True,
    )


def generate(llm: LLM, grammars: list[str], max_tokens: int = 400, **params: Any):
    each = [
        SamplingParams(grammar=grammar, max_tokens=max_tokens, seed=i, **params) for i, grammar in enumerate(grammars)
    ]
    return llm.generate([[5, 6, 7]] * len(each), each)


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Every kind of schema that people write, bounded so that a model without habits comes to an end."""
    kinds = ["integer", "number", "string", "string", "boolean", "null", "enum", "const", "anyOf"]
    kind = draw.choice(kinds + ["object", "array"] * 3 if depth < 3 else kinds)
    if depth == 0:
        kind = draw.choice(["object", "object", "object", "array", kind])
    if kind == "integer":
        low = draw.randint(-1000, 1000)
        bounds: dict[str, Any] = {"minimum": low, "maximum": low + draw.choice([0, 1, 7, 500])}
        if draw.random() < 0.3:
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + draw.choice([2, 99])}
        if draw.random() < 0.2:
            bounds = {"minimum": 0, "multipleOf": draw.choice([2, 5, 25])}
        return {"type": "integer", **draw.choice([bounds, bounds, {}])}
    if kind == "number":
        low = draw.randint(-100, 100) / 4
        return {"type": "number", **draw.choice([{"minimum": low, "maximum": low + draw.choice([0.5, 30])}, {}])}
    if kind == "string":
        length = draw.randint(0, 12)
        return {
            "type": "string",
            **draw.choice(
                [
                    {"maxLength": length},
                    {"minLength": length // 2, "maxLength": length},
                    {"pattern": draw.choice(PATTERNS)},
                    {"format": draw.choice(FORMATS)},
                ]
            ),
        }
    if kind in ("boolean", "null"):
        return {"type": kind, "description": "plain"}
    if kind == "enum":
        return {"enum": draw.sample(["red", "é", 'say "x"', 7, -2, None, True, "a\nb", 1.5, ""], draw.randint(1, 5))}
    if kind == "const":
        return {"const": draw.choice(["fixed", 12, None, {"k": [1, 2]}, ["x"]])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 2) for _ in range(draw.randint(1, 3))]}
    if kind == "array":
        low = draw.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(draw, depth + 1),
            "minItems": low,
            "maxItems": low + draw.randint(0, 3),
        }
    names = draw.sample(NAMES, draw.randint(0, 5))
    return {
        "type": "object",
        "properties": {name: random_schema(draw, depth + 1) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }


def test_random_schemas_give_valid_json_at_temperature_one(llm):
    draw = random.Random(4)
    schemas = [random_schema(draw) for _ in range(1000)]
    outputs = generate(llm, [json_schema_grammar(schema) for schema in schemas])
    finished = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason in ("stop", "length")
        if output.finish_reason == "stop":
            finished += 1
            checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(("ipv4",)))
            checker.validate(json.loads(output.text))
    assert finished >= 980


def test_any_json_object_is_one(llm):
    outputs = generate(llm, [json_schema_grammar({"type": "object"})] * 20, 300)
    values = [json.loads(output.text) for output in outputs if output.finish_reason == "stop"]
    assert values
    assert all(isinstance(value, dict) for value in values)


def test_white_space_is_bounded_and_common_layouts_are_allowed(llm):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    # A model that likes nothing better than white space still ends.
    space, newline = llm.tokenizer.encode(" \n")
    output = generate(llm, [json_schema_grammar(schema)], logit_bias={space: 100.0, newline: 100.0})[0]
    assert output.finish_reason == "stop"
    assert max(map(len, re.findall(r"\s+", output.text))) <= 33
    for style in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}):
        assert accepts(json_schema_grammar(schema), json.dumps({"a": [1, 2]}, **style))
    assert not accepts(json_schema_grammar(schema), "{}")


@pytest.mark.parametrize(
    "choice", ["yes", 'a "b"', "back\\slash", "new\nline", "\x00\x7f\x1b", "é", "😀", "a/b", "<s>", "{}"]
)
def test_a_choice_is_taken_as_it_is(choice):
    grammar = choice_grammar([choice, "other", "otherwise"])
    assert accepts(grammar, choice)
    assert accepts(grammar, "other")
    assert accepts(grammar, "otherwise")
    assert not accepts(grammar, "oth")


def test_choices_expressions_and_grammars_shape_the_text(llm):
    lark = 'start: NUMBER (OPERATOR NUMBER)~1..2\nNUMBER: /[0-9]{1,3}/\nOPERATOR: "+" | "-"\n'
    grammars = [choice_grammar(["yes", "no", "no way"]), regex_grammar(r"[a-c]{2,4}-\d{2}"), lark_grammar(lark)] * 5
    outputs = generate(llm, grammars)
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert all(output.text in ("yes", "no", "no way") for output in outputs[0::3])
    assert all(re.fullmatch(r"[a-c]{2,4}-\d{2}", output.text, re.ASCII) for output in outputs[1::3])
    assert all(re.fullmatch(r"\d{1,3}([+-]\d{1,3}){1,2}", output.text, re.ASCII) for output in outputs[2::3])


def test_annotation_keywords_are_ignored_but_not_as_properties(llm):
    schema = {"title": "T", "type": "object", "description": "d",
              "$schema": "https://json-schema.org/draft/2020-12/schema",
              "properties": {"title": {"type": "boolean", "default": True, "x-order": 1},
                             "default": {"const": {"title": 1}}},
              "required": ["title", "default"], "additionalProperties": False, "x-foo": 3}  # fmt: skip
    assert accepts(json_schema_grammar(schema), '{"title":true,"default":{"title":1}}')
    assert not accepts(json_schema_grammar(schema), "{}")


def test_answers_to_real_schemas_are_valid(llm):
    found = check(llm, schemas()[::33], 480)
    assert found["schemas"] == 61
    assert found["finished"] >= 50
    assert found["faults"] == found["refused"] == found["failed"] == []


def test_numbers_stay_within_open_bounds_at_any_temperature(llm):
    for schema in (
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7},
        {"type": "number", "exclusiveMaximum": 0, "minimum": -1e-4}, {"type": "number", "exclusiveMaximum": 0},
    ):  # fmt: skip
        for output in generate(llm, [json_schema_grammar(schema)] * 30, temperature=2.0):
            assert output.finish_reason == "stop"
            jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_a_number_ends_even_if_the_model_likes_digits(llm, kind):
    digits = dict.fromkeys(llm.tokenizer.encode("0123456789"), 100.0)
    params = {"temperature": 0.0, "logit_bias": digits, "ignore_eos": True}
    assert generate(llm, [json_schema_grammar({"type": kind})], 100, **params)[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "schema",
    [
        {"patternProperties": {"^k[a-b]$": {"type": "boolean"}}, "additionalProperties": False, "minProperties": 2},
        {"patternProperties": {"^[ab]+$": True}, "additionalProperties": False, "minProperties": 4},
        {"additionalProperties": {"const": 1}, "minProperties": 5, "propertyNames": {"maxLength": 2}},
        {
            "properties": {"a": {"const": 1}},
            "required": ["a"],
            "additionalProperties": {"const": 1},
            "minProperties": 4,
        },
        {"minProperties": 3},
    ],
)
def test_keys_never_repeat(llm, schema):
    # A model that likes short keys of few letters, and many of them.
    liked = dict.fromkeys(llm.tokenizer.encode('ab1"}]'), 6.0)
    outputs = generate(
        llm, [json_schema_grammar({"type": "object", "maxProperties": 6} | schema)] * 20, logit_bias=liked
    )
    finished = [output for output in outputs if output.finish_reason == "stop"]
    assert len(finished) > 10
    for output in finished:
        pairs = json.loads(output.text, object_pairs_hook=list)
        assert len({name for name, _ in pairs}) == len(pairs) >= schema.get("minProperties", 0)


def test_a_key_that_cannot_differ_fails_the_request(llm):
    # The pattern has two words, which is not known beforehand.
    schema = {"type": "object", "patternProperties": {"^(?=a)a+$": True}, "propertyNames": {"maxLength": 2},
              "additionalProperties": False, "minProperties": 3}  # fmt: skip
    (output,) = generate(llm, [json_schema_grammar(schema)])
    assert output.finish_reason == "error"


@pytest.mark.parametrize(
    "build",
    [
        lambda: json_schema_grammar(nested(200)),
        lambda: json_schema_grammar({"enum": list(range(30_000))}),
        lambda: json_schema_grammar({"const": "x" * 300_000}),
        lambda: json_schema_grammar({"const": float("nan")}),
        lambda: regex_grammar("a" * 70_000),
        lambda: regex_grammar("a\\"),
        lambda: regex_grammar("\ud83d"),
        lambda: choice_grammar([]),
        lambda: choice_grammar(["a", ""]),
        lambda: choice_grammar([str(i) for i in range(5000)]),
        lambda: lark_grammar("x" * 70_000),
    ],
)
def test_oversized_grammar_is_refused_before_parsing(build):
    with pytest.raises(RequestError) as caught:
        build()
    assert len(str(caught.value)) < 300


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def engine(tiny_checkpoint, anyio_backend) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(model=str(tiny_checkpoint), dtype="float32", device="cpu", quiet=True, num_kv_blocks=64)
    engine = await AsyncEngine.start(config, Tokenizer.from_folder(tiny_checkpoint))
    yield engine
    await engine.shutdown()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (lark_grammar("start: nothing"), "nothing"),
        (regex_grammar("("), "unclosed"),
        (regex_grammar("(?=a)b"), "look-around"),
        (json_schema_grammar({"type": "string", "enum": ["a"], "pattern": "b"}), "no text"),
        (json_schema_grammar({"type": "integer", "multipleOf": 215656441}), "complex"),
        (
            json_schema_grammar({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(5, 30)]}),
            "complex",
        ),
        (regex_grammar("(" * 20_000 + ")" * 20_000), "nest"),
        (lark_grammar("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
    ],
)
async def test_hostile_grammar_is_refused_without_blocking_the_loop(engine, grammar, word):
    await engine.check_grammar(regex_grammar("a"))  # the process has started
    started, ticks = time.monotonic(), 0
    task = asyncio.create_task(engine.check_grammar(grammar, "structured_outputs"))
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    with pytest.raises(RequestError, match=word) as caught:
        await task
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 300
    # The checker's processor time is bounded, not the clock's; a blocked loop would tick once in all that time.
    assert ticks > 2 * (time.monotonic() - started) - 2


@pytest.mark.anyio
async def test_a_good_grammar_passes_and_the_second_time_at_once(engine):
    grammar = json_schema_grammar({"type": "object", "properties": {"a": {"type": "number"}}})
    await asyncio.gather(*(engine.check_grammar(grammar) for _ in range(50)))
    started = time.monotonic()
    await engine.check_grammar(grammar)
    assert time.monotonic() - started < 0.01
