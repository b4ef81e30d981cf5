"""OpenTelemetry traces by the GenAI conventions: one span, without texts, when a generating request has ended."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ... import __version__
from ..flags import ConfigError
from ..http.middleware import RequestContext
from .generation import Generation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

OPERATIONS = dict.fromkeys(("/v1/chat/completions", "/v1/responses", "/v1/messages"), "chat")
OPERATIONS |= {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""The conventions' name for each route's operation."""
PROPAGATED = (b"traceparent", b"tracestate")
LAST_SECONDS = 3.0  # time allowed at shutdown to send the last spans


class Tracing:
    """Makes spans and sends them to `endpoint` by OTLP over HTTP, or to `exporter`; raises `ConfigError`."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError("--otlp-traces-endpoint must be a URL such as http://localhost:4318/v1/traces.")
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'pyllm-deep[otel]'.") from None
        resource = Resource.create()  # from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "pyllm", "service.version": __version__}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("pyllm", __version__)
        self._parent = TraceContextTextMapPropagator()
        self._kind = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def record(self, context: RequestContext, seconds: float) -> None:
        """Make the span of a request that has just ended and took `seconds`."""
        operation, scope, status = OPERATIONS.get(context.path), context.scope, context.status
        if operation is None or scope["method"] != "POST":
            return
        generation = context.generation if isinstance(context.generation, Generation) else None
        model = context.model or (generation.model_name if generation else None)
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PROPAGATED}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pyllm",
            "gen_ai.request.model": model,
            "http.request.method": "POST",
            "http.response.status_code": status,
            "url.path": scope["path"],
            "pyllm.request.id": context.request_id,
            "error.type": str(status) if status >= 400 else None,
        }
        failed = status >= 500
        if generation is not None:
            attributes |= _describe(generation)
            if status < 400 and any(choice.finish_reason == "error" for choice in generation.choices):
                attributes["error.type"], failed = "engine_error", True
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {model}" if model else operation, context=self._parent.extract(carrier), kind=self._kind,
            attributes={name: value for name, value in attributes.items() if value is not None},
            start_time=end - int(seconds * 1e9),
        )  # fmt: skip
        if failed:
            span.set_status(self._failed)
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans, for `LAST_SECONDS` at most."""
        # In a thread, because the exporter keeps retrying an endpoint that does not answer.
        last = threading.Thread(target=self._provider.shutdown, name="send-last-traces", daemon=True)
        last.start()
        last.join(LAST_SECONDS)


def _describe(generation: Generation) -> dict[str, Any]:
    """Return the conventions' attributes of a generation, and its times in seconds."""
    params, usage, times = generation.params, generation.usage(), generation.choices[0].times
    reasons = [choice.finish_reason or "abort" for choice in generation.choices]
    return {
        "gen_ai.response.model": generation.model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": generation.n if generation.n > 1 else None,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.response.finish_reasons": reasons if generation.choices[0].embedding is None else None,
        "gen_ai.latency.time_to_first_token": generation.seconds_to(times.first_token),
        "gen_ai.latency.time_in_queue": generation.seconds_to(times.scheduled),
        "gen_ai.latency.time_in_model_prefill": _between(times.scheduled, times.first_token),
        "gen_ai.latency.time_in_model_decode": _between(times.first_token, times.last_token),
    }


def _between(begin: float, end: float) -> float | None:
    return end - begin if 0 < begin <= end else None
