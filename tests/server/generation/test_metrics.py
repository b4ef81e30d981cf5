"""What /metrics exposes, and under which names."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyllm.engine.client.output_processor import RequestTimes
from pyllm.engine.messages import EngineStats, StepOutputs
from pyllm.server.generation.metrics import Metrics

OLDER = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc", "gpu_prefix_cache_hits": "prefix_cache_hits",
    "gpu_prefix_cache_queries": "prefix_cache_queries", "time_per_output_token": "inter_token_latency",
}  # fmt: skip
"""vLLM's earlier names as routers read them, each with the present one."""


def samples(metrics):
    """{(name, labels but the model's): value} of everything but buckets."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in families for sample in family.samples if "le" not in sample.labels
    }  # fmt: skip


def test_metrics_count_tokens_requests_and_times(harness):
    harness.chat(n=2)
    harness.complete(max_tokens=3)
    text = harness.get("/metrics").text
    label = 'model_name="org/tiny"'
    assert f"pyllm:generation_tokens_total{{{label}}} 33.0" in text
    chat, prompt = harness.engine.requests[0][1], harness.engine.requests[2][1]
    assert f"pyllm:prompt_tokens_total{{{label}}} {len(chat) + len(prompt)}.0" in text, "each prompt once, as in usage"
    assert f"pyllm:request_prompt_tokens_count{{{label}}} 3.0" in text
    assert f"pyllm:request_generation_tokens_sum{{{label}}} 33.0" in text
    assert f'pyllm:request_success_total{{finished_reason="stop",{label}}} 2.0' in text
    assert f'pyllm:request_success_total{{finished_reason="length",{label}}} 1.0' in text
    assert f"pyllm:num_requests_running{{{label}}} 2.0" in text
    assert f"pyllm:num_requests_waiting{{{label}}} 1.0" in text
    assert f"pyllm:kv_cache_usage_perc{{{label}}} 0.25" in text
    assert f"pyllm:num_preemptions_total{{{label}}} 4.0" in text
    assert f"pyllm:prefix_cache_queries_total{{{label}}} 50.0" in text
    assert f"pyllm:prefix_cache_hits_total{{{label}}} 20.0" in text
    for name, count in (("time_to_first_token", 3), ("inter_token_latency", 30), ("e2e_request_latency", 3)):
        assert f"pyllm:{name}_seconds_count{{{label}}} {count}.0" in text
    for phase in ("queue", "prefill", "decode"):
        assert f"pyllm:request_{phase}_time_seconds_count{{{label}}} 3.0" in text


def test_metrics_count_the_time_and_the_tokens_of_a_step(harness):
    harness.metrics.on_step(StepOutputs(outputs=[], stats=EngineStats(step_seconds=0.5, step_tokens=100)))
    text = harness.get("/metrics").text
    assert 'pyllm:engine_step_seconds_sum{model_name="org/tiny"} 0.5' in text
    assert 'pyllm:iteration_tokens_total_bucket{le="64.0",model_name="org/tiny"} 0.0' in text
    assert 'pyllm:iteration_tokens_total_bucket{le="128.0",model_name="org/tiny"} 1.0' in text


def test_metrics_keep_the_last_counts_of_each_expert():
    metrics = Metrics("m", EngineStats)
    assert not [key for key in samples(metrics) if "expert" in key[0]]
    counted = EngineStats(step_tokens=1, expert_tokens=[[5, 7], [4, 8]], expert_reroutes=[0, 3])
    for stats in (counted, EngineStats(step_tokens=1)):
        metrics.on_step(StepOutputs(outputs=[], stats=stats))
    found = samples(metrics)
    assert found["pyllm:expert_tokens_total", ("expert", "1"), ("layer", "0")] == 7
    assert found["pyllm:expert_tokens_total", ("expert", "0"), ("layer", "1")] == 4
    assert found["pyllm:expert_reroutes_total", ("layer", "1")] == 3


def test_every_reason_to_end_is_there_before_anything_has_ended():
    found = samples(Metrics("m", EngineStats))
    for reason in ("stop", "length", "abort", "error"):
        assert found["pyllm:request_success_total", ("finished_reason", reason)] == 0


@pytest.mark.parametrize("also", [False, True])
def test_vllms_names_are_exposed_too_if_requested(also):
    metrics = Metrics("pyllm:m", EngineStats, vllm_names=also)
    metrics.num_generation_tokens = 3
    metrics.on_finish("stop", 1.0, RequestTimes(0.0), 10, 3)
    metrics.on_step(StepOutputs(outputs=[], stats=EngineStats(step_tokens=1, expert_tokens=[[1]])))
    found = samples(metrics)
    ours = {key for key in found if key[0].startswith("pyllm:")}
    theirs = {key for key in found if key[0].startswith("vllm:")}
    assert len(ours | theirs) == len(found)
    if not also:
        assert not theirs
        return
    older = {key for key in theirs if "vllm:gpu_" in key[0] or "time_per_output_token" in key[0]}
    assert {
        (key[0].replace("vllm:", "pyllm:"), *(pair for pair in key[1:] if pair[0] != "engine"))
        for key in theirs - older
    } == {
        key for key in ours
        if not key[0].startswith(
            ("pyllm:expert", "pyllm:engine_", "pyllm:log_", "pyllm:kv_event", "pyllm:response_")
        )
    }  # fmt: skip
    engine = ("engine", "0")
    assert found["vllm:generation_tokens_total", engine] == 3
    assert found["vllm:request_success_total", engine, ("finished_reason", "stop")] == 1
    text = metrics.exposition().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="pyllm:m"} 0.0' in text
    assert 'vllm:request_prompt_tokens_bucket{engine="0",le="10.0",model_name="pyllm:m"} 1.0' in text


def test_routers_find_vllms_older_names(harness):
    metrics = Metrics("m", lambda: harness.engine.stats, vllm_names=True)
    found = samples(metrics)
    assert found["vllm:gpu_prefix_cache_hit_rate", ("engine", "0")] == 0.4
    assert samples(Metrics("m", EngineStats, vllm_names=True))["vllm:gpu_prefix_cache_hit_rate", ("engine", "0")] == 0
    for older, present in OLDER.items():
        names = {key for key in found if key[0].startswith(f"vllm:{older}")} - {("vllm:gpu_prefix_cache_hit_rate",)}
        assert names
        for name, *labels in names:
            assert found[name, *labels] == found[name.replace(older, present), *labels]
    text = metrics.exposition().decode()
    assert 'vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.25' in text
    assert 'vllm:gpu_prefix_cache_queries_total{engine="0",model_name="m"} 50.0' in text


def test_routers_find_the_size_of_the_cache(make_harness):
    labels = (
        ("block_size", "16"), ("cache_dtype", "auto"), ("enable_prefix_caching", "True"), ("num_gpu_blocks", "100"),
    )  # fmt: skip
    harness = make_harness()
    assert samples(harness.metrics)["pyllm:cache_config_info", *labels] == 1
    config = harness.engine.info.config
    metrics = Metrics("m", EngineStats, config, vllm_names=True)
    theirs = sorted((*labels, ("engine", "0")))
    assert samples(metrics)["vllm:cache_config_info", *theirs] == 1
    metrics.follow(EngineStats, dataclasses.replace(config, num_kv_blocks=7))  # a new engine may have less memory
    assert ("num_gpu_blocks", "7") in next(key for key in samples(metrics) if key[0] == "vllm:cache_config_info")
