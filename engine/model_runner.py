"""Turns a scheduled step into flat tensors, runs the network once and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..model.backend import AttentionMetadata
from ..model.network import DeepForCausalLM
from .grammar import MaskMaker
from .prompt_reader import read_prompts
from .sampler import SampledToken, Sampler
from .scheduler import ScheduledSequence
from .watcher import Watcher


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
        self.watcher = Watcher(model)
        self.masks = MaskMaker()

    @torch.inference_mode()
    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return the sampled tokens of the sequences that sample, in order.

        Behind a sequence's own token come those that are drawn behind each token of its draft, were it right.
        """
        states = [s.request.grammar for s in sequences if s.samples and s.request.grammar is not None]
        masks = self.masks.start(states) if states else None  # made while the network runs
        input_ids, positions, metadata = self.prepare(sequences)
        ends = np.cumsum(metadata.query_lens).tolist()
        draws = [  # each position that is drawn for, with the guessed tokens before it
            (ends[i] - len(s.draft) - 1 + ahead, s.request, s.draft[:ahead])
            for i, s in enumerate(sequences)
            if s.samples
            for ahead in range(1 + len(s.draft))
        ]
        rows = torch.tensor([row for row, *_ in draws], device=input_ids.device)
        watched = [n for n, (_, request, _) in enumerate(draws) if request.params.return_dynamics]
        self.watcher.begin(rows[watched] if watched else None)
        hidden = self.model(input_ids, positions, metadata, self.kv_cache, observer=self.watcher)
        dynamics = self.watcher.end(input_ids)
        if any(sequence.request.reads_prompt for sequence in sequences):
            read_prompts(self.model, sequences, hidden)
        if not draws:
            return []
        logits = self.model.logits(hidden[rows] if len(draws) < len(hidden) else hidden)
        allowed = self.masks.finish(masks)[:, : logits.shape[-1]].to(logits.device) if masks is not None else ()
        sampled = self.sampler(logits, [(request, ahead) for _, request, ahead in draws], allowed)
        for n, seen in zip(watched, dynamics, strict=True):
            sampled[n] = replace(sampled[n], dynamics=seen)
        return sampled

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
            tokens += sequence.draft
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
