"""Whole steps, from token ids to drawn tokens, recorded once and replayed.

A step is hundreds of short kernels, and launching them takes the host longer than the device needs to run them, unless
there are thousands of tokens. Recorded as a graph, a step is one launch. A graph computes a fixed number of tokens from
buffers that stay where they are; a step takes the next larger graph, and what is left over is padding that touches
nothing. There are two kinds: decode steps, in which each sequence has one token and the kernels are made for that, and
mixed ones, in which sequences have any number of tokens, as prompts do.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...model.backend import AttentionMetadata
from ...model.network import DeepForCausalLM, LayerState
from ...model.sampling import SamplingBatch
from ...model.transfer import upload
from ..step.request import PENDING_TOKEN, Request
from ..step.scheduler import ScheduledSequence
from .flat_step import flatten

logger = logging.getLogger(__name__)

CAPTURE_SECONDS = 60.0
CAPTURE_BYTES = 2 << 30
"""What capturing may take. The largest graphs come first, so that what is left out costs small steps some padding."""
MIXED_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens of mixed steps that are worth recording: with more, the device takes longer than the launches."""
ALIGNMENT = 16

Step = Callable[[], None]


class GraphMaker(Protocol):
    """Records work on a device, to do it again at once."""

    def capture(self, work: Step) -> Step:
        """Do `work`, which has no arguments and no result but in buffers; what is returned does it again."""
        ...

    def used_bytes(self) -> int:
        """Memory in use where it works."""
        ...


