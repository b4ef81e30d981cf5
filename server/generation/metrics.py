"""The names of all metrics, with vLLM's name and buckets where vLLM has the same one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from operator import attrgetter

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...engine.config import ResolvedConfig
from ...engine.messages import EngineStats
from ..http.budget import MemoryBudget
from ..http.keys import Account
from .generation import Counts, Histogram

PREFIX, VLLM_PREFIX = "pyllm:", "vllm:"
NOT_IN_VLLM = frozenset(
    PREFIX + name
    for name in (
        "engine_step_seconds", "engine_restarts", "expert_tokens", "expert_reroutes", "http_responses",
        "kv_event_batches", "kv_event_batches_dropped", "log_lines_dropped", "response_store_up",
    )
)  # fmt: skip
OLDER_NAMES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""vLLM's earlier names, which routers and dashboards still read."""
ENGINE_COUNTS = (
    "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "num_drafts", "num_draft_tokens",
    "num_kv_event_batches", "num_kv_event_batches_dropped",
)  # fmt: skip
"""Fields of `EngineStats` that count since the engine's start."""
LABEL = "model_name"
Family = GaugeMetricFamily | CounterMetricFamily
Rows = Iterable[tuple[tuple[int, ...], float]]  # the values of the labels, and the metric's value for them
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                       20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                 80.0)  # fmt: skip
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
LENGTH_BUCKETS = tuple(digit * 10**zeros for zeros in range(6) for digit in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, *(2**n for n in range(3, 15)))
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "Time from a request's arrival to its first token.", FIRST_TOKEN_BUCKETS),
    ("inter_token_latency_seconds", "Time between two tokens of a sequence.", TOKEN_BUCKETS),
    ("e2e_request_latency_seconds", "Time from a request's arrival to its end.", REQUEST_BUCKETS),
    ("request_queue_time_seconds", "A sequence's time in its queue phase.", REQUEST_BUCKETS),
    ("request_prefill_time_seconds", "A sequence's time in its prefill phase.", REQUEST_BUCKETS),
    ("request_decode_time_seconds", "A sequence's time in its decode phase.", REQUEST_BUCKETS),
    ("request_prompt_tokens", "Tokens of a sequence's prompt.", LENGTH_BUCKETS),
    ("request_generation_tokens", "Tokens of a sequence's output.", LENGTH_BUCKETS),
    ("iteration_tokens_total", "Tokens of prompts and outputs computed in one step.", STEP_TOKEN_BUCKETS),
    ("engine_step_seconds", "Time of one engine step.", STEP_BUCKETS),
)


