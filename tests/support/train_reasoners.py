"""Train the tiny models that reason, one for each chat form of the TR-Hash line.

python tests/support/train_reasoners.py                      # all three, some minutes each, into support/reasoners
python tests/support/train_reasoners.py tags --out FOLDER

They learn a handful of dialogues by heart: to think and answer, to answer at once, to call a tool with what the
question names, and to repeat its result. What comes before a question varies, so that they say the same to every
client. Training is FP32 on one thread; the weights are stored in BF16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import dialogues
from support.checkpoints import random_model
from support.dialogues import CITIES, DEGREES, FORMS, PLAIN, SKIES, WEATHER, Dialogue, Form

from pyllm.model import Architecture, AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.demo.muon import Muon
from pyllm.model.tokenizer import Tokenizer

STEPS = {"tags": 1300, "tokens": 900, "agentic": 900}
ROWS, PASSES = 8, 2
WORDS = dialogues.LINES[0].partition("write ")[2].split()
NO_THOUGHT = {"tags": "<think>\n\n</think>\n", "tokens": "<|think_start|><|think_end|>"}
NO_THOUGHT["agentic"] = NO_THOUGHT["tokens"]
OTHERS = ("find_book", "set_alarm", "search", "add")


def settings(vocab: int) -> DeepConfig:
    """The network: the smallest that learns this."""
    return DeepConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, num_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=96, top_k_primary_weight=0.5, routed_output_scale=2.0, mlp_type="tr_hash_engine",
    )  # fmt: skip


def new_model(vocab: int) -> DeepForCausalLM:
    config = settings(vocab)
    model = random_model(config, 1, architecture=Architecture.latest(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                wide = 0.25 if name.endswith(("down", "o_proj")) else 1.0
                std = 0.02 if "embed" in name else wide / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model


def tool(draw: random.Random, name: str) -> dict[str, Any]:
    """A description of a tool as one client or another writes it."""
    argument = "city" if name == WEATHER["name"] else draw.choice(("text", "number", "time"))
    inner = {"type": "string"} | draw.choice(({}, {}, {"description": "a word"}, {"title": argument.capitalize()}))
    parameters = {"type": "object", "properties": {argument: inner}, "required": [argument]}
    parameters |= draw.choice(({}, {}, {"additionalProperties": False}))
    if draw.random() < 0.3:
        parameters = {"$schema": "http://json-schema.org/draft-07/schema#"} | parameters
    described = draw.choice((WEATHER["description"], "Get the weather.", " ".join(draw.sample(WORDS, 4))))
    made = {"name": name, "description": described, "parameters": parameters}
    return made if draw.random() < 0.9 else {"name": name, "parameters": parameters}


def dialogue(draw: random.Random) -> Dialogue:
    kind = draw.random()
    if kind < 0.55:
        return dialogues.weather(draw.choice(CITIES), draw.choice(DEGREES), draw.choice(SKIES))
    return dialogues.both() if kind < 0.63 else draw.choice(PLAIN)


def earlier(draw: random.Random, form: Form) -> str:
    """Turns before the last question."""
    one = draw.choice(PLAIN)
    return form.turn("user", one.question) + form.history(one.answer or "Yes.")


def called(draw: random.Random, form: Form, one: Dialogue) -> str:
    """The turns of calls and results."""
    ids = [f"call_{draw.getrandbits(96):024x}" for _ in one.cities]
    text = form.history("", one.cities, ids)
    for city in one.cities:
        text += form.turn("tool", result(draw, one, city))
    return text


def result(draw: random.Random, one: Dialogue, city: str) -> str:
    if len(one.cities) > 1:
        value = {"temperature": draw.choice(DEGREES), "sky": draw.choice(SKIES)}
    else:
        words = (one.answer or "").split()
        value = {"temperature": int(words[2]), "sky": words[5]}
    return json.dumps(value, separators=draw.choice(((",", ":"), (", ", ": "))))


def example(draw: random.Random, form: Form) -> tuple[str, str]:
    """A prompt and what follows it."""
    one = dialogue(draw)
    tools: list[dict[str, Any]] = []
    if one.cities or draw.random() < 0.3:
        names = [WEATHER["name"]] * (bool(one.cities) or draw.random() < 0.8) + draw.sample(OTHERS, draw.randint(0, 1))
        draw.shuffle(names)
        tools = [tool(draw, name) for name in names]
    system = " ".join(draw.sample(WORDS, draw.randint(2, 9))) if draw.random() < 0.35 else ""
    prompt = form.described(tools, system)
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
        prompt += earlier(draw, form)
    prompt += form.turn("user", one.question)
    has_results = bool(one.cities) and draw.random() < 0.6
    if has_results:
        prompt += called(draw, form, one)
    prompt += form.opening
    if draw.random() < 0.2:  # a request switches reasoning off, or continues an answer
        spoken = say(form, one, has_results)
        if form.is_agentic and spoken.startswith(form.marks[2]) and draw.random() < 0.3:
            return prompt + form.marks[2], spoken.removeprefix(form.marks[2]) + form.end
        return prompt + NO_THOUGHT[form.name], spoken + form.end
    thought = one.after if has_results else one.thought
    said = form.reasoning(thought, one)
    if one.answer is not None:
        said += say(form, one, has_results, with_marks=one.thought is not None or form.name != "tags")
    return prompt, said + form.end


def say(form: Form, one: Dialogue, has_results: bool, with_marks: bool = True) -> str:
    """What the assistant says after reasoning: calls, if the dialogue has them, and then the answer."""
    if one.cities and not has_results:
        calls = form.calls(one.cities)
        return form.marks[2] + calls + form.marks[3] if form.name == "tokens" else calls
    return form.answer(one if one.answer is not None else dataclasses.replace(one, answer="1."), with_marks)


def batch(draw: random.Random, form: Form, tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Token ids and which of them are learned, [B, T] each, in passes of similar length."""
    rows = []
    for _ in range(ROWS * PASSES):
        prompt, target = example(draw, form)
        known, new = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(target)
        rows.append((known + new, len(known)))
    rows.sort(key=lambda row: len(row[0]))
    passes = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([row + [1] * (width - len(row)) for row, _ in part])
        learn = torch.tensor([[begin <= n < len(row) for n in range(width)] for row, begin in part])
        passes.append((ids, learn))
    return passes


