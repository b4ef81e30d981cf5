"""Turns a scheduled step into flat tensors, runs the network once and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.backend import AttentionMetadata
from ..model.network import DeepForCausalLM
from .sampler import SampledToken, Sampler
from .scheduler import ScheduledSequence


class ModelRunner:
    """Owns the model and the paged KV tensor.

    Args:
        model: the network, with its weights.
        num_blocks: pages of the KV cache.
        block_size: tokens per page.
    """

    def __init__(self, model: DeepForCausalLM, *, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.kv_cache = model.new_kv_cache(num_blocks, block_size)
        self.sampler = Sampler()

    @torch.inference_mode()
    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return a sampled token for each sequence that samples, in order."""
        input_ids, positions, metadata = self.prepare(sequences)
        hidden = self.model(input_ids, positions, metadata, self.kv_cache)
        ends = torch.tensor(metadata.query_lens).cumsum(0) - 1
        sampling = [i for i, sequence in enumerate(sequences) if sequence.samples]
        if not sampling:
            return []
        logits = self.model.logits(hidden[ends[sampling].to(hidden.device)])
        return self.sampler(logits, [sequences[i].request for i in sampling])

    def prepare(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The step's token ids [T], positions [T] and attention metadata."""
        query_lens = [sequence.num_tokens for sequence in sequences]
        starts = [sequence.request.num_computed_tokens for sequence in sequences]
        tokens: list[int] = []
        for sequence, start in zip(sequences, starts, strict=True):
            tokens += sequence.request.token_ids[start : start + sequence.num_tokens]
        widest = max(len(sequence.request.block_ids) for sequence in sequences)
        tables = torch.tensor(
            # Padded with a page of its own, so that whatever another sequence may hold can't reach this one.
            [blocks + blocks[-1:] * (widest - len(blocks)) for blocks in (s.request.block_ids for s in sequences)]
        )
        lens = torch.tensor(query_lens)
        owner = torch.arange(len(sequences)).repeat_interleave(lens)  # [T], the sequence of each token
        first = lens.cumsum(0) - lens  # [S], where each sequence begins in the flat tokens
        positions = torch.arange(len(tokens)) - first[owner] + torch.tensor(starts)[owner]
        slots = tables[owner, positions // self.block_size] * self.block_size + positions % self.block_size
        device = self.model.device
        metadata = AttentionMetadata(
            query_lens=query_lens,
            seq_lens=[start + count for start, count in zip(starts, query_lens, strict=True)],
            num_decodes=query_lens.count(1),  # the scheduler puts them first
            slot_mapping=slots.to(device),
            block_tables=tables.to(device),
        )
        return torch.tensor(tokens).to(device), positions.to(device), metadata
