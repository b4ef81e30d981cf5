"""A dense network of the same outer shape as one of ours, for servers that do not know ours.

    python benchmarks/load/dense_twin.py 150m FOLDER                 # a folder for vLLM, transformers, OpenVINO
    python benchmarks/load/dense_twin.py 150m FOLDER --gguf Q8_0     # also FOLDER/Q8_0.gguf, for llama.cpp

It is a Qwen3 with random BF16 weights: as many layers, heads, hidden numbers and token ids as ours, the MLP as wide as
all our experts together, embeddings tied. A file for llama.cpp has every matrix in the one type it is named after, the
embedding and so the LM head too, rounded from the same weights. Writing one needs the package gguf: llama.cpp's own
converter refuses a tokenizer that it does not know, and this one only has to turn every id into some text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyllm.benchmarks.checkpoint import SHAPES, SPECIAL, vocabulary, write_tokenizer

TWINS = tuple(shape for shape in SHAPES if not shape.endswith("-hash"))
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
STD = 0.02  # of the weights, as the family's own initialisation


def twin_config(shape: str) -> dict[str, Any]:
    """The twin's config.json."""
    config = SHAPES[shape]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
    }


def twin_weights(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The twin's weights in BF16, [outputs, inputs] or [width], by their names in transformers; always the same."""
    generator = torch.Generator().manual_seed(0)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * STD).bfloat16()

    def norm(width: int) -> Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    hidden, mlp, head = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (head * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": norm(hidden),
            "self_attn.q_proj": matrix(queries, hidden),
            "self_attn.k_proj": matrix(keys, hidden),
            "self_attn.v_proj": matrix(keys, hidden),
            "self_attn.o_proj": matrix(hidden, queries),
            "self_attn.q_norm": norm(head),
            "self_attn.k_norm": norm(head),
            "post_attention_layernorm": norm(hidden),
            "mlp.gate_proj": matrix(mlp, hidden),
            "mlp.up_proj": matrix(mlp, hidden),
            "mlp.down_proj": matrix(hidden, mlp),
        }
        yield from ((f"model.layers.{layer}.{name}.weight", tensor) for name, tensor in parts.items())
    yield "model.norm.weight", norm(hidden)


def write_folder(folder: Path, shape: str) -> None:
    """Write config.json, the weights and the tokenizer."""
    config = twin_config(shape)
    write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(twin_weights(config)), str(folder / "model.safetensors"), {"format": "pt"})


def write_gguf(path: Path, shape: str, kind: str) -> None:
    """Write the twin for llama.cpp: matrices in one of `KINDS`, norms in FP32."""
    import gguf

    config, architecture = twin_config(shape), gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(f"dense twin of {shape}")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    _add_tokenizer(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in twin_weights(config):
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    kinds = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary(config["vocab_size"])))
    writer.add_token_types([kinds[i >= len(SPECIAL)] for i in range(config["vocab_size"])])
    writer.add_token_merges(["Ġ w"])  # there has to be one
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=TWINS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", nargs="+", choices=KINDS, default=[], metavar="TYPE")
    args = parser.parse_args()
    write_folder(args.folder, args.shape)
    for kind in args.gguf:
        write_gguf(args.folder / f"{kind}.gguf", args.shape, kind)


if __name__ == "__main__":
    main()
