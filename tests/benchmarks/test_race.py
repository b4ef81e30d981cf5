"""What a race needs: the dense twin in both of its forms, llama.cpp's flags, and the table."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pyllm.benchmarks.checkpoint import SHAPES
from pyllm.benchmarks.load.dense_twin import KINDS, write_folder, write_gguf
from pyllm.benchmarks.load.race import llama_flags, markdown, medians

ROOT = Path(__file__).parents[2]
SHAPE, CONFIG = "tiny", SHAPES["tiny"]
TENSORS = {  # llama.cpp's names, by those in transformers
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
ERRORS = {"F32": 0, "F16": 2**-10, "BF16": 0, "Q8_0": 0.6 / 127, "Q4_0": 1.1 / 8}
"""The largest error of a value, as a share of the largest one in its block of 32.

Half a step, and a bit for the scale, which is an FP16; but 4 bits end at +7, a whole step below a block's largest.
"""


def named_for_llama(name: str) -> str:
    """A tensor's name in a GGUF file."""
    _, _, rest = name.partition("model.layers.")
    layer, _, part = rest.partition(".")
    name = f"blk.{layer}.{TENSORS[part.removesuffix('.weight')]}" if rest else TENSORS[name.removesuffix(".weight")]
    return f"{name}.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twin")
    write_folder(path, SHAPE)
    return path


def test_twin_has_our_outer_shape(folder: Path) -> None:
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # fmt: skip
    assert {name: config[name] for name in same} == {name: getattr(CONFIG, name) for name in same}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["model.embed_tokens.weight"].shape == (CONFIG.vocab_size, CONFIG.hidden_size)
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (CONFIG.hidden_size, CONFIG.intermediate_size)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == CONFIG.vocab_size


@pytest.mark.needs("gguf")
@pytest.mark.parametrize("kind", KINDS)
def test_gguf_file_holds_the_twin(folder: Path, tmp_path: Path, kind: str) -> None:
    import gguf

    path = tmp_path / f"{kind}.gguf"
    write_gguf(path, SHAPE, kind)
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert metadata["general.architecture"] == "qwen3"
    assert {name.removeprefix("qwen3."): value for name, value in metadata.items() if name.startswith("qwen3.")} == {
        "vocab_size": CONFIG.vocab_size,
        "context_length": CONFIG.max_position_embeddings,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "block_count": CONFIG.num_hidden_layers,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "attention.key_length": CONFIG.head_dim,
        "attention.value_length": CONFIG.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(CONFIG.rms_norm_eps),
        "rope.freq_base": CONFIG.rope_theta,
    }
    assert metadata["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.__getitem__)
    weights = {named_for_llama(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {tensor.name for tensor in reader.tensors} == set(weights)
    for tensor in reader.tensors:
        weight = weights[tensor.name].float()
        stored = kind if weight.ndim == 2 else "F32"
        assert tensor.tensor_type.name == stored
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(weight.shape)
        width = min(weight.shape[-1], 32)
        errors, blocks = (part.reshape(-1, width).abs() for part in (values - weight, weight))
        assert (errors <= ERRORS[stored] * blocks.amax(1, keepdim=True)).all()


def test_launcher_takes_the_flags_of_a_race() -> None:
    flags = llama_flags(Path("twin.gguf"), 8101, threads=2, slots=32, context=512)
    args = runpy.run_path(str(ROOT / "benchmarks" / "load" / "llama_server.py"))["parse"](flags)
    assert (args.model, args.port, args.threads, args.threads_batch) == ("twin.gguf", 8101, 2, 2)
    assert (args.parallel, args.ctx_size, args.cont_batching) == (32, 32 * 512, True)
    assert (args.cache_prompt, args.cache_ram, args.samplers, args.top_k) == (False, 0, "top_k", 1)


def test_table_has_medians_and_ratios() -> None:
    def runs(*speeds: float) -> list[dict[str, Any]]:
        return [{"output_tok_s": speed, "ttft_p50_ms": 9.0, "tpot_p50_ms": 2.5, "itl_p99_ms": 4.0} for speed in speeds]

    table = medians({8: {"ours": runs(90, 300, 150), "llama.cpp": runs(100, 10, 120)}})
    assert table["8"]["ours"]["output_tok_s"] == 150
    assert table["8"]["ratio"] == {"llama.cpp": 1.5}
    *_, ours, peer = markdown({"bf16": table}).split("\n")
    assert ours == "| bf16 | 8 | ours | 150 | 9 | 2.5 |  |"
    assert peer == "| bf16 | 8 | llama.cpp | 100 | 9 | 2.5 | **1.50** |"
