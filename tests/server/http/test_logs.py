"""Log lines as JSON, and the cap that a server sets for log-probabilities."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from pyllm.server.api.fields import ErrorAnswer
from pyllm.server.flags import ServerConfig
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


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 3}, "prompt_logprobs"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3},
            "top_logprobs",
        ),
    ],
)
def test_more_logprobs_than_the_server_gives_are_refused(harness, path, fields, param):
    assert harness.post(path, fields).status_code == 200
    harness.service.model = dataclasses.replace(harness.model, flags=ServerConfig(max_logprobs=2))
    response = harness.post(path, fields)
    assert response.status_code == 400
    error = ErrorAnswer.model_validate_json(response.content).error
    assert (error.param, error.message) == (param, f"{param} must be at most 2 on this server, got 3.")
    assert harness.post(path, fields | {param: 2}).status_code == 200
