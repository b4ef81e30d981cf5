"""Whether every answer to a schema is valid: one answer to each of 2,000 schemas, by a network with random weights.

    python benchmarks/cpu/check_schemas.py                 # minutes
    python benchmarks/cpu/check_schemas.py --every 10 --tokenizer FOLDER

The schemas are the list of `benchmarks/schemas.py`, the temperature is 1, and the judge is `jsonschema`. The exit code
is 1 if an answer is not valid, or if more than 3 % of the schemas are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema

from pyllm.benchmarks.checkpoint import write_shape
from pyllm.benchmarks.measure import report
from pyllm.benchmarks.schemas import Schema, schemas
from pyllm.engine.errors import RequestError
from pyllm.engine.grammar.checker import Vocabulary, compile_grammar, error_of
from pyllm.engine.llm import LLM
from pyllm.engine.messages import SamplingParams
from pyllm.server.chat.structured_output import json_schema_grammar

MAX_REFUSED = 0.03
FORMATS = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "email", "idn-email", "uuid", "json-pointer"))
for name, kind in (("date-time", datetime), ("time", clock_time)):
    FORMATS.checks(name, ValueError)(
        lambda value, kind=kind: not isinstance(value, str) or kind.fromisoformat(value).tzinfo is not None
    )


def standard(schema: Any) -> Any:
    """A schema as the judge understands it: draft 2020-12 in place of OpenAPI's and older drafts' spellings."""
    if isinstance(schema, list):
        return [standard(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: standard(value) for name, value in schema.items() if name != "$schema"}
    if isinstance(schema.get("exclusiveMinimum"), bool) and schema.pop("exclusiveMinimum"):
        schema["exclusiveMinimum"] = schema.pop("minimum")
    if isinstance(schema.get("items"), list):
        schema |= {"prefixItems": schema["items"], "items": schema.pop("additionalItems", True)}
    if schema.pop("nullable", None) is True:
        definitions = {name: schema.pop(name) for name in ("$defs", "definitions") if name in schema}
        schema = {"anyOf": [schema, {"type": "null"}], **definitions}
    return schema


def fault(schema: Schema, text: str) -> str:
    """What is wrong with an answer, "" for nothing; numbers are compared as decimals."""
    try:
        value = json.loads(text, parse_float=Decimal, object_pairs_hook=_members)
        judged = standard(json.loads(json.dumps(schema), parse_float=Decimal))
        jsonschema.Draft202012Validator(judged, format_checker=FORMATS).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).split("\n", 1)[0]
    return ""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key is repeated")
    return members


def check(llm: LLM, listed: Sequence[tuple[str, Schema]], max_tokens: int) -> dict[str, Any]:
    """Answer to each schema once, and count how it went."""
    vocab_size, ends = llm.core.info.vocab_size, list(llm.core.info.eos_token_ids)
    tokens = [llm.tokenizer.token_bytes(id_) for id_ in range(vocab_size)]
    library = Vocabulary(tokens, list(llm.tokenizer.special_ids), ends).tokenizer()
    asked: list[tuple[str, Schema, str]] = []
    refused, times = [], []
    for kind, schema in listed:
        started = time.perf_counter()
        try:
            grammar = json_schema_grammar(schema)
            matcher = compile_grammar(library, grammar)
            matcher.compute_bitmask()
            if matcher.is_error():
                raise RequestError(error_of(matcher))
            asked.append((kind, schema, grammar))
        except RequestError as error:
            refused.append(f"{kind}: {error}")
        times.append(time.perf_counter() - started)
    params = [SamplingParams(grammar=grammar, max_tokens=max_tokens, seed=n) for n, (*_, grammar) in enumerate(asked)]
    ends_by, faults, failed = Counter[str](), [], []
    for (kind, schema, _), answer in zip(asked, llm.generate([[5, 6, 7]] * len(params), params), strict=True):
        ends_by[str(answer.finish_reason)] += 1
        if answer.finish_reason == "error":
            failed.append(f"{kind}: {answer.text[-100:]} {json.dumps(schema)[:300]}")
        elif answer.finish_reason == "stop" and (problem := fault(schema, answer.text)):
            faults.append(f"{kind}: {problem} {answer.text[:300]} {json.dumps(schema)[:300]}")
    return {
        "schemas": len(listed), "finished": ends_by["stop"], "valid": ends_by["stop"] - len(faults),
        "cut_at_max_tokens": ends_by["length"], "failed": failed, "refused": refused, "faults": faults,
        "longest_compile_ms": round(1000 * max(times), 1),
    }  # fmt: skip


def main() -> int:
    """Check and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take only each n-th schema")
    parser.add_argument("--max-tokens", type=int, default=1500)
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json of at most 32,000 ids")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shape(folder, "tiny" if args.tokenizer is None else "tiny-32k")
        if args.tokenizer is not None:
            shutil.copy(args.tokenizer / "tokenizer.json", folder)
        llm = LLM(str(folder), load_format="dummy", device="cpu", dtype="float32", quiet=True, seed=0, max_num_seqs=256)
        found = check(llm, schemas()[:: args.every], args.max_tokens)
    report("check_schemas", found | {"tokenizer": str(args.tokenizer or "bytes"), "max_tokens": args.max_tokens})
    return int(bool(found["faults"]) or len(found["refused"]) > MAX_REFUSED * found["schemas"])


if __name__ == "__main__":
    raise SystemExit(main())
