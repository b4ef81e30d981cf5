"""Trains the bundled demo model: `python model/demo/train.py`, on two CPU cores in under an hour.

Everything follows from the seed: tokenizer, corpus, order and weights. Products run in BF16 (fast where the
CPU has BF16 instructions), master weights, residual stream and norms in FP32, as in the network itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from minijinja import Environment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from pyllm.model import AttentionMetadata, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.model.demo.corpus import Pairs, Sample
from pyllm.model.demo.muon import Muon
from pyllm.model.demo.prose import common_words, load_prose

HERE = Path(__file__).resolve().parent
SEED = 20261122
VOCAB = 6000
TOKENS_PER_STEP = 3072
EOS, PAD, BOS, ASSISTANT = 0, 1, 2, 6
SPECIAL = ["</s>", "<pad>", "<s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CALL_TOKENS = ["<tool_call>", "</tool_call>"]  # visible in the text, so not "special"

# Rendered without trim_blocks and lstrip_blocks, so all white space that counts is in the quotes.
TEMPLATE = (
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- if messages and messages[0].role in ['system', 'developer'] -%}"
    "{%- set system = messages[0].content or '' -%}{%- set turns = messages[1:] -%}{%- endif -%}"
    "{%- if tools or system -%}{{ '<|system|>\\n' }}"
    "{%- if tools -%}"
    '{{ \'To call a tool, answer <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Tools:\\n\' }}'
    "{%- for tool in tools -%}{%- set f = tool.function -%}{{ f.name + '(' }}"
    "{%- if f.parameters and f.parameters.properties -%}{{ f.parameters.properties | list | join(', ') }}{%- endif -%}"
    "{{ ')' }}{%- if f.description -%}{{ ': ' + f.description }}{%- endif -%}{{ '\\n' }}{%- endfor -%}{%- endif -%}"
    "{{ system + '</s>\\n' }}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{ '<|' + ('system' if message.role == 'developer' else message.role) + '|>\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] -%}{%- set f = call.function -%}"
    '{{ \'<tool_call>{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}</tool_call>' }}{%- endfor -%}"
    "{{ '</s>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training; it starts from the saved weights of the one before.

    Attributes:
        steps: how many are done; the schedules run as if to `horizon`.
        prose: share of prose rows at the beginning, and how much less at the end.
        copies: share of copying exercises at the beginning; falls to a tenth in the first third.
        warmup: steps over which the learning rate rises.
        drills: share of pages of bare sums and spellings among the short texts.
        first: share of the questions that a newcomer asks first.
        rate: of learning, as a multiple of the usual.
    """

    steps: int
    horizon: int
    prose: tuple[float, float]
    copies: float
    warmup: int = 100
    drills: float = 0.12
    first: float = 0.0
    rate: float = 1.0


