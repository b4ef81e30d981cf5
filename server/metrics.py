"""The metrics of a server: each is named here and nowhere else, after vLLM's names and buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..engine.messages import EngineStats, StepOutputs
from ..engine.output_processor import RequestTimes

LABEL = "model_name"
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                       20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                 80.0)  # fmt: skip
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
STEP_TOKEN_BUCKETS = (1, *(2**n for n in range(3, 15)))
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one served model, in a registry of their own.

    `stats` gives the engine's latest state whenever the metrics are read.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(model_name, name, text, buckets)
            self._registry.register(made)
            return made

        def counted(name: str, text: str, read: Callable[[], int]) -> None:
            self._registry.register(_Counted(model_name, name, text, read))

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(name, text, [LABEL], registry=self._registry).labels(model_name).set_function(read)

        gauge("pyllm:num_requests_running", "Sequences in the running batch.", lambda: stats().num_running)
        gauge("pyllm:num_requests_waiting", "Sequences waiting for their turn.", lambda: stats().num_waiting)
        gauge("pyllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", lambda: stats().kv_cache_usage)
        counted("pyllm:num_preemptions", "Sequences set back to free KV blocks.", lambda: stats().num_preemptions)
        counted("pyllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.",
                lambda: stats().prefix_cache_queries)  # fmt: skip
        counted("pyllm:prefix_cache_hits", "Prompt tokens that were found in the prefix cache.",
                lambda: stats().prefix_cache_hits)  # fmt: skip
        self.num_prompt_tokens = self.num_generation_tokens = 0
        counted("pyllm:prompt_tokens", "Prompt tokens of the requests that were started.",
                lambda: self.num_prompt_tokens)  # fmt: skip
        counted("pyllm:generation_tokens", "Tokens generated.", lambda: self.num_generation_tokens)
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
        self._step_tokens = histogram(
            "pyllm:iteration_tokens_total", "Tokens of prompts and outputs computed in one step.", STEP_TOKEN_BUCKETS
        )
        self._step = histogram("pyllm:engine_step_seconds", "Time of one engine step.", STEP_BUCKETS)
        self._finished = Counter(
            "pyllm:request_success", "Sequences that ended.", [LABEL, "finished_reason"], registry=self._registry
        )
        self._model_name = model_name

    def on_step(self, outputs: StepOutputs) -> None:
        """Take note of one engine step; messages that no step made (a refusal, an abort) do not count."""
        if not outputs.stats.step_tokens:
            return
        self._step.observe(outputs.stats.step_seconds)
        self._step_tokens.observe(outputs.stats.step_tokens)

    def on_finish(self, reason: str, seconds: float, times: RequestTimes) -> None:
        """Take note of a sequence's end, `seconds` after its arrival, and of those phases that it went through."""
        self._finished.labels(self._model_name, reason).inc()
        self.request_latency.observe(seconds)
        for phase, (begin, end) in zip(self._phases, pairwise(times), strict=True):
            if 0 < begin < end:
                phase.observe(end - begin)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


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


class _Counted(Collector):
    """A counter whose count somebody else keeps."""

    def __init__(self, model_name: str, name: str, text: str, read: Callable[[], int]) -> None:
        self._model_name = model_name
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=[LABEL])
        family.add_metric([self._model_name], self._read())
        yield family
