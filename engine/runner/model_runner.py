"""Turn scheduled steps into flat tensors, run the network and sample; count the work of its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...model.backend import AttentionMetadata
from ...model.fp8 import FP8
from ...model.network import DeepNetwork, LayerState
from ...model.parameters import route_weights
from ...model.sampling import SamplingBatch, download, upload
from ..config import ResolvedConfig
from ..grammar.state import MaskMaker
from ..messages import GraphInfo, TokenDynamics
from ..step.request import SampledToken, ScheduledSequence, flatten
from ..step.runner import LaunchedStep
from .prompt_reader import read_prompts
from .sampler import sample_tokens
from .step_graphs import GraphMaker, StepGraphs

MAX_STEPS = 256  # expert counts are folded after this many steps
MAX_TOKENS = 65536  # or this many tokens


class ModelRunner:
    """Owns the model and the paged KV tensor."""

    def __init__(self, model: DeepNetwork, config: ResolvedConfig) -> None:
        self.model = model
        self.config = config
        # One block more than the scheduler knows, which absorbs padding writes.
        dtype = FP8 if config.kv_cache_dtype == "fp8" else model.dtype
        self.kv_cache = model.new_kv_cache(config.num_kv_blocks + 1, config.block_size, dtype)
        self.observer = LayerObserver(model)
        self.masks = MaskMaker()
        self.graphs: StepGraphs | None = None
        # The last step's draws, which the next step reads in place of pending tokens, and a zero for the other tokens.
        self._draws = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=model.device)

    def capture(
        self, maker: GraphMaker, sizes: Sequence[int] | None = None, token_counts: Sequence[int] = ()
    ) -> GraphInfo:
        """Record graphs, which the steps that fit use from now on; see `StepGraphs`."""
        self.graphs = StepGraphs(self.model, self.kv_cache, self._draws, maker, self.config.max_model_len)
        return self.graphs.capture(sizes, token_counts)

    @torch.inference_mode()
    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        """Begin a step in which no request `needs_tokens`; pending tokens are read from the last step's draws."""
        rows: Sequence[int] = [row for row, sequence in enumerate(sequences) if sequence.samples]
        requests = [sequences[row].request for row in rows]
        hidden, tokens, _ = self._forward(sequences)
        if tokens is None:
            if not requests:
                return list  # nothing is drawn
            if len(requests) < len(hidden):
                ends = np.cumsum([sequence.num_tokens for sequence in sequences])
                hidden = hidden[upload(torch.from_numpy(ends[rows] - 1), hidden.device)]
            params, positions = [r.params for r in requests], [r.num_tokens for r in requests]
            batch = SamplingBatch.build(params, positions, hidden.device, full=self.model.ops.capturable)
            tokens = self.model.ops.draw(self.model.logits(hidden), batch)
            self._draws[: len(tokens)].copy_(tokens)
            rows = range(len(tokens))
        for row, request in zip(rows, requests, strict=True):
            request.draw_row = row
        wait = download(tokens)

        def read() -> list[SampledToken]:
            drawn = wait().tolist()
            return [SampledToken(drawn[row], None) for row in rows]

        return read

    @torch.inference_mode()
    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """Compute a step; return the sampled tokens of the sequences that sample, in order.

        Each sequence gets its next token, then one after each token of its draft, drawn as if the draft were right.
        """
        if not any(s.request.needs_tokens or s.draft for s in sequences):
            return self.launch(sequences)()
        ends = np.cumsum([sequence.num_tokens for sequence in sequences]).tolist()
        draws = [  # each position to draw a token for, with the guessed tokens before it
            (ends[i] - len(s.draft) - 1 + ahead, s.request, s.draft[:ahead])
            for i, s in enumerate(sequences)
            if s.samples
            for ahead in range(1 + len(s.draft))
        ]
        watched = [n for n, (_, request, _) in enumerate(draws) if request.params.return_dynamics]
        states = [request.grammar for _, request, _ in draws if request.grammar is not None]
        masks = self.masks.start(states) if states else None  # made while the network runs
        sampled: list[SampledToken] = []
        try:
            rows = upload(torch.tensor([row for row, *_ in draws], dtype=torch.int64), self.model.device)
            hidden, _, dynamics = self._forward(sequences, rows[watched] if watched else None)
            if draws:
                logits = self.model.logits(hidden[rows] if len(draws) < len(hidden) else hidden)
                allowed = self.masks.finish(masks)[:, : logits.shape[-1]].to(logits.device) if masks else ()
                wanted = [(request, ahead) for _, request, ahead in draws]
                sampled = sample_tokens(self.model.ops, logits, wanted, allowed)
        except RuntimeError:
            if masks is not None:
                self.masks.finish(masks)  # until then, the masks use the grammars' states
            raise
        # Last, so that a step that runs out of memory can be recomputed.
        if any(sequence.request.reads_prompt for sequence in sequences):
            read_prompts(self.model, sequences, hidden)
        for n, seen in zip(watched, dynamics, strict=True):
            sampled[n] = replace(sampled[n], dynamics=seen)
        return sampled

    def release_cached_memory(self) -> None:
        """Return the memory that torch keeps for reuse to the device."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(
        self, sequences: Sequence[ScheduledSequence], watched: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, list[TokenDynamics]]:
        """Run the network, as a graph if one fits.

        Returns hidden states FP32 [T, H], the tokens that a graph drew after each sequence int64 [S], and the
        dynamics of the tokens `watched`.
        """
        if self.graphs is not None and (result := self.graphs.run(sequences)) is not None:
            hidden, tokens, seen = result
            self.observer.add(seen[0], seen[1:])
            return hidden, tokens, []
        input_ids, positions, metadata = self.prepare(sequences)
        self.observer.begin(watched)
        hidden = self.model(input_ids, positions, metadata, self.kv_cache, observer=self.observer)
        return hidden, None, self.observer.end(input_ids)

    def prepare(self, sequences: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """Make the step's token ids [T], positions [T] and attention metadata."""
        flat, device = flatten(sequences, self.config.block_size), self.model.device
        query_lens = flat.counts.tolist()
        on_device = device.type != "cpu"  # where kernels read the lengths too
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
        if len(flat.pending[0]):
            indices, rows = (upload(torch.from_numpy(each), device) for each in flat.pending)
            input_ids.index_copy_(0, indices, self._draws.index_select(0, rows))
        return input_ids, upload(torch.from_numpy(flat.positions), device), metadata