# Without exercises, and with a third of them among the rest, 1,500 steps did not teach it to copy a name from the
# question; two minutes of copying alone do, and what comes after is learnt faster. Hence the stages.
STAGES = (
    Stage(steps=1000, horizon=2200, prose=(0.26, 0.2), copies=0.0),
    Stage(steps=500, horizon=1400, prose=(0.1, 0.05), copies=0.5),
    Stage(steps=120, horizon=10_000, prose=(0.0, 0.0), copies=1.0, warmup=20),
    Stage(steps=800, horizon=800, prose=(0.1, 0.05), copies=0.3, warmup=30),
    Stage(steps=700, horizon=700, prose=(0.08, 0.04), copies=0.15, warmup=20, drills=0.3, first=0.06, rate=0.5),
)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, and for each whether the model is to learn to write it."""

    ids: list[int]
    learn: list[bool]


class Data:
    """Windows of tokens for each step, and the held-back material, all from the seed."""

    def __init__(self, tokenizer_file: Path) -> None:
        prose = load_prose()
        documents = [text[at : at + 8000] for text in prose for at in range(0, len(text), 8000)]
        held = {d for d in documents if hashlib.sha256(d.encode()).digest()[0] < 5}
        documents = [d for d in documents if d not in held]
        self.pairs = Pairs(common_words(prose))
        self.environment = Environment()
        if not tokenizer_file.exists():
            rng = Random(SEED)
            chats = [self.render(self.pairs.conversation(rng)) for _ in range(20_000)]
            train_tokenizer([*documents, *chats]).save(str(tokenizer_file))
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.prose = [i for e in self.tokenizer.encode_batch(documents) for i in (*e.ids, EOS)]
        self.held_prose = [e.ids[:512] for e in self.tokenizer.encode_batch(sorted(held)) if len(e.ids) >= 512]

    def render(self, sample: Sample) -> str:
        """The chat as text, by the template that is shipped."""
        return self.environment.render_str(TEMPLATE, messages=sample.messages, tools=list(sample.tools))

    def encode(self, sample: Sample) -> Text:
        """The chat as tokens; what the assistant says, with its end token, is to be learnt."""
        ids = self.tokenizer.encode(self.render(sample)).ids
        learn, speaking = [], False
        for i, token in enumerate(ids):
            learn.append(speaking and ids[i - 1] != ASSISTANT)  # the newline after the role is given
            speaking = token == ASSISTANT or (speaking and token != EOS)
        return Text(ids, learn)

    def copying(self, rng: Random) -> Text:
        """Random tokens, then the same again once or twice: what to write is all in the context."""
        tokens = [rng.randrange(len(SPECIAL + CALL_TOKENS), VOCAB) for _ in range(rng.randint(4, 40))]
        again = rng.choice((1, 2))
        return Text(tokens * (1 + again) + [EOS], [False] * len(tokens) + [True] * (len(tokens) * again + 1))

    def window(self, rng: Random, length: int, progress: float, stage: Stage) -> Text:
        """One row of training tokens: prose, one long conversation, or short texts with `<s>` between."""
        copies = stage.copies * max(0.1, 1 - 3 * progress)
        if rng.random() < stage.prose[0] - stage.prose[1] * progress:
            at = rng.randrange(len(self.prose) - length)
            return Text(self.prose[at : at + length], [True] * length)
        ids: list[int] = []
        learn: list[bool] = []
        long_chat = length > 256 and rng.random() < 0.5
        misses = 0
        while len(ids) < length and misses < 8:
            if long_chat:
                text = self.encode(self.pairs.conversation(rng, turns=length // 8))
            elif stage.copies and rng.random() < copies:
                text = self.copying(rng)
            elif stage.first and rng.random() < stage.first:
                text = self.encode(self.pairs.first_question(rng))
            elif rng.random() < stage.drills:
                drill = self.tokenizer.encode(self.pairs.drill(rng)).ids
                text = Text([*drill, EOS], [True] * (len(drill) + 1))
            else:
                text = self.encode(self.pairs.conversation(rng))
            if not long_chat and len(ids) + 1 + len(text.ids) > length:
                misses += 1  # too long for what is left: another may fit
                continue
            ids += [BOS] * bool(ids) + text.ids
            learn += [False] * bool(learn) + text.learn
        rest = max(0, length - len(ids))
        return Text((ids + [PAD] * rest)[:length], (learn + [False] * rest)[:length])

    def step(self, stage: Stage, offset: int, step: int) -> tuple[Tensor, Tensor, int]:
        """Ids int64 [T] and mask bool [T] of one step, and the length of its rows; `offset` steps came before."""
        rng = Random(f"{SEED} {offset + step}")
        length = rng.choices((256, 512, 1024), (80, 15, 5))[0]
        rows = [self.window(rng, length, step / stage.horizon, stage) for _ in range(TOKENS_PER_STEP // length)]
        ids = torch.tensor([row.ids for row in rows]).flatten()
        return ids, torch.tensor([row.learn for row in rows]).flatten(), length


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE whose digits stand alone, so that sums are sums of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [AddedToken(mark, special=mark in SPECIAL, normalized=False) for mark in SPECIAL + CALL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=marks, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(values))


def new_model(config: DeepConfig) -> DeepForCausalLM:
    """The network with its starting values."""
    torch.manual_seed(SEED)
    model = DeepForCausalLM(config)
    hidden = config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.split(".")[-1]
            if "norm" in last:
                parameter.fill_(1.0)
            elif last in ("mu", "router", "controller_bias"):
                parameter.zero_()
            elif last == "controller_out_bias":  # alpha 0.9, beta 0.1, gate 0.5
                starts = (math.log(9.0), math.log(math.expm1(0.1)), 0.0)
                parameter.copy_(torch.tensor(starts).repeat_interleave(hidden))
            else:
                deep = math.sqrt(2 * config.num_hidden_layers) if last in ("o_proj", "down") else 1.0
                nn.init.normal_(parameter, std=0.02 / deep)
                if last == "kqv_proj":
                    parameter[:, hidden:].mul_(0.2)
                elif last == "controller_out":
                    parameter.mul_(0.2)
        for layer in model.layers:
            assert isinstance(layer.token_to_expert, Tensor)
            layer.token_to_expert.copy_(torch.arange(config.vocab_size) % config.experts)
            assert isinstance(layer.router, nn.Parameter)
            layer.router.requires_grad_(False)  # a choice of expert has no gradient
    return model


def train(data: Data, model: DeepForCausalLM, stage: Stage, offset: int, checkpoint: Path) -> None:
    """Train one stage in place; a snapshot is written to `checkpoint` now and then, and at the end."""
    for layer in model.layers:
        assert isinstance(layer.router, nn.Parameter)
        layer.router.requires_grad_(False)  # a choice of expert has no gradient
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.dim() > 1 and "embed" not in name]
    vectors = [p for p in trained.values() if p.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, model.config.hidden_size, 0.02),
        torch.optim.AdamW([{"params": [model.embed_tokens], "lr": 4e-3}, {"params": vectors, "lr": 2e-3}],
                          betas=(0.9, 0.97), weight_decay=0.0),
    ]  # fmt: skip
    for group in optimizers[1].param_groups:
        group["initial_lr"] = group["lr"]
    start, shown = time.monotonic(), 0.0
    for step in range(stage.steps):
        factor = stage.rate * min(1.0, (step + 1) / stage.warmup, 1.6 * (1 - step / stage.horizon) + 0.005)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        ids, learn, length = data.step(stage, offset, step)
        positions = torch.arange(length).repeat(len(ids) // length)
        targets = learn.reshape(-1, length)[:, 1:].nonzero()  # row, place before the target
        at = targets[:, 0] * length + targets[:, 1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(ids, positions, AttentionMetadata.without_cache([length] * (len(ids) // length)))
            logits = model.logits(hidden[at])
        loss = F.cross_entropy(logits.float(), ids[at + 1])
        loss.backward()
        nn.utils.clip_grad_norm_([model.embed_tokens, *vectors], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        if step % 20 == 19:
            speed = (step + 1) * TOKENS_PER_STEP / (time.monotonic() - start)
            print(f"step {step + 1}/{stage.steps} loss {shown:.3f} {speed:.0f} tokens/s", flush=True)
        if step % 250 == 249 or step + 1 == stage.steps:
            save_checkpoint(model, checkpoint, dtype=torch.bfloat16)
    print(f"trained on {stage.steps * TOKENS_PER_STEP} tokens in {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def evaluate(data: Data, model: DeepForCausalLM, count: int = 200) -> str:
    """A Markdown table: share of held-back questions answered exactly as expected at temperature 0, by language."""
    rng = Random(SEED + 1)
    lines = ["| kind | English | French |", "|---|---|---|"]
    for kind in data.pairs.kinds:
        cells = [answered(data, model, kind, lang, count, rng) for lang in ("en", "fr")]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} |")
        print(lines[-1], flush=True)
    losses = []
    for ids in data.held_prose:
        tokens = torch.tensor(ids)
        hidden = model(tokens, torch.arange(len(ids)), AttentionMetadata.without_cache([len(ids)]))
        losses.append(F.cross_entropy(model.logits(hidden[:-1]), tokens[1:]).item())
    lines.append(f"\nHeld-back prose: {sum(losses) / len(losses):.3f} nats a token.")
    return "\n".join(lines)


def answered(data: Data, model: DeepForCausalLM, kind: str, lang: str, count: int, rng: Random) -> str:
    """Accuracy on up to `count` different held-back questions.

    An answer is right if at each of its tokens, end token included, the expected one is the likeliest:
    then and only then greedy decoding writes it.
    """
    seen: set[str] = set()
    right = 0
    for _ in range(count * 30):
        sample = data.pairs.kinds[kind][1](rng, lang, lang)
        if not sample.held_back:
            continue
        text = data.encode(sample)
        name = data.render(sample)
        if name in seen:
            continue
        seen.add(name)
        ids, length = torch.tensor(text.ids), len(text.ids)
        hidden = model(ids, torch.arange(length), AttentionMetadata.without_cache([length]))
        end = length - text.learn[::-1].index(True)
        begin = end - ([*text.learn[:end][::-1], False]).index(False)
        best = model.logits(hidden[begin - 1 : end - 1]).argmax(dim=-1)
        right += best.tolist() == text.ids[begin:end]
        if len(seen) == count:
            break
    return f"{100 * right / len(seen):.0f} % of {len(seen)}" if seen else "–"


def write_settings(out: Path) -> None:
    """The chat template and defaults that go next to the weights."""
    names = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer_config = {
        **names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True, "temperature": 0.3, "top_p": 0.9}
    for name, values in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Train, write the checkpoint, and print how it does on what was held back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-stage", type=int, default=1, help="take earlier stages from the snapshots")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the checkpoint")
    parser.add_argument("--snapshots", type=Path, default=Path("demo_snapshots"), help="folder for snapshots")
    parser.add_argument("--threads", type=int, default=2, help="1 gave the shipped weights")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the checkpoint in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # the order of sums, and so the weights, depend on it
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = args.out / "tokenizer.json"
    if not args.evaluate:
        tokenizer_file.unlink(missing_ok=True)
        data = Data(tokenizer_file)
        config = DeepConfig(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024,
        )  # fmt: skip
        model = new_model(config)
        print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(data.prose)} tokens of prose", flush=True)
        offset = 0
        for number, stage in enumerate(STAGES):
            snapshots = args.snapshots / f"stage{number + 1}"
            if number + 1 >= args.from_stage:
                train(data, model, stage, offset, snapshots)
            model = DeepForCausalLM.from_pretrained(snapshots)
            offset += stage.steps
        save_checkpoint(model, args.out, dtype=torch.bfloat16)
        write_settings(args.out)
    else:
        data = Data(tokenizer_file)
    print(evaluate(data, DeepForCausalLM.from_pretrained(args.out)))


if __name__ == "__main__":
    # Large tensors come and go at each step: keep their memory instead of giving it back to the system each time.
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "500000000"}
    if not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    main()
