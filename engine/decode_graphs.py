"""Whole decode steps, from token ids to drawn tokens, recorded once and replayed.

A decode step of a small batch is hundreds of short kernels, and launching them takes the host longer than the device
needs to run them. Recorded as a graph, a step is one launch. A graph computes a fixed number of rows from buffers that
stay where they are; a step takes the next larger graph, and the rows left over are padding that touches nothing.
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

from ..model.backend import AttentionMetadata
from ..model.network import DeepForCausalLM, LayerState
from ..model.sampling import SamplingBatch
from ..model.transfer import upload
from .request import AWAITED
from .scheduler import ScheduledSequence

logger = logging.getLogger(__name__)

CAPTURE_SECONDS = 60.0
CAPTURE_BYTES = 1 << 30
"""What capturing may take. The largest graph comes first, so that what is left out costs small batches some padding."""
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


_FIELDS: tuple[tuple[str, type[np.generic]], ...] = (
    ("sources", np.int64), ("positions", np.int64), ("slots", np.int64), ("seeds", np.int64), ("draws", np.int64),
    ("top_k", np.int64), ("temperature", np.float32), ("top_p", np.float32), ("min_p", np.float32),
    ("lengths", np.int32), ("tables", np.int32),
)  # fmt: skip


class _Buffers:
    """What the host tells a graph of `rows` rows: many small arrays in one piece of memory, so in one copy."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        places, size = {}, 0
        for name, dtype in _FIELDS:
            shape = (rows, width) if name == "tables" else (rows,)
            count = math.prod(shape) * np.dtype(dtype).itemsize
            places[name] = shape, dtype, slice(size, size + count)
            size += -(-count // ALIGNMENT) * ALIGNMENT
        self._host = np.zeros(size, np.uint8)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
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
    """A step of `rows` rows, and what it leaves behind: the next step's replay writes over it."""

    rows: int
    buffers: _Buffers
    replay: Step
    hidden: Tensor
    tokens: Tensor
    seen: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What a replayed step gave, until the next one.

    Attributes:
        hidden: FP32 [S, H].
        tokens: int64 [S], drawn by temperature, top-k, top-p, min-p and seed alone.
        seen: int64 [1 + layers, S], token ids and the experts that computed them; None without experts.
    """

    hidden: Tensor
    tokens: Tensor
    seen: Tensor | None


class DecodeGraphs:
    """The graphs of one model and KV cache.

    Args:
        model: what is recorded.
        kv_cache: its pages, of which the last one is nobody's: padding goes there where the backend writes it at all.
        recent: int64 [2 * most + 1], as the model runner keeps it: last draws, then a step's known ids, then padding's.
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
        self._known = recent[most : 2 * most]
        self._most = most
        self._block_size = kv_cache.shape[3]
        self._width = -(-max_model_len // self._block_size)
        self._maker = maker
        self._graphs: list[_Graph] = []  # the smallest first
        self.seconds = 0.0
        self.bytes = 0

    @property
    def sizes(self) -> list[int]:
        """Rows of each graph, the smallest first."""
        return [graph.rows for graph in self._graphs]

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int] | None = None) -> None:
        """Record a graph for each batch size, the largest first, while time and memory last."""
        started, before = time.monotonic(), self._maker.used_bytes()
        for rows in sorted(sizes or batch_sizes(self._most), reverse=True):
            self._graphs.insert(0, self._record(rows))
            self.seconds = time.monotonic() - started
            self.bytes = self._maker.used_bytes() - before
            if self.seconds > CAPTURE_SECONDS or self.bytes > CAPTURE_BYTES:
                logger.warning("Capturing took too long or too much: batches below %d are padded to it", rows)
                break

    def fits(self, sequences: Sequence[ScheduledSequence]) -> bool:
        """Whether a step is one of single tokens that a graph has room for and that nobody looks into."""
        return (
            bool(self._graphs)
            and len(sequences) <= self._graphs[-1].rows
            and all(s.num_tokens == 1 for s in sequences)
            and not any(s.request.params.return_dynamics or s.request.reads_prompt for s in sequences)
        )

    def run(self, sequences: Sequence[ScheduledSequence]) -> DecodeResult:
        """Begin a step for which `fits` said yes; awaited tokens are taken from the last step's draws."""
        count = len(sequences)
        graph = next(graph for graph in self._graphs if graph.rows >= count)
        self._fill(graph.buffers, sequences)
        graph.buffers.send()
        graph.replay()
        seen = None if graph.seen is None else graph.seen[:, :count].clone()  # nobody waits for these to be counted
        return DecodeResult(graph.hidden[:count], graph.tokens[:count], seen)

    @torch.inference_mode()
    def replay_last(self) -> None:
        """Do the largest graph's last step again, to see how long the device takes."""
        self._graphs[-1].replay()

    def _fill(self, buffers: _Buffers, sequences: Sequence[ScheduledSequence]) -> None:
        count, host = len(sequences), buffers.host
        self._pad(buffers, count)
        requests = [sequence.request for sequence in sequences]
        params = [request.params for request in requests]
        positions = np.array([request.num_computed_tokens for request in requests])
        ids = [request.token_ids[at] for request, at in zip(requests, positions.tolist(), strict=True)]
        known = np.array(ids)
        awaited = known == AWAITED
        if not awaited.all():
            self._known[:count].copy_(upload(torch.from_numpy(known), self._known.device), non_blocking=True)
        rows = np.array([request.draw_row for request in requests])
        host["sources"][:count] = np.where(awaited, rows, self._most + np.arange(count))
        held = np.array([len(request.block_ids) for request in requests])
        pages = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, held.sum())
        tables = host["tables"][:count]
        tables[:] = pages[held.cumsum() - 1][:, None]  # padded with a page of its own
        tables[np.arange(tables.shape[1]) < held[:, None]] = pages
        host["positions"][:count] = positions
        blocks = tables[np.arange(count), positions // self._block_size].astype(np.int64)
        host["slots"][:count] = blocks * self._block_size + positions % self._block_size
        host["lengths"][:count] = positions + 1
        host["draws"][:count] = positions + 1
        host["seeds"][:count] = [p.seed or 0 for p in params]
        host["temperature"][:count] = [0.0 if p.top_k == 1 else p.temperature for p in params]
        host["top_k"][:count] = [max(p.top_k, 0) for p in params]
        host["top_p"][:count] = [p.top_p for p in params]
        host["min_p"][:count] = [p.min_p for p in params]

    def _pad(self, buffers: _Buffers, count: int) -> None:
        """Make rows from `count` on ones that nobody will miss."""
        host = buffers.host
        last_page = self._kv_cache.shape[2] - 1
        for name, value in (
            ("sources", 2 * self._most), ("positions", 0), ("lengths", 0), ("tables", last_page), ("seeds", 0),
            ("slots", -1 if self._model.ops.capturable else last_page * self._block_size), ("draws", 0),
            ("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0),
        ):  # fmt: skip
            host[name][count:] = value

    def _record(self, rows: int) -> _Graph:
        model, buffers = self._model, _Buffers(rows, self._width, self._recent.device)
        given = buffers.device
        metadata = AttentionMetadata(
            query_lens=[1] * rows, seq_lens=[1] * rows, num_decodes=rows, slot_mapping=given["slots"],
            block_tables=given["tables"], seq_lens_device=given["lengths"], query_starts=buffers.starts,
        )  # fmt: skip
        batch = SamplingBatch(
            temperature=given["temperature"], top_k=given["top_k"], top_p=given["top_p"], min_p=given["min_p"],
            seed=given["seeds"], position=given["draws"], repetition_penalty=None, presence_penalty=None,
            frequency_penalty=None, penalty_rows=None, token_ids=[], bias=None, masks=[], banned=None, all_greedy=False,
        )  # fmt: skip
        graph = _Graph(rows, buffers, lambda: None, self._recent, self._recent, None)

        def step() -> None:
            experts: list[Tensor] = []

            def watch(state: LayerState) -> None:
                if state.experts is not None:
                    experts.append(state.experts)

            ids = self._recent.index_select(0, given["sources"])
            graph.hidden = model(ids, given["positions"], metadata, self._kv_cache, observer=watch)
            # The scores are not kept: those of all graphs share their memory.
            graph.tokens = model.ops.draw(model.logits(graph.hidden), batch)
            self._recent[:rows].copy_(graph.tokens)
            graph.seen = torch.stack([ids, *experts]) if experts else None

        self._pad(buffers, 0)
        buffers.send()
        graph.replay = self._maker.capture(step)
        return graph