class CudaGraphs:
    """CUDA graphs that share one pool of memory, which is right as long as one replays after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, work: Step) -> Step:
        """See `GraphMaker`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()  # kernels are compiled and libraries make their workspaces outside of the recording
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, in ways that a recording need not know of.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        graph.replay()  # the first time takes longer, and nobody waits now
        replay: Step = graph.replay
        return replay

    def used_bytes(self) -> int:
        """See `GraphMaker`."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


class Reruns:
    """Stands in for graphs where there are none: what it records is done again, on the same buffers."""

    def capture(self, work: Step) -> Step:
        """See `GraphMaker`."""
        work()
        return work

    def used_bytes(self) -> int:
        """See `GraphMaker`."""
        return 0


def batch_sizes(most: int) -> list[int]:
    """How many rows the graphs have: few steps of padding at any batch of up to `most`."""
    sizes = {1, 2, 4, 8, *range(16, 33, 8), *range(48, 129, 16), *range(160, 513, 32), *range(576, most, 64), most}
    return sorted(size for size in sizes if size <= most)


def token_counts(most: int) -> list[int]:
    """How many tokens the mixed graphs have, where a step has `most` at most."""
    return [count for count in MIXED_TOKENS if count < most] + [most] * (most <= MIXED_TOKENS[-1])


_FIELDS: dict[str, type[np.generic]] = {
    "ids": np.int64, "sources": np.int64, "positions": np.int64, "slots": np.int64, "last": np.int64,
    "seeds": np.int64, "draws": np.int64, "top_k": np.int64, "temperature": np.float32, "top_p": np.float32,
    "min_p": np.float32, "lengths": np.int32, "starts": np.int32, "tables": np.int32,
}  # fmt: skip


class _Buffers:
    """What the host tells a graph: many small arrays in one piece of memory, so in one copy."""

    def __init__(self, tokens: int, sequences: int, width: int, device: torch.device) -> None:
        places: dict[str, tuple[tuple[int, ...], type[np.generic], slice]] = {}
        size = 0
        for name, dtype in _FIELDS.items():
            by_token = name in ("ids", "sources", "positions", "slots")
            shape: tuple[int, ...] = (tokens if by_token else sequences + (name == "starts"),)
            if name == "tables":
                shape = sequences, width
            count = math.prod(shape) * np.dtype(dtype).itemsize
            places[name] = shape, dtype, slice(size, size + count)
            size += -(-count // ALIGNMENT) * ALIGNMENT
        self._host = np.zeros(size, np.uint8)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype, place) in places.items():
            self.host[name] = self._host[place].view(dtype).reshape(shape)
            self.device[name] = self._device[place].view(getattr(torch, np.dtype(dtype).name)).view(shape)

    def send(self) -> None:
        """Let the device have what is in `host` now."""
        self._device.copy_(upload(torch.from_numpy(self._host), self._device.device), non_blocking=True)


@dataclass(slots=True)
class _Graph:
    """A step of so many tokens, and what it leaves behind: the next step's replay writes over it."""

    size: int
    mixed: bool
    buffers: _Buffers
    replay: Step
    hidden: Tensor
    tokens: Tensor
    seen: Tensor | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a replayed step of T tokens and S sequences gave, until the next one.

    Attributes:
        hidden: FP32 [T, H].
        tokens: int64 [S], drawn behind each sequence's last token by temperature, top-k, top-p, min-p and seed alone.
        seen: int64 [1 + layers, T], token ids and the experts that computed them; None without experts.
    """

    hidden: Tensor
    tokens: Tensor
    seen: Tensor | None


class StepGraphs:
    """The graphs of one model and KV cache.

    Args:
        model: what is recorded.
        kv_cache: its pages, of which the last one is nobody's: padding goes there where the backend writes it at all.
        recent: int64 [most + 1], as the model runner keeps it: last draws, and a zero.
        most: largest batch.
        max_model_len: longest sequence.
        maker: records steps.
    """

    def __init__(
        self,
        model: DeepForCausalLM,
        kv_cache: Tensor,
        recent: Tensor,
        *,
        most: int,
        max_model_len: int,
        maker: GraphMaker,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._recent = recent
        self._most = most
        self._block_size = kv_cache.shape[3]
        self._width = -(-max_model_len // self._block_size)
        self._maker = maker
        self._decodes: list[_Graph] = []  # the smallest first
        self._mixed: list[_Graph] = []
        self.seconds = 0.0
        self.bytes = 0

    @property
    def sizes(self) -> list[int]:
        """Sequences of each graph of decodes, the smallest first."""
        return [graph.size for graph in self._decodes]

    @property
    def mixed_sizes(self) -> list[int]:
        """Tokens of each graph of a mixed step, the smallest first."""
        return [graph.size for graph in self._mixed]

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int] | None = None, token_counts: Sequence[int] = ()) -> None:
        """Record a graph for each batch size and number of tokens, the largest first, while time and memory last.

        Mixed steps are left out where the backend reads lengths on the host.
        """
        started, before = time.monotonic(), self._maker.used_bytes()
        kinds = [(self._decodes, sorted(sizes or batch_sizes(self._most), reverse=True))]
        if self._model.ops.capturable:
            kinds.insert(0, (self._mixed, sorted(token_counts, reverse=True)))
        for graphs, wanted in kinds:
            for size in wanted:
                graphs.insert(0, self._record(size, mixed=graphs is self._mixed))
                self.seconds = time.monotonic() - started
                self.bytes = self._maker.used_bytes() - before
                if self.seconds > CAPTURE_SECONDS or self.bytes > CAPTURE_BYTES:
                    logger.warning("Capturing took too long or too much: steps smaller than %d are padded to it", size)
                    break

    def _graph_for(self, sequences: Sequence[ScheduledSequence]) -> _Graph | None:
        if any(s.request.params.return_dynamics or s.request.reads_prompt for s in sequences):
            return None  # somebody looks into it
        tokens = sum(s.num_tokens for s in sequences)
        decodes = tokens == len(sequences)
        graphs = self._decodes if decodes and self._decodes and tokens <= self._decodes[-1].size else self._mixed
        return next((graph for graph in graphs if graph.size >= tokens), None)

    def run(self, sequences: Sequence[ScheduledSequence]) -> StepResult | None:
        """Begin a step, or return None where no graph fits; awaited tokens are taken from the last step's draws."""
        graph = self._graph_for(sequences)
        if graph is None:
            return None
        if graph.mixed:
            count = self._fill_mixed(graph.buffers, sequences)
        else:
            count = len(sequences)
            self._fill(graph.buffers, sequences)
        graph.buffers.send()
        graph.replay()
        seen = None if graph.seen is None else graph.seen[:, :count].clone()  # nobody waits for these to be counted
        return StepResult(graph.hidden[:count], graph.tokens[: len(sequences)], seen)

    @torch.inference_mode()
    def replay_last(self) -> None:
        """Do the last step of the largest graph of decodes again, to see how long the device takes."""
        self._decodes[-1].replay()

    def _fill(self, buffers: _Buffers, sequences: Sequence[ScheduledSequence]) -> None:
        """Tell a graph of decodes its step; as `flatten`, but quicker for single tokens."""
        count, host = len(sequences), buffers.host
        self._pad(buffers, count, count)
        requests = [sequence.request for sequence in sequences]
        positions = np.array([request.num_computed_tokens for request in requests])
        ids = np.array([request.token_ids[at] for request, at in zip(requests, positions.tolist(), strict=True)])
        awaited = ids == PENDING_TOKEN
        host["ids"][:count] = np.where(awaited, 0, ids)
        host["sources"][:count] = np.where(awaited, [request.draw_row for request in requests], self._most)
        held = np.array([len(request.block_ids) for request in requests])
        pages = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, held.sum())
        tables = host["tables"][:count]
        tables[:] = pages[held.cumsum() - 1][:, None]  # padded with a page of its own
        tables[np.arange(tables.shape[1]) < held[:, None]] = pages
        host["positions"][:count] = positions
        blocks = tables[np.arange(count), positions // self._block_size].astype(np.int64)
        host["slots"][:count] = blocks * self._block_size + positions % self._block_size
        host["lengths"][:count] = positions + 1
        _fill_draws(host, requests, positions + 1)

    def _fill_mixed(self, buffers: _Buffers, sequences: Sequence[ScheduledSequence]) -> int:
        """Tell a mixed graph its step; return the number of tokens."""
        flat, host = flatten(sequences, self._block_size), buffers.host
        tokens, count = len(flat.ids), len(sequences)
        self._pad(buffers, tokens, count)
        host["ids"][:tokens] = flat.ids
        host["sources"][:tokens] = self._most
        if flat.awaited:
            places, rows = zip(*flat.awaited, strict=True)
            host["sources"][list(places)] = rows
        host["positions"][:tokens] = flat.positions
        host["slots"][:tokens] = flat.slots
        host["starts"][: count + 1] = flat.starts
        host["starts"][count + 1 :] = tokens
        host["last"][:count] = flat.starts[1:] - 1
        host["lengths"][:count] = flat.lengths
        tables = host["tables"][:count]
        tables[:, : flat.tables.shape[1]] = flat.tables
        tables[:, flat.tables.shape[1] :] = flat.tables[:, -1:]
        _fill_draws(host, [sequence.request for sequence in sequences], flat.lengths)
        return tokens

    def _pad(self, buffers: _Buffers, tokens: int, sequences: int) -> None:
        """Make tokens and sequences from these numbers on ones that nobody will miss."""
        last_page = self._kv_cache.shape[2] - 1
        own = self._model.ops.capturable  # which knows padding when it sees it
        nobody: dict[str, float] = {
            "ids": -1 if own else 0, "sources": self._most, "positions": 0,
            "slots": -1 if own else last_page * self._block_size,
        }  # fmt: skip
        for name, value in nobody.items():
            buffers.host[name][tokens:] = value
        nobody = {"last": 0, "lengths": 0, "tables": last_page, "seeds": 0, "draws": 0, "top_k": 0,
                  "temperature": 0.0, "top_p": 1.0, "min_p": 0.0}  # fmt: skip
        for name, value in nobody.items():
            buffers.host[name][sequences:] = value

    def _record(self, size: int, *, mixed: bool) -> _Graph:
        model, sequences = self._model, self._most if mixed else size
        buffers = _Buffers(size, sequences, self._width, self._recent.device)
        given = buffers.device
        metadata = AttentionMetadata(
            query_lens=[1] * sequences, seq_lens=[1] * sequences, num_decodes=0 if mixed else sequences,
            slot_mapping=given["slots"], block_tables=given["tables"], seq_lens_device=given["lengths"],
            query_starts=given["starts"],
        )  # fmt: skip
        batch = SamplingBatch(
            temperature=given["temperature"], top_k=given["top_k"], top_p=given["top_p"], min_p=given["min_p"],
            seed=given["seeds"], position=given["draws"], repetition_penalty=None, presence_penalty=None,
            frequency_penalty=None, penalty_rows=None, token_ids=[], bias=None, masks=[], banned=None, all_greedy=False,
        )  # fmt: skip
        graph = _Graph(size, mixed, buffers, lambda: None, self._recent, self._recent, None)

        def step() -> None:
            experts: list[Tensor] = []

            def watch(state: LayerState) -> None:
                if state.experts is not None:
                    experts.append(state.experts)

            ids = self._recent.index_select(0, given["sources"]).add_(given["ids"])  # one of the two is zero
            graph.hidden = model(ids, given["positions"], metadata, self._kv_cache, observer=watch)
            # The scores are not kept: those of all graphs share their memory.
            ends = graph.hidden.index_select(0, given["last"]) if mixed else graph.hidden
            graph.tokens = model.ops.draw(model.logits(ends), batch)
            self._recent[:sequences].copy_(graph.tokens)
            graph.seen = torch.stack([ids, *experts]) if experts else None

        self._pad(buffers, 0, 0)
        buffers.host["starts"][:] = 0 if mixed else np.arange(sequences + 1)
        buffers.send()
        graph.replay = self._maker.capture(step)
        return graph


def _fill_draws(host: dict[str, npt.NDArray[Any]], requests: list[Request], positions: npt.NDArray[np.int64]) -> None:
    """How each sequence's next token is drawn, which will stand at `positions`."""
    count, params = len(requests), [request.params for request in requests]
    host["draws"][:count] = positions
    host["seeds"][:count] = [p.seed or 0 for p in params]
    host["temperature"][:count] = [0.0 if p.top_k == 1 else p.temperature for p in params]
    host["top_k"][:count] = [max(p.top_k, 0) for p in params]
    host["top_p"][:count] = [p.top_p for p in params]
    host["min_p"][:count] = [p.min_p for p in params]
