"""`pyllm check`: shows how a checkpoint's files are read, and tests the engine on its weights."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from ...engine.errors import EngineStartError
from ...model.files import CheckpointError, folder_of, read_json
from ...model.tokenizer import Tokenizer
from ..chat.conversation import Message
from ..chat.reasoning import find_marks, has_reasoning
from ..chat.served_model import find_checkpoint, find_format, find_template, model_name
from ..chat.template import ChatTemplate, ChatTemplateError
from ..chat.tool_calls import FORMATS
from ..flags import CheckConfig, ConfigError
from ..generation.defaults import read_defaults
from .chat_commands import printable
from .self_test import Answer, Check, Description, describe, self_test

CHAT = (
    Message("system", "You are helpful."), Message("user", "What is 2 + 2?"), Message("assistant", "It is 4."),
    Message("user", "And 3 + 3?"),
)  # fmt: skip
NATIVE = "TR-Hash native"  # its files come in three wrappers
WIDTH = 90  # characters of a line of ids
SEQUENCES = (1, 8, 32)  # the numbers of sequences whose memory is shown
LENGTHS = 4  # context lengths, each half of the one before
VERDICTS = {
    "passed": "The files are read, and all ways of computing them agree.",
    "failed": "The self-test failed: see above.",
    "not tested": "The files are read; their weights were not tested.",
}


def check(config: CheckConfig) -> int:
    """Print the findings; return 0, or 1 if the self-test failed. Raises an error of `load` for a refused model."""
    report: dict[str, Any] = {"model": model_name(config.model)}
    try:
        for name, section in _sections(config):
            report[name] = section
            if not config.json:
                print("\n".join([f"{name.replace('_', ' ').capitalize()}", *_lines(section), ""]), flush=True)
    except (CheckpointError, ChatTemplateError, ConfigError, EngineStartError) as error:
        if config.json:
            print(json.dumps(report | {"verdict": "refused", "reason": str(error)}, ensure_ascii=False))
        raise
    tests = report.get("self_test", {"checks": ()})["checks"]
    verdict = "failed" if not all(test["passed"] for test in tests) else "passed" if tests else "not tested"
    if config.json:
        print(json.dumps(report | {"verdict": verdict}, ensure_ascii=False))
    else:
        print(f"Verdict: {verdict}. {VERDICTS[verdict]}")
    return int(verdict == "failed")


def _sections(config: CheckConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the sections to show, each as soon as it is known."""
    path = find_checkpoint(config)
    engine = config.engine_config(path)
    folder, facts = folder_of(path), describe(engine)
    yield "network", _network(folder, facts)
    tokenizer = Tokenizer.from_folder(path)
    yield "tokens", _tokens(tokenizer, facts)
    template, origin = find_template(config, tokenizer)
    yield "chat", _chat(template, origin, tokenizer, facts.era)
    _, sampling = read_defaults(folder, config.generation_config, config.override_generation_config)
    yield "stop_rules", {"ids": list(facts.ends), "texts": list(template.stop_strings), "sampling_defaults": sampling}
    yield "memory", _memory(facts)
    if not config.skip_self_test:
        fits = tokenizer.vocab_size <= facts.vocab_size
        checks, answers = self_test(engine)
        checks.insert(0, Check("tokenizer fits", fits, "its ids are " + ("" if fits else "not ") + "all in the model"))
        results: dict[str, Sequence[Check | Answer]] = {"checks": checks, "texts": answers}
        yield "self_test", {name: [each._asdict() for each in found] for name, found in results.items()}


def _network(folder: Path, facts: Description) -> dict[str, Any]:
    model_type = (read_json(folder / "config.json") or {}).get("model_type")
    prefix = "names of tensors begin with model." if facts.has_prefix else "names of tensors have no prefix"
    wrapper = f"model_type {model_type or 'none'}; {prefix}"
    if facts.era == NATIVE:
        kind = "of transformers" if facts.has_prefix else "the Hugging Face bundle" if model_type else "the framework's"
        wrapper = f"{kind} ({wrapper})"
    return {
        "line": "TR-Hash" if facts.era.startswith("TR-Hash") else "Complexity-Deep",
        "form": facts.era,
        "wrapper": wrapper,
        "folder": str(folder),
        "files": list(facts.files),
        "file_dtypes": list(facts.file_dtypes),
        "sizes": facts.sizes,
        "parameters": facts.parameters,
        "active_parameters": facts.active_parameters,
        "context": facts.max_model_len,
        "dtype": facts.dtype,
        "device": facts.device,
    }


