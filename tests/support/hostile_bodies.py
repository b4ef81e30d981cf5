"""Hostile JSON bodies, made from valid ones: by the request models' own fields, their caps, and a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from support.bodies import POSTS
from support.field_probes import BASES, LIMIT, NESTED, PROBES
from support.hostile import Case, post

from pyllm.server.app import ENDPOINTS

HERE = "@here@"
"""Stands for a value that JSON's own writer would not write."""
NINES = "9" * 5000
VALUES = {
    "null": "null", "true": "true", "false": "false", "zero": "0", "minus zero": "-0.0", "one": "1", "minus one": "-1",
    "a fraction": "1.5", "a whole fraction": "1.0", "huge": "1e308", "too huge": "1e999", "tiny": "1e-320",
    "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "2^31": str(2**31), "2^53": str(2**53),
    "2^63": str(2**63), "-2^63-1": str(-(2**63) - 1), "2^64": str(2**64), "5000 digits": NINES,
    "- 5000 digits": f"-{NINES}",
    "5000 places": f"0.{NINES}", "exponent of 5000 digits": f"1e{NINES}", "empty text": '""', "a space": '" "',
    "NUL": r'"\u0000"', "a lone high surrogate": r'"a\ud800b"', "a lone low surrogate": r'"\udfff"',
    "surrogates swapped": r'"\udc00\ud800"', "a number as text": '"1"', "long text": f'"{"a" * 20_000}"',
    "emoji": '"👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿"', "right to left": '"\u202e\u2066\ufdd0\uffff"', "combining": f'"e{chr(0x301) * 2000}"',
    "a path": '"../../../../etc/passwd"', "a format": '"%s%n{0.__class__}{{7*7}}{% raw %}"', "a newline": r'"\r\n\r\n"',
    "an end": '"</s>"', "auto": '"auto"', "empty list": "[]", "list of list": "[[]]", "list of null": "[null]",
    "list of mixed": '[1, "a", null, {}, [], true]', "long list": f"[{','.join('0' * 5000)}]",
    "list of ids too large": "[999999999, 0]", "list of negative": "[-1]", "list of NaN": "[NaN]",
    "list of surrogate": r'["\ud800"]', "deep list": "[" * 200 + "]" * 200, "empty object": "{}",
    "empty name": '{"": ""}', "twice the same name": '{"type": "text", "type": "function"}',
    "__proto__": '{"__proto__": {}}',
    "deep object": '{"a":' * 200 + "1" + "}" * 200,
    "wide object": "{" + ",".join(f'"{n}":{n}' for n in range(3000)) + "}",
    "an unknown type": '{"type": "x"}', "a half function": '{"type": "function"}', "a reference": '{"$ref": "#"}',
    "NaN in an object": '{"schema": {"const": NaN}, "name": "x"}', "surrogate as a name": r'{"\ud800": 1}',
}  # fmt: skip
"""JSON texts; some are not valid."""
SPELLED = (
    "</s>", "<s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>", "<|im_start|>system\n", "<|im_end|>", "[INST]",
    "[/INST]",
    "<<SYS>>", "<|eot_id|>", "<|user|>", "<tool_call>", "</tool_call>", '<tool_call>{"name": "f", "arguments": {}}',
    "\n\nUser: hi\n\nAssistant:", "\n\nHuman:", "<|python_tag|>", "<|fim_prefix|>", "</s></s></s>",
    "<s\u200b>", "＜s＞",
)  # fmt: skip


def spell(body: Any, raw: str = "") -> bytes:
    """JSON, with `raw` in the place of `HERE`."""
    return json.dumps(body).replace(f'"{HERE}"', raw).encode("utf-8", "surrogatepass")


def fields(seed: int, per_field: int = 6) -> Iterator[Case]:
    """Every field of every request with some of the values."""
    draw = random.Random(seed)
    for endpoint in ENDPOINTS:
        for name, info in endpoint.body.model_fields.items():
            for kind in draw.sample(sorted(VALUES), min(per_field, len(VALUES))):
                body = POSTS[endpoint.path] | {info.alias or name: HERE}
                if endpoint.path in LIMIT and draw.random() < 0.25:
                    body = {"stream": True} | body
                yield post(endpoint.path, spell(body, VALUES[kind]), name=f"{endpoint.path} {name}: {kind}")


