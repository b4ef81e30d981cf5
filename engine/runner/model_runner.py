"""Turns a scheduled step into flat tensors, runs the network once and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...model.backend import AttentionMetadata
from ...model.network import DeepForCausalLM
from ...model.sampling import SamplingBatch
from ...model.transfer import download, upload
from ..grammar.state import MaskBatch, MaskMaker
from ..messages import TokenDynamics
from ..step.runner import SampledToken
from ..step.scheduler import ScheduledSequence
from .expert_stats import ExpertStats
from .flat_step import flatten
from .prompt_reader import read_prompts
from .sampler import Sampler
from .step_graphs import GraphMaker, StepGraphs, StepResult


class LaunchedStep:
    """A step that the device is computing or has computed.

    Args:
        tokens: int64, drawn there.
        rows: which of them are the sampling sequences', in order.
    """

    def __init__(self, tokens: Tensor, rows: Sequence[int]) -> None:
        self._wait = download(tokens)
        self._rows = rows

    def read(self) -> list[SampledToken]:
        """Wait for the drawn tokens."""
        tokens = self._wait().tolist()
        return [SampledToken(tokens[row], None) for row in self._rows]


class ModelRunner:
    """Owns the model and the paged KV tensor.

    Args:
        model: the network, with its weights.
        num_blocks: pages of the KV cache; one more is there for what is nobody's.
        block_size: tokens per page.
        max_num_seqs: most sequences in a step.
        kv_cache_dtype: of the pages; None is the model's.
    """

    def __init__(
        self,
        model: DeepForCausalLM,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_cache = model.new_kv_cache(num_blocks + 1, block_size, kv_cache_dtype)
        self.sampler = Sampler(model.ops)
        self.expert_stats = ExpertStats(model)
        self.masks = MaskMaker()
        self.graphs: StepGraphs | None = None
        self._most = max_num_seqs
        # The last step's draws, for the next one's input, and a zero that nobody draws.
        self._recent = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=model.device)

    def capture(
        self,
        maker: GraphMaker,
        max_model_len: int,
        sizes: Sequence[int] | None = None,
        token_counts: Sequence[int] = (),
    ) -> StepGraphs:
        """Record steps; those that fit use them from now on.

        Args:
            maker: records.
            max_model_len: longest sequence.
            sizes: batches of decode steps; None is all that are useful.
            token_counts: numbers of tokens of other steps, where the backend can record them.
        """
        self.graphs = StepGraphs(
            self.model, self.kv_cache, self._recent, most=self._most, max_model_len=max_model_len, maker=maker
        )
        self.graphs.capture(sizes, token_counts)
        return self.graphs

    @torch.inference_mode()
    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """Begin a step in which no request `needs_tokens`; awaited tokens are taken from the last step's draws."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.samples]
        result = self._replay(sequences)
        if result is not None:
            for row in rows:
                sequences[row].request.draw_row = row
            return LaunchedStep(result.tokens, rows)
        hidden, _ = self._compute(sequences)
        requests = [sequences[row].request for row in rows]
        if not requests:
            return LaunchedStep(self._recent[:0], ())
        ends = np.cumsum([sequence.num_tokens for sequence in sequences])
        last = upload(torch.from_numpy(ends[rows] - 1), hidden.device)
        params = [request.params for request in requests]
        batch = SamplingBatch.build(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[p.seed or 0 for p in params],
            position=[request.num_tokens for request in requests],
            device=hidden.device,
            full=self.model.ops.capturable,
        )
        tokens = self.model.ops.draw(self.model.logits(hidden[last]), batch)
        self._recent[: len(tokens)].copy_(tokens)
        for row, request in enumerate(requests):
            request.draw_row = row
        return LaunchedStep(tokens, range(len(tokens)))

    @torch.inference_mode()
    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute the step's tokens; return the sampled tokens of the sequences that sample, in order.

        Behind a sequence's own token come those that are drawn behind each token of its draft, were it right.
        """
        if self.graphs is not None and not any(s.request.needs_tokens or s.draft for s in sequences):
            return self.launch(sequences).read()
        states = [s.request.grammar for s in sequences if s.samples and s.request.grammar is not None]
        masks = self.masks.start(states) if states else None  # made while the network runs
        try:
            return self._execute(sequences, masks)
        except RuntimeError:
            if masks is not None:
                self.masks.finish(masks)  # it has borrowed the grammars' states
            raise

    def _execute(self, sequences: Sequence[ScheduledSequence], masks: MaskBatch | None) -> list[SampledToken]:
        ends = np.cumsum([sequence.num_tokens for sequence in sequences]).tolist()
        draws = [  # each position that is drawn for, with the guessed tokens before it
            (ends[i] - len(s.draft) - 1 + ahead, s.request, s.draft[:ahead])
            for i, s in enumerate(sequences)
            if s.samples
            for ahead in range(1 + len(s.draft))
        ]
        rows = upload(torch.tensor([row for row, *_ in draws], dtype=torch.int64), self.model.device)
        watched = [n for n, (_, request, _) in enumerate(draws) if request.params.return_dynamics]
        hidden, dynamics = self._compute(sequences, rows[watched] if watched else None)
        sampled: list[SampledToken] = []
        if draws:
            logits = self.model.logits(hidden[rows] if len(draws) < len(hidden) else hidden)
            allowed = self.masks.finish(masks)[:, : logits.shape[-1]].to(logits.device) if masks is not None else ()
            sampled = self.sampler(logits, [(request, ahead) for _, request, ahead in draws], allowed)
        # Last, so that a step that finds no memory can be done again.
        if any(sequence.request.reads_prompt for sequence in sequences):
            read_prompts(self.model, sequences, hidden)
        for n, seen in zip(watched, dynamics, strict=True):
            sampled[n] = replace(sampled[n], dynamics=seen)
        return sampled

    def release_cached_memory(self) -> None:
        """Give memory back to the device that torch keeps for later."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _replay(self, sequences: Sequence[ScheduledSequence]) -> StepResult | None:
        """Begin a step as a graph, where one fits."""
        result = self.graphs.run(sequences) if self.graphs is not None else None
        if result is not None and result.seen is not None:
            self.expert_stats.take(result.seen[0], result.seen[1:])
        return result

    def _compute(
        self, sequences: Sequence[ScheduledSequence], watched: Tensor | None = None
    ) -> tuple[Tensor, list[TokenDynamics]]:
        """Run the network: hidden states FP32 [T, H], and what was seen of the tokens `watched`."""
        result = self._replay(sequences)
        if result is not None:
            return result.hidden, []
        input_ids, positions, metadata = self.prepare(sequences)
        self.expert_stats.begin(watched)
        hidden = self.model(input_ids, positions, metadata, self.kv_cache, observer=self.expert_stats)
        return hidden, self.expert_stats.end(input_ids)

    def prepare(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The step's token ids [T], positions [T] and attention metadata."""
        flat = flatten(sequences, self.block_size)
        query_lens, device = flat.counts.tolist(), self.model.device
        on_device = device.type != "cpu"  # where lengths are read too
        metadata = AttentionMetadata(
            query_lens=query_lens,
            seq_lens=flat.lengths.tolist(),
            num_decodes=query_lens.count(1),  # the scheduler puts them first
            slot_mapping=upload(torch.from_numpy(flat.slots), device),
            block_tables=upload(torch.from_numpy(flat.tables), device),
            seq_lens_device=upload(torch.from_numpy(flat.lengths.astype(np.int32)), device) if on_device else None,
            query_starts=upload(torch.from_numpy(flat.starts), device) if on_device else None,
        )
        input_ids = upload(torch.from_numpy(flat.ids), device)
        if flat.awaited:
            places, rows = upload(torch.tensor(flat.awaited), device).unbind(1)
            input_ids.index_copy_(0, places, self._recent.index_select(0, rows))
        return input_ids, upload(torch.from_numpy(flat.positions), device), metadata