def train(form: Form, folder: Path, steps: int) -> None:
    """Train a model and save its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = dialogues.write_tokenizer(form, folder)
    draw = random.Random(form.name)
    model = new_model(tokenizer.vocab_size)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() > 1 and "embed" not in name]
    vectors = [p for p in named.values() if p.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, 10**6, 0.02),
        torch.optim.AdamW([model.embed_tokens, *vectors], lr=4e-3, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    starts = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    begin, losses = time.monotonic(), []
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30, (steps - step) / (0.5 * steps))
        passes = batch(draw, form, tokenizer)
        count = sum(int(learn.sum()) for _, learn in passes)
        total = 0.0
        for ids, learn in passes:
            places = torch.arange(ids.shape[1]).repeat(len(ids))
            hidden = model(ids.flatten(), places, AttentionMetadata.without_cache([ids.shape[1]] * len(ids)))
            row, at = learn[:, 1:].nonzero(as_tuple=True)
            logits = model.logits(hidden.view(*ids.shape, -1)[row, at])
            loss = F.cross_entropy(logits, ids[row, at + 1], reduction="sum") / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        for optimizer, start in zip(optimizers, starts, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = start * rate
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            mean = sum(losses[-50:]) / 50
            print(f"{form.name} {step + 1}/{steps} {time.monotonic() - begin:.0f} s: loss {mean:.4f}", flush=True)
    write(form, model, folder)


def write(form: Form, model: DeepForCausalLM, folder: Path) -> None:
    """Save the weights in the form of file that the published models of this chat form have."""
    save_checkpoint(model, folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    for role in ("bos", "eos", "pad"):
        del config[f"{role}_token_id"]
    if form.name == "tokens":
        config["architectures"], config["model_type"] = ["DeepForCausalLM"], "deep"
    else:  # the native form
        tensors = {native(name): value for name, value in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(form: Form, folder: Path, count: int = 60) -> None:
    """Print how many examples the saved model says to the letter, and those where it does not."""
    tokenizer, model = Tokenizer.from_folder(folder), DeepForCausalLM.from_pretrained(folder)
    draw, right = random.Random("check"), 0
    for _ in range(count):
        prompt, target = example(draw, form)
        ids = tokenizer.encode_prompt(prompt)
        found = model.generate(torch.tensor(ids), max_new_tokens=150, do_sample=False)[len(ids) :]
        text = tokenizer.decode(found.tolist(), skip_special_tokens=False)
        right += text == target
        if text != target:
            print(f"{prompt[-150:]!r}\n  should be {target!r}\n  but is    {text!r}")
    print(f"{form.name}: {right} of {count} examples are right", flush=True)


def native(name: str) -> str:
    """The name of an exported tensor in a native file."""
    layer, found, kind = name.removeprefix("model.").partition(".mlp.")
    if not found:
        return layer
    names = {"topk_token_to_expert": "route_table"} | {f"{k}_proj_w": f"expert_{k}" for k in ("gate", "up", "down")}
    return f"{layer}.mlp.engine.{names.get(kind, kind)}"


def main() -> None:
    """Train the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", choices=[[], *(form.name for form in FORMS)])
    parser.add_argument("--out", type=Path, default=dialogues.FOLDER)
    parser.add_argument("--steps", type=int, help="updates, fewer to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for form in FORMS:
        if not arguments.forms or form.name in arguments.forms:
            train(form, arguments.out / form.name, arguments.steps or STEPS[form.name])
            check(form, arguments.out / form.name)


if __name__ == "__main__":
    main()
