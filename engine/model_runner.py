"""Turns a scheduled step into flat tensors, runs the network once and samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
        sampling = [i for i, sequence in enumerate(sequences) if sequence.samples]
        if not sampling:
            return []
        if len(hidden) > len(sequences) or len(sampling) < len(sequences):
            last = np.cumsum(metadata.query_lens)[sampling] - 1  # of each sequence that samples
            hidden = hidden[torch.from_numpy(last).to(hidden.device)]
        return self.sampler(self.model.logits(hidden), [sequences[i].request for i in sampling])

    def prepare(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The step's token ids [T], positions [T] and attention metadata."""
        starts = np.array([sequence.request.num_computed_tokens for sequence in sequences])
        query_lens = [sequence.num_tokens for sequence in sequences]
        counts = np.array(query_lens)
        tokens: list[int] = []
        blocks = [sequence.request.block_ids for sequence in sequences]
        tables = np.empty((len(sequences), max(map(len, blocks))), np.int32)
        for row, sequence in enumerate(sequences):
            start = sequence.request.num_computed_tokens
            tokens += sequence.request.token_ids[start : start + sequence.num_tokens]
            tables[row, : len(blocks[row])] = blocks[row]
            # Padded with a page of its own, so that whatever another sequence may hold can't reach this one.
            tables[row, len(blocks[row]) :] = blocks[row][-1]
        owner = np.repeat(np.arange(len(sequences)), counts)  # [T], the sequence of each token
        positions = np.arange(len(tokens)) + (starts - (counts.cumsum() - counts))[owner]
        slots = tables[owner, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        device = self.model.device
        metadata = AttentionMetadata(
            query_lens=query_lens,
            seq_lens=(starts + counts).tolist(),
            num_decodes=query_lens.count(1),  # the scheduler puts them first
            slot_mapping=torch.from_numpy(slots).to(device),
            block_tables=torch.from_numpy(tables).to(device),
        )
        return torch.tensor(tokens, device=device), torch.from_numpy(positions).to(device), metadata
