"""Checkpoint folders of the published shapes: `python benchmarks/checkpoint.py 150m FOLDER [--weights]`.

Without weights they are for `--load-format dummy`; those of `--weights` are random too, but read from a file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyllm.model import DeepConfig, DeepForCausalLM

SHAPES = {
    "150m": DeepConfig(vocab_size=32000),
    "1.5b": DeepConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "200m-hash": DeepConfig(
        mlp_type="tr_hash_engine",
        vocab_size=32000,
        hidden_size=896,
        intermediate_size=256,
        shared_intermediate_size=3072,
        num_experts_per_tok=2,
        num_hidden_layers=16,
        num_attention_heads=14,
        num_key_value_heads=2,
        routed_output_scale=2.0,
    ),
    "tiny": DeepConfig(  # for checks of what is written, not of how fast
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
}
SHAPES["tiny-32k"] = replace(SHAPES["tiny"], vocab_size=32000)
SPECIAL = ["</s>", "<pad>", "<s>", "<unk>"]


def vocabulary(size: int) -> dict[str, int]:
    """Ids by token: special tokens, every byte, and words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{i}" for i in range(size - len(SPECIAL) - len(alphabet))]
    return {token: i for i, token in enumerate(SPECIAL + alphabet + words)}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer in which every id is some text, so that every token makes a chunk."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(vocab_size), merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_shape(folder: Path, shape: str) -> None:
    """Write config.json and the tokenizer."""
    write_tokenizer(folder, SHAPES[shape].vocab_size)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape].to_dict()))


def write_weights(folder: Path) -> None:
    """Add `model.safetensors` with random weights in BF16 to a folder that `write_shape` made."""
    import torch

    from pyllm.model.checkpoint.loader import load_checkpoint, save_checkpoint

    model, _ = load_checkpoint(
        folder, network=DeepForCausalLM, dtype=torch.bfloat16, device=torch.device("cpu"), load_format="dummy"
    )
    save_checkpoint(model, folder, dtype=torch.bfloat16)


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true")
    args = parser.parse_args()
    write_shape(args.folder, args.shape)
    if args.weights:
        write_weights(args.folder)


if __name__ == "__main__":
    main()
