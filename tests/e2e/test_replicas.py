"""`pyllm serve --replicas`: many servers behind one address, on a real Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from support.fleets import HEADER, arguments, descendants, parent, samples, servers_of, streams, wait_for_replicas
from support.serving import PATIENCE, ServerProcess, children, environment, is_running, run_command, wait_for

from pyllm.server.replicas.command import FRONT

pytestmark = pytest.mark.needs("Ray")
KEY = "open sesame"
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7c" * 32}  # else Ray draws its own
QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two replicas of the demo model."""
    folder = tmp_path_factory.mktemp("fleet")
    with ServerProcess(folder / "log", "--replicas", "2", cold=True, **AUTHENTICATION) as process:
        yield process
        below = list(descendants(process.process.pid))
    wait_for(lambda: not any(map(is_running, below)), "all processes to end")


@pytest.fixture
def http(fleet: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=PATIENCE) as client:
        yield client


def test_the_official_client_streams(fleet: ServerProcess) -> None:
    with OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        (model,) = client.models.list()
        whole = client.chat.completions.create(model=model.id, **QUESTION)  # type: ignore[call-overload]
        parts = client.chat.completions.create(model=model.id, stream=True, **QUESTION)  # type: ignore[call-overload]
        text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content != ""


def test_requests_and_answers_pass_whole(fleet: ServerProcess, http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=QUESTION, headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.headers.get_list("date") == [answer.headers["date"]]
    assert re.fullmatch("[a-z0-9]+", answer.headers[HEADER])
    assert http.head("/v1/models").status_code == http.get("/v1/models/").status_code == 200
    assert http.get("/v1/models?a=b%20c").status_code == 200
    wrong = http.post("/v1/chat/completions", json=QUESTION | {"max_tokens": -1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    assert http.post("/v1/chat/completions", content="{").status_code == 400
    assert http.get("/v1/none").json()["error"]["code"] == "unknown_url"
    assert http.get("/").text.startswith("<!")
    large = http.post(
        "/v1/chat/completions", content=b" " * (8 * 2**20 + 1), headers={"content-type": "application/json"}
    )
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    most = b'{"prompt": "Hi", "max_tokens": 1}' + b" " * (8 * 2**20 - 33)
    assert http.post("/v1/completions", content=most, headers={"content-type": "application/json"}).status_code == 200


def test_metrics_count_each_replica(fleet: ServerProcess, http: httpx.Client) -> None:
    names = wait_for_replicas(fleet.url, 2)
    before = samples(fleet.url, "request_success_total")
    used = [
        http.post("/v1/completions", json={"prompt": f"Number {n}", "max_tokens": 1}).headers[HEADER] for n in range(24)
    ]
    after = samples(fleet.url, "request_success_total")
    assert set(after) == names == set(used)
    assert {name: after[name] - before.get(name, 0) for name in names} == {name: used.count(name) for name in names}


def test_conversations_stay_with_their_replica(http: httpx.Client) -> None:
    owners: set[str] = set()
    number = 0
    while number < 6 or len(owners) < 2:  # a draw places each new conversation
        number += 1
        assert number < 40
        messages = [{"role": "user", "content": f"My number is {number}."}]
        used = set()
        for _ in range(3):
            answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8})
            used.add(answer.headers[HEADER])
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "And now?"}]
        assert len(used) == 1
        owners |= used
        kept = http.post("/v1/responses", json={"input": f"Hi {number}", "max_output_tokens": 4})
        found = http.get(f"/v1/responses/{kept.json()['id']}")
        more = {"input": "More", "previous_response_id": kept.json()["id"], "max_output_tokens": 4}
        assert found.status_code == http.post("/v1/responses", json=more).status_code == 200
        named = [{"prompt": f"{n}", "max_tokens": 1, "prompt_cache_key": f"key {number}"} for n in range(3)]
        assert len({http.post("/v1/completions", json=body).headers[HEADER] for body in named}) == 1
        by_header = {"x-session-id": f"session {number}"}
        bodies = [{"prompt": f"{n}", "max_tokens": 1} for n in range(3)]
        assert len({http.post("/v1/completions", json=b, headers=by_header).headers[HEADER] for b in bodies}) == 1


