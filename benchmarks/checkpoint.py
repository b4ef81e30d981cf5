"""A checkpoint folder without weights, of a published shape, for `--load-format dummy`."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyllm.model.config import DeepConfig

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
}
SPECIAL = ["</s>", "<pad>", "<s>", "<unk>"]


def write_shape(folder: Path, shape: str) -> None:
    """Write config.json and a tokenizer in which every id is some text, so that every token makes a chunk."""
    config = SHAPES[shape]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{i}" for i in range(config.vocab_size - len(SPECIAL) - len(alphabet))]
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
