"""The model on its own, as the model cards show it: loaded by name and continuing one prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from .backend import AttentionMetadata
from .checkpoint.hub import resolve_model
from .checkpoint.loader import load_checkpoint
from .draw_params import DrawParams
from .network import DeepNetwork
from .sampling import SamplingBatch, sample

BLOCK_SIZE = 16


class DeepForCausalLM(DeepNetwork):
    """A Complexity-Deep language model."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,  # branch, tag or commit of a hub id
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a checkpoint of any era from a folder or a hub id; raise `CheckpointError` if that fails."""
        folder = resolve_model(str(name_or_path), revision)
        model, _ = load_checkpoint(folder, network=cls, dtype=dtype, device=torch.device(device))
        return model

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,  # int64 [T] or [1, T]
        *,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,  # False is greedy at any temperature
        seed: int | None = None,
        eos_token_id: int | tuple[int, ...] | None = None,  # ids that end the text; None: the config's
        streamer: Callable[[int], None] | None = None,  # called with each new token id
    ) -> Tensor:
        """Continue one prompt, drawing tokens by the rules of `DrawParams`.

        Returns the prompt and its continuation, with the end token if one was drawn, in the prompt's shape. Raises
        `ValueError` for a prompt that is empty or not one sequence.
        """
        flat = input_ids.flatten().to(self.device)
        if input_ids.dim() > 2 or (input_ids.shape[0] != 1 and input_ids.dim() == 2) or not len(flat):
            raise ValueError(f"input_ids must be one prompt that is not empty, but got shape {list(input_ids.shape)}.")
        ends = self.config.eos_token_ids if eos_token_id is None else torch.tensor(eos_token_id).flatten().tolist()
        params = DrawParams(
            temperature=temperature if do_sample else 0.0, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=random.getrandbits(63) if seed is None else seed,
        )  # fmt: skip
        tokens: list[int] = flat.tolist()
        for token in self._continue(tokens, params, max_new_tokens):
            if streamer is not None:
                streamer(token)
            if token in ends:
                break
        return torch.tensor(tokens, device=input_ids.device).reshape(*input_ids.shape[:-1], -1)

    def _continue(self, tokens: list[int], params: DrawParams, max_new_tokens: int) -> Iterator[int]:
        """Append the next tokens to `tokens`, one by one."""
        prompt_len = len(tokens)
        blocks = -(-(prompt_len + max_new_tokens) // BLOCK_SIZE)
        cache = self.new_kv_cache(blocks, BLOCK_SIZE)
        table = torch.arange(blocks, device=self.device)[None]
        computed = 0
        while len(tokens) < prompt_len + max_new_tokens:
            at = torch.arange(computed, len(tokens), device=self.device)
            metadata = AttentionMetadata(
                query_lens=[len(at)], seq_lens=[len(tokens)], num_decodes=int(len(at) == 1), slot_mapping=at,
                block_tables=table,
            )  # fmt: skip
            hidden = self(torch.tensor(tokens[computed:], device=self.device), at, metadata, cache)
            computed = len(tokens)
            batch = SamplingBatch.build([params], [computed], self.device, token_ids=[(tokens, prompt_len)])
            tokens.append(int(sample(self.logits(hidden[-1:]), batch)))
            yield tokens[-1]
