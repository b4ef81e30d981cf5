"""The metrics of a server: each is named here and nowhere else, after vLLM's names and buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise, zip_longest

import msgspec
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...engine.client.output_processor import RequestTimes
from ...engine.messages import EngineStats, StepOutputs

PREFIX, VLLM_PREFIX = "pyllm:", "vllm:"
OURS = (
    "pyllm:engine_step_seconds",
    "pyllm:engine_restarts",
    "pyllm:expert_tokens",
    "pyllm:expert_reroutes",
    "pyllm:http_responses",
)
"""What vLLM does not have."""
COUNTS = (
    "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "num_drafts", "num_draft_tokens",
)  # fmt: skip
"""What an engine's statistics count since its start."""
LABEL = "model_name"
REASONS = ("stop", "length", "abort", "error")
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                       20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                 80.0)  # fmt: skip
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
LENGTH_BUCKETS = tuple(digit * 10**zeros for zeros in range(6) for digit in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, *(2**n for n in range(3, 15)))
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics(Collector):
    """The metrics of one served model, in a registry of their own.

    `stats` gives the engine's latest state whenever the metrics are read; counts go on from engine to engine. With
    `vllm_names`, those that vLLM has are there a second time under its names and labels.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats], *, vllm_names: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._model_name = model_name
        self._vllm_names = vllm_names
        self._stats, self._ended = stats, EngineStats(expert_tokens=[], expert_reroutes=[])
        self._told = self._ended
        self._num_restarts = 0
        self._answers: dict[int, int] = {}
        self.num_prompt_tokens = self.num_generation_tokens = 0

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(model_name, name, text, buckets)
            self._registry.register(made)
            return made

        self.time_to_first_token = histogram(
            "pyllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = histogram(
            "pyllm:inter_token_latency_seconds", "Between two tokens of a sequence.", TOKEN_BUCKETS
        )
        self.request_latency = histogram(
            "pyllm:e2e_request_latency_seconds", "From a request's arrival to its end.", REQUEST_BUCKETS
        )
        self._phases = [  # between two moments of `RequestTimes` each
            histogram(
                f"pyllm:request_{phase}_time_seconds", f"A sequence's time in its {phase} phase.", REQUEST_BUCKETS
            )
            for phase in ("queue", "prefill", "decode")
        ]
        self._lengths = [
            histogram(f"pyllm:request_{part}_tokens", f"Tokens of a sequence's {text}.", LENGTH_BUCKETS)
            for part, text in (("prompt", "prompt"), ("generation", "output"))
        ]
        self._step_tokens = histogram(
            "pyllm:iteration_tokens_total", "Tokens of prompts and outputs computed in one step.", STEP_TOKEN_BUCKETS
        )
        self._step = histogram("pyllm:engine_step_seconds", "Time of one engine step.", STEP_BUCKETS)
        finished = Counter(
            "pyllm:request_success", "Sequences that ended.", [LABEL, "finished_reason"], registry=self._registry
        )
        # All are there from the start, at 0, so that the first of its kind shows in a rate.
        self._finished = {reason: finished.labels(model_name, reason) for reason in REASONS}

    def collect(self) -> Iterator[Metric]:
        """The engine's state, and all counts."""
        now = self._total()
        for name, text, value in (
            ("pyllm:num_requests_running", "Sequences in the running batch.", now.num_running),
            ("pyllm:num_requests_waiting", "Sequences waiting for their turn.", now.num_waiting),
            ("pyllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", now.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(name, text, labels=[LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        drafts, right = now.num_draft_tokens, now.num_accepted_tokens
        queries, hits = now.prefix_cache_queries, now.prefix_cache_hits
        for name, text, count in (
            ("pyllm:num_preemptions", "Sequences set back to free KV blocks.", now.num_preemptions),
            ("pyllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", queries),
            ("pyllm:prefix_cache_hits", "Prompt tokens that were found in the prefix cache.", hits),
            ("pyllm:spec_decode_num_drafts", "Guesses of next tokens that were checked.", now.num_drafts),
            ("pyllm:spec_decode_num_draft_tokens", "Tokens guessed.", drafts),
            ("pyllm:spec_decode_num_accepted_tokens", "Tokens guessed rightly.", sum(right)),
            ("pyllm:prompt_tokens", "Prompt tokens of the requests that were started, each prompt once.",
             self.num_prompt_tokens),
            ("pyllm:generation_tokens", "Tokens generated.", self.num_generation_tokens),
            ("pyllm:engine_restarts", "New engines in the place of dead ones.", self._num_restarts),
        ):  # fmt: skip
            yield self._counts(name, text, (), [((), count)])
        yield self._counts(
            "pyllm:spec_decode_num_accepted_tokens_per_pos", "Right tokens by place in their guess.", ("position",),
            (((n,), count) for n, count in enumerate(right)),
        )  # fmt: skip
        yield self._counts(
            "pyllm:http_responses", "Answers by HTTP status, but those to probes; 499: none was wanted.", ("status",),
            (((status,), count) for status, count in sorted(self._answers.items())),
        )  # fmt: skip
        yield self._counts(
            "pyllm:expert_tokens", "Tokens that an expert has computed.", ("layer", "expert"),
            (((layer, expert), count) for layer, counts in enumerate(now.expert_tokens or ())
             for expert, count in enumerate(counts)),
        )  # fmt: skip
        yield self._counts(
            "pyllm:expert_reroutes", "Tokens that mu has sent to another expert than their id's.", ("layer",),
            (((layer,), count) for layer, count in enumerate(now.expert_reroutes or ())),
        )  # fmt: skip

    def _counts(
        self, name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[object, ...], int]]
    ) -> CounterMetricFamily:
        """A counter with a count for each of some values of its labels."""
        family = CounterMetricFamily(name, text, labels=[LABEL, *labels])
        for values, count in rows:
            family.add_metric([self._model_name, *map(str, values)], count)
        return family

    def follow(self, stats: Callable[[], EngineStats]) -> None:
        """Go on with a new engine, whose own counts begin at 0."""
        self._ended, self._stats = self._total(), stats
        self._told = EngineStats(expert_tokens=[], expert_reroutes=[])
        self._num_restarts += 1

    def _total(self) -> EngineStats:
        """The engine's latest state, with the counts of all engines so far."""
        now, ended, told = self._stats(), self._ended, self._told
        nothing: list[int] = []
        rows = zip_longest(ended.expert_tokens or (), told.expert_tokens or (), fillvalue=nothing)
        return msgspec.structs.replace(
            now,
            **{name: getattr(ended, name) + getattr(now, name) for name in COUNTS},
            num_accepted_tokens=_sums(ended.num_accepted_tokens, now.num_accepted_tokens),
            expert_tokens=[_sums(*pair) for pair in rows],
            expert_reroutes=_sums(ended.expert_reroutes or [], told.expert_reroutes or []),
        )

    def on_step(self, outputs: StepOutputs) -> None:
        """Take note of one engine step; messages that no step made (a refusal, an abort) do not count."""
        if outputs.stats.expert_tokens is not None:
            self._told = outputs.stats
        if not outputs.stats.step_tokens:
            return
        self._step.observe(outputs.stats.step_seconds)
        self._step_tokens.observe(outputs.stats.step_tokens)

    def on_answer(self, status: int) -> None:
        """Take note of an HTTP answer."""
        self._answers[status] = self._answers.get(status, 0) + 1

    def on_finish(self, reason: str, seconds: float, times: RequestTimes, prompt_tokens: int, tokens: int) -> None:
        """Take note of a sequence's end, `seconds` after its arrival, and of those phases that it went through."""
        self._finished[reason].inc()
        self.request_latency.observe(seconds)
        for length, count in zip(self._lengths, (prompt_tokens, tokens), strict=True):
            length.observe(count)
        for phase, (begin, end) in zip(self._phases, pairwise(times), strict=True):
            if 0 < begin < end:
                phase.observe(end - begin)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        text = generate_latest(self._registry)
        if self._vllm_names:
            second = CollectorRegistry()
            second.register(_Renamed(self._registry))
            text += generate_latest(second)
        return text


def _sums(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Of each place; what one does not have is 0."""
    return [sum(pair) for pair in zip_longest(first, second, fillvalue=0)]


class Histogram(Collector):
    """A histogram for one thread, ten times as fast as the library's own, for it is asked at every token."""

    def __init__(self, model_name: str, name: str, text: str, buckets: tuple[float, ...]) -> None:
        self._model_name = model_name
        self._name = name
        self._text = text
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Take note of `count` things of this size."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What it holds now."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text, labels=[LABEL])
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric([self._model_name], buckets=buckets, sum_value=self._sum)
        yield family


class _Renamed(Collector):
    """The metrics of another registry as vLLM shows them, with the number of the engine, of which there is one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.name in OURS:
                continue
            renamed = Metric(family.name.replace(PREFIX, VLLM_PREFIX, 1), family.documentation, family.type)
            renamed.samples = [
                sample._replace(
                    name=sample.name.replace(PREFIX, VLLM_PREFIX, 1), labels={**sample.labels, "engine": "0"}
                )
                for sample in family.samples
            ]
            yield renamed