class Metrics(Counts, Collector):
    """The metrics of one served model.

    `stats` returns the engine's latest state, and `config` has its settings. Counts continue when a new engine replaces
    a dead one. With `vllm_names`, the metrics that vLLM has are exposed a second time under its names and labels, the
    older ones included.
    """

    def __init__(
        self, model_name: str, stats: Callable[[], EngineStats], config: ResolvedConfig | None = None, *,
        vllm_names: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model_name, {name: Histogram(buckets) for name, _, buckets in HISTOGRAMS})
        self._vllm_names = vllm_names
        self._stats, self._config = stats, config
        self._previous = EngineStats()  # totals of the engines before this one
        self.log_lines_dropped: Callable[[], int] = lambda: 0
        self.store_is_available: Callable[[], bool] = lambda: True
        self._num_restarts = 0
        self._created = time.time()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric under its own name."""
        now = self._totals()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        queries, hits = now.prefix_cache_queries, now.prefix_cache_hits
        drafts, accepted = now.num_draft_tokens, now.num_accepted_tokens
        events, dropped = now.num_kv_event_batches, now.num_kv_event_batches_dropped
        for kind, name, text, value in (
            (gauge, "pyllm:num_requests_running", "Sequences in the running batch.", now.num_running),
            (gauge, "pyllm:num_requests_waiting", "Sequences in the queue.", now.num_waiting),
            (gauge, "pyllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", now.kv_cache_usage),
            (counter, "pyllm:num_preemptions", "Sequences preempted to free KV blocks.", now.num_preemptions),
            (counter, "pyllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries),
            (counter, "pyllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits),
            (counter, "pyllm:spec_decode_num_drafts", "Drafts verified.", now.num_drafts),
            (counter, "pyllm:spec_decode_num_draft_tokens", "Draft tokens verified.", drafts),
            (counter, "pyllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", sum(accepted)),
            (counter, "pyllm:prompt_tokens", "Prompt tokens of requests that have started.", self.num_prompt_tokens),
            (counter, "pyllm:generation_tokens", "Tokens generated.", self.num_generation_tokens),
            (counter, "pyllm:kv_event_batches", "Steps with events of the KV cache, if published.", events),
            (counter, "pyllm:kv_event_batches_dropped", "Those whose events were dropped.", dropped),
            (counter, "pyllm:engine_restarts", "Engines that replaced a dead one.", self._num_restarts),
            (counter, "pyllm:log_lines_dropped", "Log lines that could not be written.", self.log_lines_dropped()),
            (gauge, "pyllm:response_store_up", "Whether stored responses can be used.", self.store_is_available()),
        ):
            yield self._family(kind, name, text, [((), value)])
        yield from self._labelled(now)
        if (config := self._config) is not None:
            yield self._cache_config(config)
        for name, text, _ in HISTOGRAMS:
            histogram = self.histograms[name]
            bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            shown = HistogramMetricFamily(PREFIX + name, text, labels=[LABEL])
            shown.add_metric([self.model_name], buckets=buckets, sum_value=histogram.sum)
            yield shown
        success = counter(PREFIX + "request_success", "Sequences that ended.", labels=[LABEL, "finished_reason"])
        for reason, count in self.finished.items():
            success.add_metric([self.model_name, reason], count, created=self._created)
        yield success

    def _labelled(self, now: EngineStats) -> Iterator[Metric]:
        """Yield the counts that have labels of their own."""
        counter = CounterMetricFamily
        rows: Rows = (((n,), count) for n, count in enumerate(now.num_accepted_tokens))
        text = "Draft tokens accepted, by position in their draft."
        yield self._family(counter, "pyllm:spec_decode_num_accepted_tokens_per_pos", text, rows, "position")
        rows = (((status,), count) for status, count in sorted(self.responses_by_status.items()))
        text = "Responses by HTTP status, except to probes; 499: the client left first."
        yield self._family(counter, "pyllm:http_responses", text, rows, "status")
        layers = enumerate(now.expert_tokens or ())
        rows = (((layer, expert), count) for layer, counts in layers for expert, count in enumerate(counts))
        yield self._family(counter, "pyllm:expert_tokens", "Tokens computed by each expert.", rows, "layer", "expert")
        rows = (((layer,), count) for layer, count in enumerate(now.expert_reroutes or ()))
        text = "Tokens that the mu router sent to an expert other than their id's own."
        yield self._family(counter, "pyllm:expert_reroutes", text, rows, "layer")

    def _cache_config(self, config: ResolvedConfig) -> Metric:
        """Return the settings of the KV cache as labels, with vLLM's names."""
        labels = {
            "block_size": config.block_size, "num_gpu_blocks": config.num_kv_blocks,
            "cache_dtype": config.kv_cache_dtype, "enable_prefix_caching": config.enable_prefix_caching,
        }  # fmt: skip
        text = "Settings of the KV cache; num_gpu_blocks counts its blocks on every device."
        family = GaugeMetricFamily(PREFIX + "cache_config_info", text, labels=[LABEL, *labels])
        family.add_metric([self.model_name, *map(str, labels.values())], 1)
        return family

    def _family(self, kind: type[Family], name: str, text: str, rows: Rows, *labels: str) -> Metric:
        """Return a metric with one value for each combination of its labels."""
        family = kind(name, text, labels=[LABEL, *labels])
        for values, value in rows:
            family.add_metric([self.model_name, *map(str, values)], value)
        return family

    def follow(self, stats: Callable[[], EngineStats], config: ResolvedConfig | None = None) -> None:
        """Continue with a new engine, whose own counts start at 0."""
        self._previous, self._stats, self.experts = self._totals(), stats, EngineStats()
        self._config = config
        self._num_restarts += 1

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens looked up in the prefix cache that were found there; 0 before the first."""
        now = self._totals()
        return now.prefix_cache_hits / max(now.prefix_cache_queries, 1)

    def _totals(self) -> EngineStats:
        """Return the engine's latest state, with the counts of all engines so far."""
        now, previous, experts = self._stats(), self._previous, self.experts
        no_experts: list[int] = []
        rows = zip_longest(previous.expert_tokens or (), experts.expert_tokens or (), fillvalue=no_experts)
        return msgspec.structs.replace(
            now,
            **{name: getattr(previous, name) + getattr(now, name) for name in ENGINE_COUNTS},
            num_accepted_tokens=_sums(previous.num_accepted_tokens, now.num_accepted_tokens),
            expert_tokens=[_sums(*pair) for pair in rows],
            expert_reroutes=_sums(previous.expert_reroutes or (), experts.expert_reroutes or ()),
        )

    def exposition(self, budget: MemoryBudget | None = None, accounts: Collection[Account] = ()) -> bytes:
        """Return all metrics in Prometheus' text format, with those of the memory budget and of the keys."""
        text = generate_latest(self) + (generate_latest(_VllmNames(self)) if self._vllm_names else b"")
        text += generate_latest(_KeyMetrics(self.model_name, accounts))
        return text if budget is None else text + generate_latest(_MemoryMetrics(self.model_name, budget))


