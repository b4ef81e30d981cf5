"""Log lines, as text and as JSON."""

from __future__ import annotations

import json
import logging

from pyllm.server.http.logs import JsonFormatter


def test_a_request_line_has_its_fields_as_members(harness, caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    harness.complete(max_tokens=3)
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["tokens"] == {"prompt": 2, "cached": 3, "completion": 3}
    assert 0 <= line["queue"] <= line["ttft"] <= line["seconds"]
    text = caplog.records[-1].getMessage()
    assert f"ttft={line['ttft']:.3f}" in text
    assert f"id={line['id']}" in text
    assert (line["level"], line["logger"]) == ("info", "pyllm.server")
    assert line["message"].startswith("POST /v1/completions 200 id=")
    assert line["time"].endswith("Z")
    harness.get("/nowhere")
    assert "ttft" not in json.loads(JsonFormatter().format(caplog.records[-1]))


def test_a_failure_inside_is_logged_with_the_id_of_its_request(harness, caplog, monkeypatch):
    def fail(*_, **__):
        raise KeyError("secret detail")

    monkeypatch.setattr(harness.engine, "submit", fail)
    for _ in range(2):
        harness.post("/v1/completions", {"prompt": "a"}, headers={"x-request-id": "find-me"})
    failures = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage().endswith("id=find-me") for record in failures] == [True, True]


def test_every_record_is_one_line_of_json_also_with_a_traceback():
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "odd \u2028 %s\n", ("é",), (ValueError, error, None))
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "odd \u2028 é\n"
    assert "ValueError: first" in line["exception"]
