"""The network once more, written for nothing but to be right: no cache, no batch, no stacked weights.

It shares no code with the product, reads the tensors of a v0.12-0.14 file by their published names, and
works through one sequence position by position and head by head, in the order of the equations.
"""

from __future__ import annotations

import math

import torch


def _norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rotate(x, position, theta):
    """RoPE of one head's vector [D] at one position."""
    half = x.shape[0] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.tensor(position, dtype=torch.float32) / theta ** (2 * i / x.shape[0])
        cos, sin = torch.cos(angle), torch.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def _act(x, name):
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return torch.relu(x) if name == "relu" else x / (1 + torch.exp(-x))


def full_forward(weights, config, ids):
    """Logits [T, vocab] of one sequence from raw FP32 tensors and the parsed config.json.

    Returns them with the expert of each layer and token (None for a dense MLP).
    """
    w = {key.removeprefix("model."): value.float() for key, value in weights.items()}
    hidden = config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = hidden // heads
    eps = config["rms_norm_eps"]
    divisor = size if config["use_mup_attn_scale"] else math.sqrt(size)
    x = [w["embed_tokens.weight"][i] for i in ids]
    velocity = [torch.zeros(hidden) for _ in ids]
    mu_below, mu_sum = None, None
    all_experts = []
    for layer in range(config["num_hidden_layers"]):
        p = {k.removeprefix(f"layers.{layer}."): t for k, t in w.items() if k.startswith(f"layers.{layer}.")}
        keys, values, outs, mus, experts = [], [], [], [], []
        for t, token in enumerate(ids):
            a = _norm(x[t], p["input_layernorm.weight"], eps)
            parts = {n: p[f"self_attn.{n}_proj.weight"] @ a for n in "qkv"}
            if mu_below is not None:
                for n in "qkv":
                    parts[n] = parts[n] + p[f"self_attn.mu_to_{n}.weight"] @ mu_below[t]
            q, k, v = (parts[n].view(-1, size) for n in "qkv")
            if config["use_qk_norm"]:
                q = _norm(q, p["self_attn.q_norm.weight"], 1e-6)
                k = _norm(k, p["self_attn.k_norm.weight"], 1e-6)
            theta = config["rope_theta"]
            q = torch.stack([_rotate(head, t, theta) for head in q])
            keys.append(torch.stack([_rotate(head, t, theta) for head in k]))
            values.append(v)
            window = config.get("sliding_window")
            first = 0 if window is None else max(0, t - window + 1)
            per_head = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = torch.stack([q[head] @ keys[s][shared] for s in range(first, t + 1)]) / divisor
                share = torch.exp(scores - scores.max())
                share = share / share.sum()
                per_head.append(sum(share[s - first] * values[s][shared] for s in range(first, t + 1)))
            h = p["self_attn.o_proj.weight"] @ torch.cat(per_head)

            both = torch.cat((h, velocity[t]))
            inner = p["dynamics.controller_in.weight"] @ both + p["dynamics.controller_in.bias"]
            control = p["dynamics.controller_out.weight"] @ _act(inner, "silu") + p["dynamics.controller_out.bias"]
            alpha = torch.sigmoid(control[:hidden])
            beta = torch.log1p(torch.exp(control[hidden : 2 * hidden])).clamp(max=2.0)
            gate = torch.sigmoid(control[2 * hidden :])
            mu = p["dynamics.mu"] + p["dynamics.mu_proj.weight"] @ h
            velocity[t] = (alpha * velocity[t] - beta * (h - mu)).clamp(-10, 10)
            h = h + config["dynamics_dt"] * gate * velocity[t]
            mus.append(mu)
            outs.append((h, token))
        for t, (h, token) in enumerate(outs):
            x[t] = x[t] + h
            b = _norm(x[t], p["post_attention_layernorm.weight"], eps)
            if config["use_token_routed_mlp"]:
                scores = torch.zeros(config["num_experts"])
                scores[p["mlp.token_to_expert"].long()[token]] = 10.0
                expert = int((scores + p["mlp.mu_router.weight"] @ mus[t]).argmax())
                gate, up = (b @ p["mlp.gate_up_proj"][expert]).chunk(2)
                x[t] = x[t] + (_act(gate, config["hidden_act"]) * up) @ p["mlp.down_proj"][expert]
                experts.append(expert)
            else:
                gate, up = p["mlp.gate_proj.weight"] @ b, p["mlp.up_proj.weight"] @ b
                x[t] = x[t] + p["mlp.down_proj.weight"] @ (_act(gate, config["hidden_act"]) * up)
        mu_sum = mus if mu_sum is None else [total + mu for total, mu in zip(mu_sum, mus, strict=True)]
        mu_below = [mu + 0.1 * total for mu, total in zip(mus, mu_sum, strict=True)]
        all_experts.append(experts or None)
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    narrower = max(1.0, hidden / config["mup_base_width"]) if config["use_mup_output_mult"] else 1.0
    return torch.stack([head @ _norm(row, w["norm.weight"], eps) / narrower for row in x]), all_experts
