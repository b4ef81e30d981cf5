"""Record whole steps, from token ids to drawn tokens, and replay them.

A step is hundreds of short kernels, and launching them takes the host longer than the device needs to run them, unless
there are thousands of tokens. Recorded as a graph, a step is one launch. A graph computes a fixed number of tokens from
buffers at fixed addresses; a step uses the next larger graph and fills the rest with padding, which changes nothing.
There are two kinds: decode steps, in which each sequence has one token and special kernels run, and mixed steps,
in which sequences have any number of tokens, as prompts do.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...model.backend import AttentionMetadata
from ...model.network import DeepNetwork, LayerState
from ...model.sampling import SamplingBatch, sampling_rows, upload
from ..messages import GraphInfo
from ..step.request import ScheduledSequence, flatten

logger = logging.getLogger(__name__)

CAPTURE_SECONDS = 60.0
CAPTURE_BYTES = 2 << 30
"""Limits on capturing. The largest graphs come first, so that a missing graph only costs small steps some padding."""
MIXED_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Sizes of mixed steps worth recording: with more tokens, the device takes longer than the launches."""
ALIGNMENT = 16

Step = Callable[[], None]
Arrays = dict[str, npt.NDArray[Any]]


class GraphMaker(Protocol):
    """Records work on a device."""

    def capture(self, work: Step) -> Step:
        """Do `work`, which reads and writes fixed buffers; return a function that does it again."""

    def used_bytes(self) -> int:
        """Memory in use on the device."""


