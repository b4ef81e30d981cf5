"""What 8 bits cost in accuracy: next-token distributions and greedy choices against BF16.

    python benchmarks/cpu/accuracy.py                       # the bundled demo model
    python benchmarks/cpu/accuracy.py FOLDER [FOLDER ...]   # other checkpoints, each on its own greedy text

Prompts are continued by the BF16 model, greedily; then all models read the same text, and at each generated place
their distributions are compared: int8 weights on the CPU's compiled kernels, and FP8 keys and values in plain torch, as
a GPU keeps them, each against BF16 on the same kernels. FP32 against BF16 is given next to it: the rounding that BF16
itself brings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyllm.benchmarks.measure import report
from pyllm.model import AttentionMetadata, DeepForCausalLM
from pyllm.model.checkpoint.loader import load_checkpoint
from pyllm.model.cpu.backend import NativeBackend
from pyllm.model.fp8 import FP8, centre
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat.conversation import Message
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.flags import DEMO_FOLDER

PROMPTS = (
    "Hello!", "How do I stream a response?", "What can you do?", "What is 3 + 4?", "What is the capital of Italy?",
    "Which day comes after Monday?", "Bonjour !", "Quelle est la capitale de la France ?", "Combien font 2 + 5 ?",
    "Tell me a story.", "My name is Ada. What is my name?", "Who made you?",
)  # fmt: skip
NEW_TOKENS = 48
Text = tuple[list[int], int]
"""(token ids, the first generated one)."""


def load(folder: Path, dtype: torch.dtype, *, int8: bool = False, plain: bool = False) -> DeepForCausalLM:
    """The model on the compiled kernels, or in plain torch."""
    model, _ = load_checkpoint(folder, network=DeepForCausalLM, dtype=dtype, device=torch.device("cpu"), progress=False)
    model.requires_grad_(False)
    if not plain:
        model.ops = NativeBackend(model, int8=int8)
    return model


def prompts(folder: Path, vocab_size: int) -> list[list[int]]:
    """Questions through the chat template, or random ids where a checkpoint has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(4, vocab_size, (len(PROMPTS), 16), generator=generator).tolist()
    tokenizer = Tokenizer.from_folder(folder)
    if not tokenizer.chat_templates:
        return [tokenizer.encode(text, add_bos=True) for text in PROMPTS]
    template = ChatTemplate.from_tokenizer(tokenizer)
    return [template.render([Message("user", text)]) for text in PROMPTS]


@torch.inference_mode()
def logprobs(model: DeepForCausalLM, texts: list[Text], kept: torch.dtype | None = None) -> torch.Tensor:
    """Log-probabilities [places, vocab] at the generated places of all texts, with pages of dtype `kept`."""
    parts = []
    for ids, first in texts:
        at = torch.arange(len(ids))
        metadata = AttentionMetadata(
            query_lens=[len(ids)], seq_lens=[len(ids)], slot_mapping=at,
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
        )  # fmt: skip
        hidden = model(torch.tensor(ids), at, metadata, model.new_kv_cache(1, len(ids), kept))
        parts.append(model.logits(hidden[first - 1 : -1].contiguous()).log_softmax(-1))
    return torch.cat(parts)


def compare(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """KL divergence per place and the share of places with the same most likely token, where `a` is the truth."""
    divergence = (a.exp() * (a - b)).sum(-1)
    return {
        "kl_mean": round(float(divergence.mean()), 6),
        "kl_median": round(float(divergence.median()), 6),
        "same_choice": round(float((a.argmax(-1) == b.argmax(-1)).float().mean()), 4),
    }


def fp8_error(model: DeepForCausalLM, texts: list[Text]) -> dict[str, float]:
    """FP8 pages against BF16 pages, in plain torch; changes the model."""
    exact = logprobs(model, texts)
    for layer in model.layers:
        centre(layer)
    return compare(exact, logprobs(model, texts, FP8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[DEMO_FOLDER])
    for folder in parser.parse_args().folders:
        model = load(folder, torch.bfloat16)
        texts = []
        for ids in prompts(folder, model.config.vocab_size):
            out = model.generate(torch.tensor(ids), max_new_tokens=NEW_TOKENS, temperature=0.0)
            texts.append((out.tolist(), len(ids)))
        bf16 = logprobs(model, texts)
        int8 = logprobs(load(folder, torch.bfloat16, int8=True), texts)
        float32 = logprobs(load(folder, torch.float32), texts)
        report(
            "accuracy",
            {"model": folder.name, "places": len(bf16), "int8_against_bf16": compare(bf16, int8),
             "fp8_kv_against_bf16": fp8_error(load(folder, torch.bfloat16, plain=True), texts),
             "bf16_against_float32": compare(float32, bf16)},
        )  # fmt: skip


if __name__ == "__main__":
    main()
