"""Traces: the attributes of a span, its parent, and its way to a collector."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pyllm.server.flags import ConfigError
from pyllm.server.generation.tracing import Tracing

ENDPOINT = "http://localhost:4318/v1/traces"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SAMPLING = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "presence_penalty": 1.5}


@pytest.fixture
def spans(harness):
    """What has been sent, once called."""
    exporter = InMemorySpanExporter()
    harness.service.tracing = tracing = Tracing(ENDPOINT, exporter)

    def sent():
        tracing.close()
        return exporter.get_finished_spans()

    return sent


def test_a_span_has_the_conventions_names_counts_and_times(harness, spans):
    body = {"model": "alias", "prompt": "Hi there", "n": 2, "stream": True} | SAMPLING
    harness.post("/v1/completions", body, headers={"x-request-id": "mine"})
    (span,) = spans()
    assert (span.name, span.kind) == ("text_completion alias", SpanKind.SERVER)
    assert span.status.status_code is StatusCode.UNSET
    seconds = (span.end_time - span.start_time) / 1e9
    about = dict(span.attributes)
    first, queue, prefill, decode = (
        about.pop(f"gen_ai.latency.{name}")
        for name in ("time_to_first_token", "time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    )
    assert 0 <= queue <= first <= seconds
    assert queue + prefill == pytest.approx(first)
    assert first + decode <= seconds
    assert about == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pyllm",
        "gen_ai.request.model": "alias",
        "gen_ai.response.model": "org/tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.presence_penalty": 1.5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "pyllm.request.id": "mine",
    }


@pytest.mark.parametrize(
    ("path", "fields", "operation"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "secret"}]}, "chat"),
        ("/v1/responses", {"input": "secret"}, "chat"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "secret"}], "max_tokens": 4, "model": "x"}, "chat"),
        ("/v1/embeddings", {"input": "secret"}, "embeddings"),
    ],
)  # fmt: skip
def test_every_generating_endpoint_has_a_span_without_its_texts(harness, spans, path, fields, operation):
    harness.service.model = dataclasses.replace(harness.model, names=("x",))
    assert harness.post(path, fields).status_code == 200
    for other in ("/v1/models", "/health", "/metrics", path):
        harness.get(other)
    harness.post("/tokenize", {"prompt": "secret"})
    (span,) = spans()
    assert span.name.startswith(f"{operation} ")
    assert span.attributes["gen_ai.operation.name"] == operation
    assert "secret" not in span.to_json()
    assert harness.engine.reply not in span.to_json()


def test_a_span_follows_the_clients_trace_and_its_sampling(harness, spans):
    for flags in ("01", "00"):
        harness.post("/v1/completions", {"prompt": "a"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-{flags}"})
    harness.post("/v1/completions", {"prompt": "a"}, headers={"traceparent": "nonsense"})
    inside, alone = spans()
    assert f"{inside.context.trace_id:032x}" == TRACE
    assert f"{inside.parent.span_id:016x}" == PARENT
    assert alone.parent is None


def test_failures_show_their_status(harness, spans):
    harness.complete(temperature=9)
    harness.engine.most = 0
    harness.complete(model="alias")
    harness.engine.most = 9
    harness.engine.fail_after = 2
    harness.complete()
    harness.complete(stream=True)
    shown = [
        (s.attributes["http.response.status_code"], s.attributes["error.type"], s.status.status_code.name)
        for s in spans()
    ]
    assert shown == [
        (400, "400", "UNSET"),
        (429, "429", "UNSET"),
        (500, "500", "ERROR"),
        (200, "engine_error", "ERROR"),
    ]


def test_spans_reach_a_collector_over_http(harness, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tracing = Tracing(f"http://127.0.0.1:{server.server_port}/v1/traces")
        harness.service.tracing = tracing
        harness.post("/v1/completions", {"prompt": "a"}, headers={"traceparent": TRACEPARENT})
        tracing.close()
        server.shutdown()
        thread.join()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    (batch,) = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in batch.resource.attributes}
    assert resource["service.name"] == "pyllm"
    assert resource["deployment.environment"] == "test"
    assert batch.scope_spans[0].spans[0].trace_id.hex() == TRACE


def test_a_silent_collector_delays_no_request_and_no_shutdown(harness, monkeypatch, caplog):
    monkeypatch.setattr("pyllm.server.generation.tracing.LAST_SECONDS", 0.5)
    harness.service.tracing = tracing = Tracing("http://127.0.0.1:9/v1/traces")
    assert harness.complete().elapsed.total_seconds() < 5
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < 4
    assert harness.complete().status_code == 200


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x/y", "http://", "grpc"])
def test_an_endpoint_that_is_no_url_is_refused_in_one_sentence(endpoint):
    with pytest.raises(ConfigError, match=r"^--otlp-traces-endpoint must be a URL such as \S+\.$"):
        Tracing(endpoint)


def test_without_the_extra_the_flag_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        ConfigError, match=r"^--otlp-traces-endpoint needs OpenTelemetry: pip install 'pyllm-deep\[otel\]'\.$"
    ):
        Tracing(ENDPOINT)
