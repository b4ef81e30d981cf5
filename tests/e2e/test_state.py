"""What a server says of itself: models, health, version, metrics and its log."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import OpenAI
from support.serving import ServerProcess, wait_for

import pyllm


def test_every_name_of_the_model_is_listed(client: OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "team/alias"]
    assert {model.object for model in models} == {"model"}
    assert {model.max_model_len for model in models} == {8192}
    assert all(model.created > 0 for model in models)


@pytest.mark.parametrize("name", ["tiny", "team/alias"])
def test_a_model_is_found_by_each_name_and_answers_by_it(client: OpenAI, name: str) -> None:
    assert client.models.retrieve(name).id == name
    answer = client.completions.create(model=name, prompt="Hi", max_tokens=1)
    assert answer.model == name


@pytest.mark.parametrize("name", ["gpt-4o", "tin", "team", "TINY", "../tiny"])
def test_an_unknown_model_is_not_found(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(name)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=name, prompt="Hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match=r"does not exist.*'tiny'"):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}], stream=True)


def test_health_readiness_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json() == {"version": pyllm.__version__}


def test_openapi_describes_the_requests_with_their_bounds(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(page["paths"])
    fields = page["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "max_tokens", "seed"} <= set(fields)
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatCompletionRequest"}


def test_metrics_count_what_was_done(server: ServerProcess, client: OpenAI) -> None:
    before = server.wait_until_idle()
    options = {"model": "tiny", "prompt": "Hello", "extra_body": {"ignore_eos": True}}
    client.completions.create(n=2, max_tokens=7, **options)
    list(client.completions.create(max_tokens=4, stream=True, **options))
    text = client.completions.create(max_tokens=20, temperature=0, **options).choices[0].text
    client.completions.create(max_tokens=20, temperature=0, stop=text[3], **options)
    after = server.wait_until_idle()

    def moved(name: str, reason: str = "") -> float:
        return after[name, reason] - before.get((name, reason), 0)

    stopped_at = text.index(text[3]) + 1
    assert moved("prompt_tokens_total") == 4 * len("Hello")  # each prompt once, as in the usage
    assert moved("generation_tokens_total") == 2 * 7 + 4 + 20 + stopped_at
    assert moved("request_success_total", "length") == 4
    assert moved("request_success_total", "stop") == 1
    assert moved("time_to_first_token_seconds_count") == 5
    assert moved("e2e_request_latency_seconds_count") == 5
    assert moved("inter_token_latency_seconds_count") == 2 * 6 + 3 + 19 + stopped_at - 1
    for phase in ("queue", "prefill", "decode"):
        assert moved(f"request_{phase}_time_seconds_count") == 5
    assert moved("iteration_tokens_total_sum") >= 2 * 6 + 3 + 19 + stopped_at
    assert moved("num_preemptions_total") == 0
    assert moved("engine_step_seconds_count") >= 7 + 4 + 20 + stopped_at
    assert after["engine_step_seconds_sum", ""] > before["engine_step_seconds_sum", ""]


def test_log_has_one_line_per_request_without_its_text(server: ServerProcess, client: OpenAI) -> None:
    client.completions.create(
        model="tiny", prompt="a secret thing", max_tokens=3, extra_headers={"x-request-id": "look-for-me"}
    )
    (line,) = wait_for(lambda: [line for line in server.log.splitlines() if "look-for-me" in line], "the log's line")
    assert "POST /v1/completions 200" in line
    assert "prompt_tokens=14" in line
    assert "secret" not in server.settled_log()
