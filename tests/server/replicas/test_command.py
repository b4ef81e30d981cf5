"""Which flags go together with `--replicas`, and what a replica gets of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from support.serving import run_command

from pyllm.engine.config import from_values
from pyllm.server.arguments import load_config
from pyllm.server.flags import ConfigError, ServerConfig
from pyllm.server.replicas.command import FAST, FRONT, check_replicas
from pyllm.server.replicas.settings import replica_settings

ROOT = Path(__file__).parents[3]


def load(*words: str, environment: Mapping[str, str] | None = None) -> ServerConfig:
    return load_config(ServerConfig, words, environment or {}, program="pyllm serve", description="")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--replicas 2 --uds /tmp/x", "--uds is a socket of one server: with --replicas, use --host and --port."),
        ("--replicas 2 --batch-dir x", "--batch-dir belongs to one server: run one for batches, without --replicas."),
        (
            '--replicas 2 --kv-events-config {"enable_kv_cache_events":true}',
            "--kv-events-config names a port, which only one replica can use: leave out --replicas.",
        ),
        ("--replicas 3 --max-replicas 2", "--max-replicas 2 is less than --replicas 3."),
        ("--max-replicas 2", "--max-replicas is for replicas: add --replicas."),
        ("--ray-address x", "--ray-address is for replicas: add --replicas."),
        (
            "--replicas 2 --ray-address x --port 0",
            "--port 0 picks a port of this machine: with --ray-address, name one.",
        ),
    ],
)
def test_what_cannot_go_with_replicas_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_replicas(load(*words.split()))
    assert str(caught.value) == sentence


def test_the_command_refuses_before_anything_starts() -> None:
    done = run_command("serve", "--max-replicas", "2")
    assert (done.returncode, done.stderr) == (2, "pyllm: --max-replicas is for replicas: add --replicas.\n")


def test_without_ray_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"^--replicas needs Ray: pip install 'pyllm-deep\[ray\]'\.$"):
        check_replicas(load("--replicas", "2"))


def test_a_replica_gets_every_flag_but_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = "model --replicas 2 --host 0.0.0.0 --port 1 --api-key a --api-key b --max-num-seqs 3 --seed 0"
    speculation = {"method": "ngram", "num_speculative_tokens": 2}
    config = load(*words.split(), "--speculative-config", str(speculation).replace("'", '"'))
    settings = replica_settings(config)
    assert settings.pop("speculative_config").items() >= speculation.items()
    assert settings == {"model": str(tmp_path / "model"), "api_key": ("a", "b"), "max_num_seqs": 3, "seed": 0}
    assert replica_settings(load("org/model"))["model"] == "org/model"


def test_the_example_config_names_what_exists() -> None:
    text = (ROOT / "docker" / "replicas.yaml").read_text(encoding="utf-8")
    (application,) = yaml.safe_load(text)["applications"]
    assert application["import_path"] == "pyllm.server.replicas:app"
    assert from_values(ServerConfig, application["args"]).replicas == 4
    for name, value in (FRONT | FAST).items():
        assert f"{name}={value}" in text