def _sums(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Add two lists item by item; the shorter one is padded with 0."""
    return [sum(pair) for pair in zip_longest(first, second, fillvalue=0)]


class _KeyMetrics(Collector):
    def __init__(self, model_name: str, accounts: Collection[Account]) -> None:
        self._model_name = model_name
        self._accounts = accounts

    def collect(self) -> Iterator[Metric]:
        """Yield a metric for each count by key."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for kind, name, text, count in (
            (gauge, "running", "Sequences that have produced a token, by key.", attrgetter("num_running")),
            (gauge, "waiting", "Sequences still waiting for their first token, by key.", attrgetter("num_waiting")),
            (counter, "requests", "Requests accepted, by key.", attrgetter("num_requests")),
            (counter, "refused", "Requests with the status 429, by key.", attrgetter("num_refused")),
            (counter, "prompt_tokens", "Prompt tokens, by key.", attrgetter("num_prompt_tokens")),
            (counter, "generation_tokens", "Tokens generated, by key.", attrgetter("num_generation_tokens")),
        ):
            family = kind(f"{PREFIX}key_{name}", text, labels=[LABEL, "key"])
            for account in self._accounts:
                family.add_metric([self._model_name, account.label], count(account))
            yield family


class _MemoryMetrics(Collector):
    def __init__(self, model_name: str, budget: MemoryBudget) -> None:
        self._model_name = model_name
        self._budget = budget

    def collect(self) -> Iterator[Metric]:
        used = GaugeMetricFamily(
            PREFIX + "api_memory_bytes", "Bytes that the API process holds for clients.", labels=[LABEL, "kind"]
        )
        for kind, size in self._budget.by_kind.items():
            used.add_metric([self._model_name, kind], size)
        text = "Bytes that the API process may hold for clients."
        limit = GaugeMetricFamily(PREFIX + "api_memory_limit_bytes", text, labels=[LABEL])
        limit.add_metric([self._model_name], self._budget.limit)
        text = "Requests refused and connections closed because the memory was used up."
        refused = CounterMetricFamily(PREFIX + "api_memory_refusals", text, labels=[LABEL])
        refused.add_metric([self._model_name], self._budget.num_refused)
        yield from (used, limit, refused)


class _VllmNames(Collector):
    """The metrics as vLLM names them, with its label for the number of the engine, which is always 0 here."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for family in self._metrics.collect():
            if family.name in NOT_IN_VLLM:
                continue
            name = family.name.removeprefix(PREFIX)
            yield self._renamed(family, name)
            if name in OLDER_NAMES:
                yield self._renamed(family, OLDER_NAMES[name])
        text = "Share of the prompt tokens looked up in the prefix cache that were found there, 0 to 1."
        rate = GaugeMetricFamily(PREFIX + "gpu_prefix_cache_hit_rate", text, labels=[LABEL])
        rate.add_metric([self._metrics.model_name], self._metrics.hit_rate)
        yield self._renamed(rate, "gpu_prefix_cache_hit_rate")

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(VLLM_PREFIX + name, family.documentation, family.type)
        renamed.samples = [
            sample._replace(
                name=renamed.name + sample.name.removeprefix(family.name), labels=sample.labels | {"engine": "0"}
            )
            for sample in family.samples
        ]
        return renamed
