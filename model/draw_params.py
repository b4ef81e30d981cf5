"""How a token is drawn; kept apart from `sampling` so that the API process needs no torch for it."""

from __future__ import annotations

import msgspec


class DrawParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of a sequence is drawn from its logits."""

    temperature: float = 1.0  # 0 is greedy; otherwise the logits are divided by it
    top_k: int = 0  # keep the k most likely tokens; 0 or -1 keeps all
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose probabilities sum to at least this
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one
    presence_penalty: float = 0.0  # subtracted once from the logit of every token already generated
    frequency_penalty: float = 0.0  # subtracted once per occurrence among the generated tokens
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or output
    seed: int | None = None  # makes the draws repeatable in any batch; if None, the engine picks one
