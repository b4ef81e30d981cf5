"""Makes small random checkpoints whose outputs are sensitive to every part of the network."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyllm.model import Architecture, DeepConfig, DeepForCausalLM
from pyllm.model.checkpoint.loader import save_checkpoint
from pyllm.server.flags import DEMO_FOLDER

CHAT_TEMPLATE = (
    "{% for t in tools or [] %}tool: {{ t.function | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}{{ m.name and '/' + m.name }}{{ m.tool_call_id and '/' + m.tool_call_id }}: "
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if aside %}({{ aside }}) {% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TINY = DeepConfig(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=130,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    num_experts=4,
    dynamics_dt=0.2,
    dynamics_controller_hidden=16,
)
HASH = Architecture(
    era="TR-Hash", contextual_mu=False, mu_attention=False, mu_highway=False, mu_router=False, mu=False,
    shared_expert_size=72, routes=2, output_gates=True, channel_modulation=True,
)  # fmt: skip
"""The TR-Hash line with all that a file of it may have, for a configuration with `TR_HASH` in it."""
TR_HASH = {
    "top_k_primary_weight": 0.7, "shared_output_scale": 0.8, "routed_output_scale_first_layer": 1.5,
    "routed_output_scale_last_layer": 0.9, "use_mup_attn_scale": True, "use_mup_output_mult": True,
    "mup_base_width": 48,
}  # fmt: skip
# How widely each matrix is drawn, in units of 1/sqrt(inputs): enough for mu to re-route tokens and for clamps to bite.
GAINS = {"o_proj": 2.2, "gate_up": 1.6, "down": 1.6, "dynamics_in": 0.8, "router": 3.4, "controller_v": 0.4}


def random_model(
    config: DeepConfig, seed: int, dtype: torch.dtype = torch.float32, architecture: Architecture | None = None
) -> DeepForCausalLM:
    """A model with random weights, in which every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepForCausalLM(config, architecture, dtype=dtype)

    def normal(parameter: torch.Tensor, mean: float, std: float) -> None:
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if "norm" in kind:
                normal(parameter, 1.0, 0.2)
            elif kind == "controller_out_bias":
                normal(parameter, 0.6, 0.7)
            elif parameter.dim() == 1:
                normal(parameter, 0.1, 0.5)
            else:
                normal(parameter, 0.0, GAINS.get(kind, 1.0) / math.sqrt(parameter.shape[-1]))
    for name, buffer in model.named_buffers():
        if name.endswith("token_to_expert"):
            buffer.copy_(torch.arange(config.vocab_size) % config.experts)
        elif name.endswith("routes"):
            scores = torch.rand(config.vocab_size, config.experts, generator=generator)
            buffer.copy_(scores.argsort(dim=1)[:, : len(buffer)].T)
    return model


def byte_tokenizer() -> Tokenizer:
    """One id per byte after the four special tokens of the family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["</s>", "<pad>", "<s>", "<unk>"]
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_checkpoint(folder: Path, seed: int, config: DeepConfig = TINY) -> None:
    """Save a random model with a byte tokenizer and a chat template to `folder`."""
    save_checkpoint(random_model(config, seed), folder, dtype=torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHAT_TEMPLATE}))


def write_long_demo(folder: Path, context: int) -> None:
    """Copy the demo model to `folder` with a longer context, so that the long prompts of agents fit."""
    for path in DEMO_FOLDER.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))


def write_rambler(folder: Path, context: int) -> None:
    """Save a random model with the demo's tokenizer and template: it reads fast, and says nonsense that ends soon."""
    config = replace(TINY, vocab_size=6000, max_position_embeddings=context)
    save_checkpoint(random_model(config, seed=7), folder, dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"eos_token_id": list(range(0, 6000, 40))}))