class LayerObserver:
    """Observes a step between `begin` and `end`: counts each expert's tokens, records selected tokens' dynamics.

    It counts on the network's device, and waits for the counts only when they are read.
    """

    def __init__(self, model: DeepNetwork) -> None:
        layers = model.layers
        tables = [layer.token_to_expert for layer in layers if layer.token_to_expert is not None]
        routes = [layer.routes for layer in layers if layer.routes is not None]
        self._shape = len(tables or routes), model.config.experts if tables or routes else 0
        # [layers, vocab], the expert of each id. Mu can choose another only if there is a router.
        routed = any(layer.router is not None for layer in layers)
        self._own = torch.stack(tables).to(torch.uint8) if tables and routed else None
        # [layers, K, vocab], if ids alone choose several experts: then the network does not report them.
        self._routes = torch.stack(routes).to(torch.int16) if routes else None
        self._weights = [route_weights(model.config, max(1, model.architecture.routes))] * self._shape[0]
        self._offsets = torch.arange(len(layers), device=model.device)[:, None] * self._shape[1]
        self._counts = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.int64, device=model.device)
        self._reroutes = torch.zeros(len(layers), dtype=torch.int64, device=model.device)
        self._steps: list[tuple[Tensor, Tensor | list[Tensor]]] = []
        self._num_tokens = 0
        self._experts: list[Tensor] = []
        self._norms: list[tuple[Tensor | None, Tensor | None]] = []
        self._rows: Tensor | None = None
        self.on_layer: Callable[[], None] | None = None

    def reset(self) -> None:
        """Count from zero."""
        self._steps.clear()
        self._num_tokens = 0
        self._counts.zero_()
        self._reroutes.zero_()

    def begin(self, rows: Tensor | None) -> None:
        """Expect the layers of one step; `rows` int64 [R] are the tokens to report."""
        self._experts, self._norms, self._rows = [], [], rows

    def __call__(self, state: LayerState) -> None:
        """Observe one layer."""
        if self.on_layer is not None:
            self.on_layer()
        if state.experts is not None:
            self._experts.append(state.experts)
        if self._rows is not None:
            self._norms.append((_norms(state.mu, self._rows), _norms(state.velocity, self._rows)))

    def end(self, input_ids: Tensor) -> list[TokenDynamics]:
        """Count the step's tokens, int64 [T]; report those of its `rows`."""
        self.add(input_ids, self._experts)
        if self._rows is None:
            return []
        ids = input_ids[self._rows]
        if self._routes is not None:
            used = self._routes[:, :, ids].long()  # [layers, K, R]
        elif self._experts:
            used = torch.stack([experts[self._rows] for experts in self._experts])[:, None]
        else:
            used = ids.new_zeros((0, 1, len(ids)))
        experts = used[:, 0]
        own = experts if self._own is None else self._own[:, ids]
        rerouted = (experts != own).T.tolist()
        mu, velocity = (_columns([pair[side] for pair in self._norms], len(ids)) for side in (0, 1))
        return [
            TokenDynamics(
                input_token_id=token_id,
                experts=[first for first, *_ in routed],
                rerouted=rerouted[n],
                mu_norm=mu[n],
                velocity_norm=velocity[n],
                routed_experts=routed,
                expert_weights=self._weights,
            )
            for n, (token_id, routed) in enumerate(zip(ids.tolist(), used.permute(2, 0, 1).tolist(), strict=True))
        ]

    def add(self, ids: Tensor, experts: Tensor | list[Tensor]) -> None:
        """Add a step's tokens, int64 [T], and their experts, int64 [layers, T] or a [T] per layer, to be counted.

        Without layers, the tokens' ids determine their experts.
        """
        if not self._shape[0]:
            return
        self._steps.append((ids, experts))
        self._num_tokens += len(ids)
        if len(self._steps) == MAX_STEPS or self._num_tokens >= MAX_TOKENS:
            self._fold()

    def count(self) -> tuple[list[list[int]], list[int]]:
        """Return how many tokens each layer's experts computed, and how many were rerouted; empty without experts."""
        self._fold()
        tokens: list[list[int]] = self._counts.view(self._shape).tolist()
        return tokens, self._reroutes.tolist() if tokens else []

    @torch.inference_mode()
    def _fold(self) -> None:
        """Count the experts of the steps so far; many steps at once cost hardly more than one."""
        if not self._steps:
            return
        ids = torch.cat([ids for ids, _ in self._steps])
        if self._routes is not None:
            experts = self._routes[:, :, ids].long().flatten(1)  # [layers, K * T]
        else:
            layers = zip(*(experts for _, experts in self._steps), strict=True)
            experts = torch.stack([torch.cat(layer) for layer in layers])  # [layers, T]
        self._steps.clear()
        self._num_tokens = 0
        places = (experts + self._offsets).flatten()
        self._counts.scatter_add_(0, places, torch.ones_like(places))
        if self._own is not None:
            self._reroutes += (experts != self._own[:, ids]).sum(dim=1)


def _norms(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """Compute Euclidean norms of some rows of [T, H]: FP32 [R]."""
    if values is None:
        return None
    # A GPU's order of summation depends on the number of rows; FP64 hides that in FP32 results.
    norms: Tensor = torch.linalg.vector_norm(values[rows], dim=-1, dtype=torch.float64).float()
    return norms


def _columns(layers: list[Tensor | None], rows: int) -> list[list[float]]:
    """Turn an [R] per layer into a list per row, empty if the network lacks the value."""
    known = [layer for layer in layers if layer is not None]
    columns: list[list[float]] = torch.stack(known, dim=1).tolist() if known else [[]] * rows
    return columns