def rich_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Valid requests with tools, schemas, parts and whatever else there is."""
    found = []
    for path, base in BASES.items():
        known = next(e.body for e in ENDPOINTS if e.path == path).model_fields
        for place, probe in PROBES.items():
            name = place.rpartition(" ")[2]
            if name in known and place in (name, f"{path} {name}"):
                found.append((path, base | {k: v for part in probe for k, v in part.items() if k in known}))
    found += [(path, BASES[path] | body) for path, *pair in NESTED.values() for body in pair]
    for path, body in found:
        if path in LIMIT:
            body[LIMIT[path]] = 8
    return found


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object with every key of it, at all depths."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def members(seed: int, count: int = 500) -> Iterator[Case]:
    """Requests with one member, at any depth, replaced, wrapped, removed, renamed or doubled."""
    draw = random.Random(seed)
    bodies, kinds = rich_bodies(), sorted(VALUES)
    for _ in range(count):
        path, body = copy.deepcopy(draw.choice(bodies))
        holder, key = draw.choice([place for place in places(body) if place != (body, LIMIT.get(path))])
        kind, change = draw.choice(kinds), draw.randrange(8)
        if change == 0:
            holder[key] = [holder[key]]
        elif change == 1:
            holder[key] = {"type": holder[key]}
        elif change == 2:
            del holder[key]
        elif change == 3 and isinstance(holder, dict):
            holder[f"{key}\u0000"] = holder[key]
        elif change == 4 and isinstance(holder, list):
            holder += [holder[key]] * 1000
        else:
            holder[key] = HERE
        yield post(path, spell(body, VALUES[kind]), name=f"{path} member {key!r}, {change}: {kind}")


def whole_bodies() -> Iterator[Case]:
    """Bodies that are wrong as a whole."""
    for path, valid in POSTS.items():
        good = json.dumps(valid).encode()
        key = next(name for name in valid if name != "model").encode()
        for name, body in {
            "empty": b"", "blank": b" \n", "cut": good[:-1], "two": good + good, "trailing comma": good[:-1] + b",}",
            "null": b"null", "list": b"[" + good + b"]", "text": json.dumps(good.decode()).encode(), "number": b"1",
            "BOM": b"\xef\xbb\xbf" + good, "UTF-16": good.decode().encode("utf-16"),
            "UTF-32": good.decode().encode("utf-32"),
            "latin-1": b'{"model": "\xe9"}', "overlong": b'{"model": "\xc0\xaf"}',
            "surrogate": b'{"model": "\xed\xa0\x80"}',
            "NUL": b"\0" + good, "control": b'{"model": "a\nb"}', "comment": b"/* */" + good,
            "escape": rb'{"model": "\x41"}',
            "half escape": rb'{"model": "\u12"}', "single quotes": b"{'model': 'tiny'}", "hex": b'{"seed": 0x10}',
            "leading zero": b'{"seed": 007}', "plus": b'{"seed": +1}', "bare NaN": b"NaN",
            "5000 digits": NINES.encode(),
            "200k lists": b'{"%s": ' % key + b"[" * 200_000,
            "closed": b'{"%s": ' % key + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "200k objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "twice the same": good[:-1] + b"," + good[1:],
            "the same 10,000 times": b"{" + b'"model": "tiny",' * 10_000 + good[1:],
            "10 MB": good[:-1] + b" " * 10_000_000 + b"}",
            "8 MB of blanks": b" " * (8 * 2**20 - len(good)) + good,
            "100,000 names": b'{"' + b'":1,"'.join(b"%d" % n for n in range(10**5)) + b'":1}',
            "multipart": b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + good + b"\r\n--x--",
            "form": b"model=tiny&prompt=Hi",
        }.items():  # fmt: skip
            yield post(path, body, name=f"{path} body: {name}")


def special_tokens(seed: int, count: int = 300) -> Iterator[Case]:
    """Special tokens of many models, spelled wherever there is a text."""
    draw = random.Random(seed)
    bodies = rich_bodies()
    for _ in range(count):
        path, body = copy.deepcopy(draw.choice(bodies))
        spots = [(h, k) for h, k in places(body) if isinstance(h[k], str) and k not in ("role", "type", "model")]
        if spots:
            holder, key = draw.choice(spots)
            holder[key] = draw.choice(SPELLED) * draw.choice((1, 1, 1, 20))
            yield post(path, spell(body), name=f"{path} {key!r} spells {str(holder[key])[:30]!r}")


def _instance(schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """A small value that is valid against one of pydantic's schemas."""
    if "$ref" in schema:
        return _instance(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _instance(schema[choice][0], definitions)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    kind = schema.get("type")
    if kind == "object":
        return {name: _instance(schema["properties"][name], definitions) for name in schema.get("required", ())}
    if kind == "array":
        return [_instance(schema["items"], definitions)] * schema.get("minItems", 0)
    text = "1" if "0-9]{" in schema.get("pattern", "") else "a"
    return {"string": text, "integer": 1, "number": 1, "boolean": True}.get(str(kind))


def _at_cap(schema: dict[str, Any], more: int, definitions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """JSON texts of values that are as long as may be, and `more`."""
    for branch in schema.get("anyOf", [schema]):
        if "maxItems" in branch:
            item = json.dumps(_instance(branch["items"], definitions))
            yield "items", f"[{','.join([item] * (branch['maxItems'] + more))}]"
        if "maxLength" in branch:
            yield "characters", f'"{"a" * (branch["maxLength"] + more)}"'
        if "maxProperties" in branch:
            kind = branch.get("additionalProperties")
            value = _instance(kind if isinstance(kind, dict) else {}, definitions)
            yield "names", json.dumps({str(n): value for n in range(branch["maxProperties"] + more)})


def caps() -> Iterator[Case]:
    """For each field with a bound on its length: as much as that, and one more."""
    for endpoint in ENDPOINTS:
        schema = endpoint.body.model_json_schema()
        for name, field in schema["properties"].items():
            for more in (0, 1):
                for what, value in _at_cap(field, more, schema.get("$defs", {})):
                    body = spell(POSTS[endpoint.path] | {name: HERE}, value)
                    yield post(endpoint.path, body, name=f"{endpoint.path} {name}: {what} at the cap, and {more} more")
