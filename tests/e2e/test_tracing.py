"""`--otlp-traces-endpoint`: a whole server tells a collector of its requests, the last ones when it ends."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.serving import PATIENCE, ServerProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    spans: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.spans.extend(batch.scope_spans[0].spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_all_spans_are_exported_before_shutdown_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # milliseconds: none is sent before the end
    Collector.spans = []
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            flags = ("--dtype", "float32", "--otlp-traces-endpoint", f"http://127.0.0.1:{collector.server_port}/")
            with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
                for number in range(3):
                    body = {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True, "stream": number == 1}
                    headers = {"traceparent": f"00-{TRACE}-b7ad6b716920333{number}-01", "x-request-id": f"n{number}"}
                    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE)
        finally:
            collector.shutdown()
            thread.join()
    found = {}
    for span in Collector.spans:
        about = {a.key: a.value for a in span.attributes}
        found[about["pyllm.request.id"].string_value] = about
        assert span.trace_id.hex() == TRACE
        assert about["gen_ai.usage.output_tokens"].int_value == 3
        assert 0 < about["gen_ai.latency.time_to_first_token"].double_value < PATIENCE
    assert sorted(found) == ["n0", "n1", "n2"]