def test_a_client_that_leaves_stops_its_generation(fleet: ServerProcess) -> None:
    url = httpx.URL(fleet.url)
    body = b'{"prompt": "Hi", "max_tokens": 900, "ignore_eos": true, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert connection.recv(65536)
    wait_for(lambda: sum(samples(fleet.url, "request_success_total", finished_reason="abort").values()), "the abort")
    assert sum(samples(fleet.url, "num_requests_running").values()) == 0


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_a_killed_part_costs_only_its_own_streams(fleet: ServerProcess, http: httpx.Client, victim: str) -> None:
    names = wait_for_replicas(fleet.url, 2)
    with streams(fleet.url, 16, max_tokens=600) as running:
        assert {stream.replica for stream in running} == names
        server = servers_of(fleet)[0]
        killed = min(children(server)) if victim == "engine" else parent(server)
        below = list(descendants(killed))
        os.kill(killed, signal.SIGKILL)
        for number in range(24):
            answer = http.post("/v1/completions", json={"prompt": f"New {number}", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
    lost = {stream.replica for stream in running if not stream.is_done}
    assert len(lost) == 1, "the other replica's streams end well"
    for stream in running:
        assert stream.is_done == (stream.replica not in lost)
        assert bool(stream.error) == (stream.replica in lost)
        assert stream.tokens == 600 * stream.is_done
    wait_for(lambda: not any(map(is_running, below)), "the killed replica's processes to end")
    again = wait_for_replicas(fleet.url, 2)
    assert len(again & names) == 1
    assert not again & lost


@pytest.mark.slow
def test_a_replica_that_cannot_start_ends_the_command(tmp_path: Path) -> None:
    done = run_command("serve", str(tmp_path / "none"), "--replicas", "2", "--port", "0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pyllm: {tmp_path / 'none'} ")


UPDATE = """
import sys
import ray
from ray import serve
from pyllm.server.replicas import app
ray.init(sys.argv[1], log_to_driver=False)
serve.run(app({"replicas": 2, "seed": 1}), name="pyllm", route_prefix="/")
"""


@pytest.mark.slow
def test_a_rolling_update_loses_nothing(fleet: ServerProcess, http: httpx.Client, tmp_path: Path) -> None:
    names = wait_for_replicas(fleet.url, 2)
    address = re.search(r"Ray (\S+),", fleet.log)
    assert address is not None
    command = [sys.executable, "-c", UPDATE, address[1]]
    said = tmp_path / "update"
    with said.open("wb") as log, subprocess.Popen(
        command, env=environment() | AUTHENTICATION, stdout=log, stderr=log
    ) as update:  # fmt: skip
        number = 0
        while update.poll() is None:
            with streams(fleet.url, 8, max_tokens=200) as running:
                for _ in range(8):
                    number += 1
                    answer = http.post("/v1/completions", json={"prompt": f"Now {number}", "max_tokens": 2})
                    assert answer.status_code == 200, answer.text
            assert [(stream.error, stream.is_done, stream.tokens) for stream in running] == [("", True, 200)] * 8
        assert update.wait() == 0, said.read_text()
    assert number > 8
    assert not wait_for_replicas(fleet.url, 2) & names


SCALED = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: pyllm
    route_prefix: /
    import_path: pyllm.server.replicas:app
    args: {{max-replicas: 2, max_num_seqs: 8, device: cpu}}
    deployments:
      - name: server
        ray_actor_options: {{num_cpus: 0.5}}
        autoscaling_config:
          min_replicas: 1
          max_replicas: 2
          target_ongoing_requests: 4
          upscale_delay_s: 1
          downscale_delay_s: 3
          look_back_period_s: 2
          metrics_interval_s: 0.5
          policy: {{policy_function: "pyllm.server.replicas.application:scale_by_load"}}
"""


@pytest.mark.slow
def test_a_config_scales_by_the_requests_and_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = tmp_path / "serve.yaml"
    config.write_text(SCALED.format(port=port))
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(
        command, env=environment() | FRONT, stdout=log, stderr=log, start_new_session=True
    ) as process:  # fmt: skip
        try:
            wait_for_replicas(url, 1)
            with streams(url, 16, max_tokens=400) as running:
                wait_for_replicas(url, 2)
            assert all(stream.is_done for stream in running)
            wait_for_replicas(url, 1)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)


@pytest.mark.slow
def test_keys_and_tls_hold_in_front_of_replicas(
    https_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = https_pair
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    flags = ["--replicas", "1", "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    with ServerProcess(tmp_path / "log", *flags, cold=True, PYLLM_API_KEY=KEY) as fleet:
        assert fleet.url.startswith("https://")
        assert httpx.get(f"{fleet.url}/v1/models").status_code == 401
        asked = {"url": f"{fleet.url}/v1/chat/completions", "json": QUESTION, "timeout": PATIENCE}
        assert httpx.post(**asked).status_code == 401
        assert httpx.post(**asked, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert KEY not in " ".join(word for pid in descendants(fleet.process.pid) for word in arguments(pid))
        assert KEY not in fleet.log


@pytest.mark.slow
def test_conversations_find_their_prefixes_as_in_one_server() -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "load" / "replicas.py"
    command = [sys.executable, str(program), "affinity", "--", "--device", "cpu"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert len(result["replicas"]["requests"]) == 4, "all of them are used"
    assert result["ratio"] >= 0.9
    assert result["round_robin"]["hit_rate"] < result["replicas"]["hit_rate"]