class CudaGraphs:
    """CUDA graphs that share one pool of memory, which is safe since they replay one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, work: Step) -> Step:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and makes the libraries' workspaces outside of the recording
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; the recording may ignore that.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        graph.replay()  # the first replay takes longer, and no request waits yet
        replay: Step = graph.replay
        return replay

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def batch_sizes(limit: int) -> list[int]:
    """List the batch sizes of decode graphs: any batch of up to `limit` needs little padding."""
    sizes = {1, 2, 4, 8, *range(16, 33, 8), *range(48, 129, 16), *range(160, 513, 32), *range(576, limit, 64), limit}
    return sorted(size for size in sizes if size <= limit)


def token_counts(limit: int) -> list[int]:
    """List the token counts of mixed graphs, for steps of at most `limit` tokens."""
    return [count for count in MIXED_TOKENS if count < limit] + [limit] * (limit <= MIXED_TOKENS[-1])


TOKEN_FIELDS = ("ids", "sources", "positions", "slots")
"""Inputs of a graph with one entry per token; all others have one per sequence, and `starts` one more."""
FIELDS: dict[str, type[np.generic]] = {
    **dict.fromkeys((*TOKEN_FIELDS, "last", "top_k", "seed", "position"), np.int64),
    **dict.fromkeys(("temperature", "top_p", "min_p"), np.float32),
    **dict.fromkeys(("lengths", "starts", "tables"), np.int32),
}


class _Buffers:
    """The inputs of a graph: many small arrays in one piece of memory, so that one copy sends them to the device."""

    def __init__(self, tokens: int, sequences: int, width: int, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]]
        shapes = {name: (tokens if name in TOKEN_FIELDS else sequences,) for name in FIELDS}
        shapes |= {"starts": (sequences + 1,), "tables": (sequences, width)}
        places: dict[str, slice] = {}
        size = 0
        for name, shape in shapes.items():
            count = math.prod(shape) * np.dtype(FIELDS[name]).itemsize
            places[name] = slice(size, size + count)
            size += -(-count // ALIGNMENT) * ALIGNMENT
        self._host = np.zeros(size, np.uint8)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: Arrays = {}
        self.device: dict[str, Tensor] = {}
        for name, dtype in FIELDS.items():
            self.host[name] = self._host[places[name]].view(dtype).reshape(shapes[name])
            self.device[name] = self._device[places[name]].view(getattr(torch, dtype.__name__)).view(shapes[name])

    def send(self) -> None:
        """Copy `host` to the device, after the work already queued there."""
        self._device.copy_(upload(torch.from_numpy(self._host), self._device.device), non_blocking=True)


@dataclass(slots=True)
class Graph:
    """A recorded step of `size` tokens; the next replay overwrites its results."""

    size: int
    mixed: bool
    buffers: _Buffers
    replay: Step
    hidden: Tensor  # FP32 [T, H]
    tokens: Tensor  # int64 [S], drawn after each sequence's last token by its `DrawParams` without penalties
    seen: Tensor  # int64 [1 + layers, T], token ids and their experts; [1, T] if the ids determine the experts


class StepGraphs:
    """The graphs of one model and KV cache."""

    def __init__(
        self,
        model: DeepNetwork,
        kv_cache: Tensor,  # the last block absorbs padding writes, where the backend has any
        draws: Tensor,  # int64 [max_num_seqs + 1], the last step's draws and a zero
        maker: GraphMaker,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._draws = draws
        self._maker = maker
        self._most = len(draws) - 1
        self._block_size = kv_cache.shape[3]
        self._width = -(-max_model_len // self._block_size)
        skipped, last_block = model.ops.capturable, kv_cache.shape[2] - 1  # the kernels skip negative ids and slots
        self._padding = {
            "ids": -1 if skipped else 0, "slots": -1 if skipped else last_block * self._block_size, "positions": 0,
            "sources": self._most, "last": 0, "lengths": 0, "tables": last_block, "seed": 0, "position": 0, "top_k": 0,
            "temperature": 0.0, "top_p": 1.0, "min_p": 0.0,
        }  # fmt: skip
        self.decodes: list[Graph] = []  # the smallest first
        self.mixed: list[Graph] = []

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int] | None = None, token_counts: Sequence[int] = ()) -> GraphInfo:
        """Record graphs, the largest first, until the limits on time or memory are reached.

        The sizes of decode graphs are those of `batch_sizes` by default. A backend that reads lengths on the host has
        no mixed graphs.
        """
        started, before = time.monotonic(), self._maker.used_bytes()
        kinds = [(self.decodes, sorted(sizes or batch_sizes(self._most), reverse=True))]
        if self._model.ops.capturable:
            kinds.insert(0, (self.mixed, sorted(token_counts, reverse=True)))
        for graphs, wanted in kinds:
            for size in wanted:
                graphs.insert(0, self._record(size, mixed=graphs is self.mixed))
                took, used = time.monotonic() - started, self._maker.used_bytes() - before
                if took > CAPTURE_SECONDS or used > CAPTURE_BYTES:
                    logger.warning("Graphs took too much time or memory: steps smaller than %d are padded to it", size)
                    break
        decodes, mixed = (tuple(graph.size for graph in graphs) for graphs in (self.decodes, self.mixed))
        took, used = time.monotonic() - started, self._maker.used_bytes() - before
        self.info = GraphInfo(sizes=decodes, mixed_sizes=mixed, seconds=took, bytes=used)
        return self.info

    def run(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Begin a step, whose pending tokens are read from the last step's draws.

        Returns hidden states FP32 [T, H] and drawn tokens int64 [S], until the next step; and the tokens' ids and
        experts, int64 [1 + layers, T] or [1, T]. None if no graph fits.
        """
        graph = self._graph_for(sequences)
        if graph is None:
            return None
        num_tokens = self._fill(graph, sequences)
        graph.buffers.send()
        graph.replay()
        seen = graph.seen[:, :num_tokens].clone()  # counted later, after the next replay
        return graph.hidden[:num_tokens], graph.tokens[: len(sequences)], seen

    def _graph_for(self, sequences: Sequence[ScheduledSequence]) -> Graph | None:
        if any(s.request.params.return_dynamics or s.request.reads_prompt for s in sequences):
            return None  # the step is observed
        tokens = sum(s.num_tokens for s in sequences)
        decodes = tokens == len(sequences)
        graphs = self.decodes if decodes and self.decodes and tokens <= self.decodes[-1].size else self.mixed
        return next((graph for graph in graphs if graph.size >= tokens), None)

    def _fill(self, graph: Graph, sequences: Sequence[ScheduledSequence]) -> int:
        """Write a step into a graph's buffers; return its number of tokens."""
        flat, host = flatten(sequences, self._block_size), graph.buffers.host
        tokens, (count, width) = len(flat.ids), flat.tables.shape
        rows = sampling_rows([sequence.request.params for sequence in sequences], flat.lengths.tolist())
        values = {"ids": flat.ids, "positions": flat.positions, "slots": flat.slots, "lengths": flat.lengths, **rows}
        self._write(host, values)
        host["sources"][flat.pending[0]] = flat.pending[1]
        host["tables"][:count, :width] = flat.tables
        host["tables"][:count, width:] = flat.tables[:, -1:]
        if graph.mixed:
            host["starts"][: count + 1] = flat.starts
            host["starts"][count + 1 :] = tokens
            host["last"][:count] = host["starts"][1 : count + 1] - 1
        return tokens

    def _write(self, host: Arrays, values: Mapping[str, Any]) -> None:
        """Write the first entries of each input; the others become padding."""
        for name, padding in self._padding.items():
            given = values.get(name, ())
            if len(given):
                host[name][: len(given)] = given
            host[name][len(given) :] = padding

    def _record(self, size: int, *, mixed: bool) -> Graph:
        model, sequences = self._model, self._most if mixed else size
        buffers = _Buffers(size, sequences, self._width, self._draws.device)
        given = buffers.device
        metadata = AttentionMetadata(
            query_lens=[1] * sequences, seq_lens=[1] * sequences, num_decodes=0 if mixed else sequences,
            slot_mapping=given["slots"], block_tables=given["tables"], seq_lens_device=given["lengths"],
            query_starts=given["starts"],
        )  # fmt: skip
        batch = SamplingBatch(
            temperature=given["temperature"], top_k=given["top_k"], top_p=given["top_p"], min_p=given["min_p"],
            seed=given["seed"], position=given["position"],
        )  # fmt: skip
        graph = Graph(size, mixed, buffers, lambda: None, self._draws, self._draws, self._draws)

        def step() -> None:
            experts: list[Tensor] = []

            def watch(state: LayerState) -> None:
                if state.experts is not None:
                    experts.append(state.experts)

            ids = self._draws.index_select(0, given["sources"]).add_(given["ids"])  # one of the two is zero
            graph.hidden = model(ids, given["positions"], metadata, self._kv_cache, observer=watch)
            # The scores are not kept, so that all graphs share their memory.
            ends = graph.hidden.index_select(0, given["last"]) if mixed else graph.hidden
            graph.tokens = model.ops.draw(model.logits(ends), batch)
            self._draws[:sequences].copy_(graph.tokens)
            graph.seen = torch.stack([ids, *experts])

        self._write(buffers.host, {})
        buffers.host["starts"][:] = 0 if mixed else np.arange(sequences + 1)
        buffers.send()
        graph.replay = self._maker.capture(step)
        return graph
