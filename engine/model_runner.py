"""Turns a scheduled step into flat tensors, runs the network once and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.backend import AttentionMetadata
from ..model.network import DeepForCausalLM
from ..model.sampling import SamplingBatch
from ..model.transfer import download, upload
from .decode_graphs import DecodeGraphs, DecodeResult, GraphMaker
from .grammar import MaskMaker, MaskOrder
from .messages import TokenDynamics
from .prompt_reader import read_prompts
from .request import AWAITED
from .sampler import SampledToken, Sampler
from .scheduler import ScheduledSequence
from .watcher import Watcher


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
        self.watcher = Watcher(model)
        self.masks = MaskMaker()
        self.graphs: DecodeGraphs | None = None
        self._most = max_num_seqs
        # The last step's draws, for the next one's input; then the ids that a step knows; then that of padding.
        self._recent = torch.zeros(2 * max_num_seqs + 1, dtype=torch.int64, device=model.device)
        self._recent[-1] = -1 if model.ops.capturable else 0

    def capture(self, maker: GraphMaker, max_model_len: int, sizes: Sequence[int] | None = None) -> DecodeGraphs:
        """Record decode steps, of batches of `sizes` or of all that are useful; steps that fit use them from now on."""
        self.graphs = DecodeGraphs(
            self.model, self.kv_cache, self._recent, most=self._most, max_model_len=max_model_len, maker=maker
        )
        self.graphs.capture(sizes)
        return self.graphs

    @torch.inference_mode()
    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """Begin a step in which no request `needs_tokens`; awaited tokens are taken from the last step's draws."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.samples]
        graphs = self._graphs_for(sequences)
        if graphs is not None:
            result = graphs.run(sequences)
            self._count(result)
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
        if self._graphs_for(sequences) is not None and not any(s.request.needs_tokens for s in sequences):
            return self.launch(sequences).read()
        states = [s.request.grammar for s in sequences if s.samples and s.request.grammar is not None]
        masks = self.masks.start(states) if states else None  # made while the network runs
        try:
            return self._execute(sequences, masks)
        except RuntimeError:
            if masks is not None:
                self.masks.finish(masks)  # it has borrowed the grammars' states
            raise

    def _execute(self, sequences: Sequence[ScheduledSequence], masks: MaskOrder | None) -> list[SampledToken]:
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

    def relieve(self) -> None:
        """Give memory back to the device that torch keeps for later."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _graphs_for(self, sequences: Sequence[ScheduledSequence]) -> DecodeGraphs | None:
        return self.graphs if self.graphs is not None and self.graphs.fits(sequences) else None

    def _compute(
        self, sequences: Sequence[ScheduledSequence], watched: Tensor | None = None
    ) -> tuple[Tensor, list[TokenDynamics]]:
        """Run the network: hidden states FP32 [T, H], and what was seen of the tokens `watched`."""
        graphs = self._graphs_for(sequences)
        if graphs is not None:
            result = graphs.run(sequences)
            self._count(result)
            return result.hidden, []
        input_ids, positions, metadata = self.prepare(sequences)
        self.watcher.begin(watched)
        hidden = self.model(input_ids, positions, metadata, self.kv_cache, observer=self.watcher)
        return hidden, self.watcher.end(input_ids)

    def _count(self, result: DecodeResult) -> None:
        if result.seen is not None:
            self.watcher.take(result.seen[0], result.seen[1:])

    def prepare(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The step's token ids [T], positions [T] and attention metadata."""
        starts = np.array([sequence.request.num_computed_tokens for sequence in sequences])
        query_lens = [sequence.num_tokens for sequence in sequences]
        counts = np.array(query_lens)
        tokens: list[int] = []
        awaited: list[tuple[int, int]] = []  # places in the step, and in the last one's draws
        blocks = [sequence.request.block_ids for sequence in sequences]
        tables = np.empty((len(sequences), max(map(len, blocks))), np.int32)
        for row, sequence in enumerate(sequences):
            request = sequence.request
            start = request.num_computed_tokens
            tokens += request.token_ids[start : start + sequence.num_tokens]
            if tokens[-1] == AWAITED:
                awaited.append((len(tokens) - 1, request.draw_row))
                tokens[-1] = 0
            tokens += sequence.draft
            tables[row, : len(blocks[row])] = blocks[row]
            # Padded with a page of its own, so that whatever another sequence may hold can't reach this one.
            tables[row, len(blocks[row]) :] = blocks[row][-1]
        owner = np.repeat(np.arange(len(sequences)), counts)  # [T], the sequence of each token
        positions = np.arange(len(tokens)) + (starts - (counts.cumsum() - counts))[owner]
        slots = tables[owner, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        device = self.model.device
        on_device = device.type != "cpu"  # where lengths are read too
        metadata = AttentionMetadata(
            query_lens=query_lens,
            seq_lens=(starts + counts).tolist(),
            num_decodes=query_lens.count(1),  # the scheduler puts them first
            slot_mapping=upload(torch.from_numpy(slots), device),
            block_tables=upload(torch.from_numpy(tables), device),
            seq_lens_device=upload(torch.from_numpy((starts + counts).astype(np.int32)), device) if on_device else None,
            query_starts=upload(torch.from_numpy(_starts(counts)), device) if on_device else None,
        )
        input_ids = upload(torch.tensor(tokens), device)
        if awaited:
            places, rows = upload(torch.tensor(awaited), device).unbind(1)
            input_ids.index_copy_(0, places, self._recent.index_select(0, rows))
        return input_ids, upload(torch.from_numpy(positions), device), metadata


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Where each sequence begins, and the end of the last: int32 [S + 1]."""
    starts: npt.NDArray[np.int32] = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    return starts
