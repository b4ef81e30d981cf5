"""What int8 costs in accuracy: next-token distributions and greedy choices against BF16.

    python benchmarks/int8_accuracy.py                       # the bundled demo model
    python benchmarks/int8_accuracy.py FOLDER [FOLDER ...]   # other checkpoints, each on its own greedy text

Prompts are continued by the BF16 model, greedily; then both models read the same text, and at each generated place
their distributions are compared. FP32 against BF16 is given beside it: the rounding that BF16 itself brings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import report

from pyllm.model import AttentionMetadata, DeepForCausalLM
from pyllm.model.loader import load_checkpoint
from pyllm.model.native import NativeBackend
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.chat_template import ChatTemplate
from pyllm.server.config import DEMO_FOLDER

PROMPTS = (
    "Hello!", "How do I stream a response?", "What can you do?", "What is 3 + 4?", "What is the capital of Italy?",
    "Which day comes after Monday?", "Bonjour !", "Quelle est la capitale de la France ?", "Combien font 2 + 5 ?",
    "Tell me a story.", "My name is Ada. What is my name?", "Who made you?",
)  # fmt: skip
NEW_TOKENS = 48


def load(folder: Path, dtype: torch.dtype, *, int8: bool = False) -> DeepForCausalLM:
    """The model on the compiled kernels."""
    model, _ = load_checkpoint(folder, dtype=dtype, device=torch.device("cpu"), progress=False)
    model.requires_grad_(False)
    model.ops = NativeBackend(model, int8=int8)
    return model


def prompts(folder: Path, vocab_size: int) -> list[list[int]]:
    """Questions through the chat template, or random ids where a checkpoint has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(4, vocab_size, (len(PROMPTS), 16), generator=generator).tolist()
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.chat_template is None:
        return [tokenizer.encode(text, add_bos=True) for text in PROMPTS]
    template = ChatTemplate(tokenizer, tokenizer.chat_template)
    return [template.render([{"role": "user", "content": text}]) for text in PROMPTS]


@torch.inference_mode()
def logprobs(model: DeepForCausalLM, ids: list[int], first: int) -> torch.Tensor:
    """Log-probabilities [places, vocab] at the places from `first` on."""
    at = torch.arange(len(ids))
    hidden = model(torch.tensor(ids), at, AttentionMetadata.without_cache([len(ids)]))
    return model.logits(hidden[first - 1 : -1].contiguous()).log_softmax(-1)


def compare(true: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """KL divergence per place and the share of places with the same most likely token."""
    a, b = torch.cat(true), torch.cat(other)
    divergence = (a.exp() * (a - b)).sum(-1)
    return {
        "kl_mean": round(float(divergence.mean()), 6),
        "kl_median": round(float(divergence.median()), 6),
        "same_choice": round(float((a.argmax(-1) == b.argmax(-1)).float().mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[DEMO_FOLDER])
    for folder in parser.parse_args().folders:
        bf16 = load(folder, torch.bfloat16)
        texts = []
        for ids in prompts(folder, bf16.config.vocab_size):
            out = bf16.generate(torch.tensor(ids), max_new_tokens=NEW_TOKENS, temperature=0.0)
            texts.append((out.tolist(), len(ids)))
        read = {
            "bf16": bf16,
            "int8": load(folder, torch.bfloat16, int8=True),
            "float32": load(folder, torch.float32),
        }
        scores = {name: [logprobs(model, ids, first) for ids, first in texts] for name, model in read.items()}
        places = sum(len(part) for part in scores["bf16"])
        report(
            "int8_accuracy",
            {"model": folder.name, "places": places, "int8_against_bf16": compare(scores["bf16"], scores["int8"]),
             "bf16_against_float32": compare(scores["float32"], scores["bf16"])},
        )  # fmt: skip


if __name__ == "__main__":
    main()