def _tokens(tokenizer: Tokenizer, facts: Description) -> dict[str, Any]:
    def token(id_: int | None, file: str) -> dict[str, Any] | None:
        return None if id_ is None else {"id": id_, "text": tokenizer.token_text(id_), "file": file}

    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    more = facts.vocab_size - tokenizer.vocab_size
    comparison = f"{more:,} ids more than the tokenizer, in no text" if more > 0 else "all ids of the tokenizer"
    if more < 0:
        comparison = f"{-more:,} ids fewer than the tokenizer: texts with these are refused"
    return {
        **{role: token(id_, tokenizer.origins[f"{role}_token"]) for role, id_ in ids.items()},
        "stop": [token(id_, file) for id_, file in facts.ends.items()],
        "tokenizer_vocabulary": tokenizer.vocab_size,
        "model_vocabulary": facts.vocab_size,
        "comparison": f"the model has {comparison}",
        "bos_before_chats": tokenizer.adds_bos,
    }


def _chat(template: ChatTemplate, origin: str, tokenizer: Tokenizer, era: str) -> dict[str, Any]:
    """Render a chat, without its system message if the template has no place for one."""
    ids: list[int] = []
    note = ""
    for messages in (CHAT, CHAT[1:]):
        try:
            ids = template.render(messages)
            break
        except ChatTemplateError as error:
            note = f"{'with a system message' if messages is CHAT else 'without one'}: {error} {note}".rstrip()
    marks, tools = find_marks("auto", tokenizer, template.source, era), find_format("auto", template, tokenizer)
    reasoning = "none" if not has_reasoning(marks) else "special tokens" if marks and marks.ids else "tags in the text"
    return {
        "template": origin or "none in the files: the family's plain format",
        "rendered": tokenizer.decode(ids, skip_special_tokens=False),
        "ids": ids,
        **({"note": note} if note else {}),
        "reasoning_marks": reasoning,
        "tool_call_format": next(name for name, each in FORMATS.items() if each.opening == tools.opening),
    }


def _memory(facts: Description) -> dict[str, Any]:
    """Return how much memory weights and KV cache take; Python and its libraries need some hundred MiB more."""
    lengths = sorted({max(1, facts.max_model_len >> n) for n in range(LENGTHS)})
    blocks = {length: -(-length // facts.block_size) for length in lengths}
    return {
        "weights_bytes": facts.weight_bytes,
        "cache_bytes_per_token": facts.block_bytes // facts.block_size,
        "needed": [
            {
                "context": length,
                "sequences": count,
                "bytes": facts.weight_bytes + count * blocks[length] * facts.block_bytes,
            }
            for length in lengths
            for count in SEQUENCES
        ],
        "in_addition": "Python and its libraries, some hundred MiB",
        "free_bytes": facts.free_bytes,
        "max_num_seqs": facts.max_num_seqs,
    }


def _lines(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show a section: names on the left, values on the right."""
    width = max(map(len, section))
    for name, value in section.items():
        shown = list(_needed(value)) if name == "needed" else _shown(name, value)
        title = " ".join(word for word in name.split("_") if word != "bytes")
        for left, line in zip_longest([title], shown or ["none"], fillvalue=""):
            yield f"  {left:<{width}}  {printable(line)}".rstrip()


def _shown(name: str, value: Any) -> list[str]:
    """Return a value in words, which may take several lines."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int):
        return [_size(value) if "bytes" in name else f"{value:,}"]
    if isinstance(value, str):
        return value.replace("\n", "⏎\n").rstrip("\n").split("\n")
    if isinstance(value, Mapping):
        return [_entry(value)]
    if value and isinstance(value[0], int):
        return textwrap.wrap(" ".join(map(str, value)), WIDTH)
    if value and isinstance(value[0], str):
        return [", ".join(map(repr, value))]
    return list(map(_entry, value or ()))


def _entry(value: Mapping[str, Any]) -> str:
    """Return a token, a test's result or a text of the model in a line."""
    if "id" in value:
        return f"{value['id']:<6} {value['text']!r} from {value['file']}"
    if "passed" in value:
        return f"{'ok    ' if value['passed'] else 'FAILED'} {value['name']}: {value['found']}"
    return f"{value['prompt']!r} → {value['text']!r}"


def _needed(rows: Sequence[Mapping[str, int]]) -> Iterator[str]:
    for length, group in groupby(rows, lambda row: row["context"]):
        sizes = ", ".join(f"{_size(row['bytes'])} for {row['sequences']}" for row in group)
        yield f"{sizes} sequences of {length:,} tokens"


def _size(count: int) -> str:
    power = max(0, min(3, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:,.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
