"""Flags: where their values come from, what is refused, and what the engine gets of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from support.serving import run_command

from pyllm.engine.config import settings_of
from pyllm.engine.messages import MAX_LOGPROBS
from pyllm.server.arguments import GROUPS, load_config, unknown_variables
from pyllm.server.chat.served_model import model_name
from pyllm.server.flags import (
    BenchConfig,
    ConfigError,
    GenerateConfig,
    ServerConfig,
    TerminalConfig,
)


def load(cls, *arguments, **environment):
    return load_config(cls, arguments, environment, program="pyllm test", description="")


def test_arguments_win_over_environment_over_file_over_defaults(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("port: 1\nhost: file\nmax-num-seqs: 3\nserved_model_name: [a, b]\n")
    config = load(ServerConfig, "--port=4", "--config", str(file), PYLLM_PORT="5", PYLLM_HOST="environment")
    assert (config.port, config.host, config.max_num_seqs) == (4, "environment", 3)
    assert config.served_model_name == ("a", "b")
    assert config.block_size == 16
    assert load(ServerConfig, PYLLM_CONFIG=str(file)).port == 1


def test_model_given_twice_must_agree():
    assert load(ServerConfig, "here").model == load(ServerConfig, "--model", "here").model == "here"
    assert load(TerminalConfig, "here").model == "here"
    assert load(GenerateConfig, "words", "--model", "here").model == "here"
    assert load(ServerConfig).model is None
    assert load(ServerConfig, "x", "--model", "x").model == "x"
    with pytest.raises(ConfigError, match="twice"):
        load(ServerConfig, "x", "--model", "y")


def test_a_size_has_units_or_none():
    sizes = {"1000": 1000, "512MB": 512 * 10**6, "2GiB": 2 << 30, "1.5k": 1500, "3 mi": 3 << 20}
    for text, size in sizes.items():
        assert load(ServerConfig, "--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size
    assert load(ServerConfig, PYLLM_KV_CACHE_MEMORY_BYTES="1KiB").kv_cache_memory_bytes == 1024


def test_switches_that_are_on_can_be_turned_off(tmp_path):
    assert load(ServerConfig).enable_prefix_caching
    assert not load(ServerConfig, "--no-enable-prefix-caching").engine_config(tmp_path).enable_prefix_caching
    assert not load(ServerConfig, PYLLM_ENABLE_PREFIX_CACHING="false").enable_prefix_caching


def test_repeatable_flags_collect_and_env_splits_on_commas():
    assert load(ServerConfig, "--api-key", "a", "--api-key", "b").api_key == ("a", "b")
    assert load(ServerConfig, PYLLM_API_KEY="a, b").api_key == ("a", "b")


def test_empty_variable_is_an_absent_one():
    assert load(ServerConfig, PYLLM_PORT="").port == 8000


@pytest.mark.parametrize("key", ["", " ", ","])
def test_a_key_that_was_not_found_opens_no_server(key):
    with pytest.raises(ConfigError, match="PYLLM_API_KEY must be one or more strings, none of them empty"):
        load(ServerConfig, PYLLM_API_KEY=key)


def test_an_empty_name_of_a_key_file_does_not_open_the_server():
    with pytest.raises(ConfigError, match="PYLLM_API_KEY_FILE must not be empty"):
        load(ServerConfig, PYLLM_API_KEY_FILE="")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prot", "1"], "--prot; did you mean --port?"),
        (["--max-model-length=5"], "did you mean --max-model-len?"),
        (["--port", "x"], "--port must be a whole number between 0 and 65535, but got 'x'"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--port", "1.5"], "whole number"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout must be a number"),
        (["--shutdown-timeout", "-1"], "between 0"),
        (["--dtype", "bfloat"], "did you mean bfloat16?"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--api-key", ""], "none of them empty"),
        (["--host", ""], "--host"),
        (["--port"], "expected one argument"),
        (["--kv-cache-memory-bytes", "2 GiBs"], "--kv-cache-memory-bytes must be a number of bytes, or one such as"),
        (["--kv-cache-memory-bytes", "0"], "--kv-cache-memory-bytes"),
        (["--kv-cache-memory-bytes", "9999999999TB"], "--kv-cache-memory-bytes"),
        (["--gpu-memory-utilization", "1.1"], "between 0.01 and 1"),
        (["--scheduling-policy", "prio"], "did you mean priority?"),
        (["--max-num-queued-reqs", "0"], "--max-num-queued-reqs"),
        (["--max-logprobs", "21"], "between 0 and 20"),
        (["--log-format", "yaml"], "one of text, json"),
        (["--override-generation-config", "[1]"], "must be a JSON object such as"),
        (["--override-generation-config", "{"], "must be a JSON object such as"),
        (["--override-generation-config", "[" * 20000], "must be a JSON object such as"),
        (["--generation-config", ""], "--generation-config must not be empty"),
        (["--ssl-keyfiles", "x"], "did you mean --ssl-keyfile?"),
        (["a", "b"], "Unexpected argument 'b'"),
        (["--config", "/does/not/exist.yaml"], "cannot be read: No such file"),
    ],
)
def test_unusable_arguments_are_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError) as caught:
        load(ServerConfig, *arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot: 1", "unknown flag 'prot'; did you mean port?"),
        ("port: many", "port in"),
        ("config: other.yaml", "unknown flag 'config'"),
        ("- a", "lines of the form"),
        ("a: b: c", "not valid YAML"),
        ("host: {a: 1}", "host in"),
        ("host: yes", "must be text, but got True"),
        ("host: 2024-11-30", "must be text, but got datetime.date"),
        ("api-key: [1]", "api_key in"),
        *(
            (f"api_key: {none}", "must be one or more strings, none of them empty")
            for none in ("[]", "", "~", "''", "[null]", "[' ']", "{}", "0", "false", "[a, '']")
        ),
        ("api_key: [a]\napi-key: []", "has the flag api_key twice"),
        ("allowed_origins: []", "must be one or more strings, none of them empty"),
        *((f"{name}:", "must be text, but got None") for name in ("uds", "ssl_keyfile", "ssl_certfile")),
        ("isolate_cache_by_key:", "must be true or false, but got None"),
        ("uds: ''", "uds in"),
        ('generation_config: "a\\0b"', "is not UTF-8 text"),
        ("model: ''", "must not be empty"),
        ("", "is empty"),
        ("port: 2024-99-99", "a value is not a valid date or number, or does not fit its tag"),
        ("port: !!int x", "a value is not a valid date or number, or does not fit its tag"),
        ("port: !!int ''", "a value is not a valid date or number, or does not fit its tag"),
        ("port: !!timestamp x", "a value is not a valid date or number, or does not fit its tag"),
        ("host: !!bool x", "a value is not a valid date or number, or does not fit its tag"),
        ("port: " + "1" * 5000, "a value is not a valid date or number, or does not fit its tag"),
        ("host: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("host: \0", "not valid YAML"),
        ("host: " + "[" * 5_000, "is nested too deeply"),
        ("- " * 5_000, "is nested too deeply"),
        ("host: " + "a" * 70_000, "is too large"),
        ("host: &a [*a]", "is too large"),
        (
            "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")),
            "is too large",
        ),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(ServerConfig, "--config", str(file))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_file_of_flags_is_refused(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config .+ cannot be read: 'utf-8' codec"):
        load(ServerConfig, "--config", str(file))
    file.write_text("\ufeffport: 9")
    assert load(ServerConfig, "--config", str(file)).port == 9


def test_a_value_that_is_not_utf_8_is_refused():
    for arguments in (["--model", "\udcff"], ["--served-model-name", "\udcff"], ["--generation-config", "\udcff"]):
        with pytest.raises(ConfigError, match=f"^{arguments[0]} is not UTF-8 text"):
            load(ServerConfig, *arguments)


@pytest.mark.parametrize("flag", ["--model", "--uds", "--chat-template", "--ssl-keyfile", "--revision"])
def test_a_value_that_a_script_left_empty_is_refused(flag):
    with pytest.raises(ConfigError, match=f"^{flag} must not be empty"):
        load(ServerConfig, flag, "")


@pytest.mark.parametrize(
    "name", ["CONFIG", "UDS", "SSL_KEYFILE", "SSL_CERTFILE", "API_KEY_FILE", "ISOLATE_CACHE_BY_KEY", "ALLOWED_ORIGINS"]
)
def test_an_empty_variable_that_was_to_protect_is_refused(name):
    with pytest.raises(ConfigError, match=rf"PYLLM_{name} |--config "):
        load(ServerConfig, **{f"PYLLM_{name}": ""})


def test_flags_may_be_spelled_with_underscores():
    config = load(ServerConfig, "--max_model_len", "50", "--no_enable_prefix_caching", "--served_model_name=a_b")
    assert (config.max_model_len, config.enable_prefix_caching, config.served_model_name) == (50, False, ("a_b",))
    config = load(GenerateConfig, "Once upon a time", "--max_tokens", "100", "--top_p=0.5")
    assert (config.prompt, config.max_tokens, config.top_p) == ("Once upon a time", 100, 0.5)
    assert load(GenerateConfig, "--", "--max_tokens").prompt == "--max_tokens"
    for cls in (ServerConfig, TerminalConfig, GenerateConfig, BenchConfig):
        for name, own in settings_of(cls).items():
            if own.kind == "int":
                assert getattr(load(cls, f"--{name}", str(int(max(own.low, 1)))), name) == max(own.low, 1)
    with pytest.raises(ConfigError, match=r"Unknown flag --max-modl-len; did you mean --max-model-len\?"):
        load(ServerConfig, "--max_modl_len", "5")


SERVICE = {
    "PYLLM_PORT": "tcp://10.96.12.3:8000", "PYLLM_SERVICE_HOST": "10.96.12.3", "PYLLM_SERVICE_PORT": "8000",
    "PYLLM_SERVICE_PORT_HTTP": "8000", "PYLLM_PORT_8000_TCP": "tcp://10.96.12.3:8000",
    "PYLLM_PORT_8000_TCP_PROTO": "tcp", "PYLLM_PORT_8000_TCP_PORT": "8000", "PYLLM_PORT_8000_TCP_ADDR": "10.96.12.3",
    "PYLLM_API_PORT": "tcp://[fd00::1]:80", "PYLLM_API_SERVICE_HOST": "fd00::1", "PYLLM_API_PORT_53_UDP_PROTO": "udp",
}  # fmt: skip


def test_variables_of_a_kubernetes_service_are_no_flags():
    assert load(ServerConfig, **SERVICE).port == 8000
    assert load(ServerConfig, "--port", "9", **SERVICE).port == 9
    assert load(ServerConfig, **SERVICE | {"PYLLM_PORT": "8080"}).port == 8080
    assert unknown_variables(SERVICE, ServerConfig, []) == []
    with pytest.raises(ConfigError, match="PYLLM_PORT must be"):
        load(ServerConfig, PYLLM_PORT="10.96.12.3:8000")


def test_an_unknown_variable_is_named_with_the_nearest():
    known = {"PYLLM_PORT": "1", "PYLLM_CPU_ISA": "avx2", "PYLLM_TEMPERATURE": "1", "HOME": "/", "VLLM_PORT": "1"}
    assert unknown_variables(known, ServerConfig, [TerminalConfig]) == []
    (sentence,) = unknown_variables(known | {"PYLLM_PROT": "secret"}, ServerConfig, [GenerateConfig, TerminalConfig])
    assert sentence == "PyLLM has no environment variable PYLLM_PROT, so it has no effect; did you mean PYLLM_PORT?"


def test_environment_is_named_in_its_errors():
    with pytest.raises(ConfigError, match="PYLLM_PORT must be"):
        load(ServerConfig, PYLLM_PORT="x")


def test_switches_are_read_from_everywhere(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("chat: true")
    assert load(GenerateConfig, "hi", "--chat").chat
    assert load(GenerateConfig, "hi", PYLLM_CHAT="yes").chat
    assert load(GenerateConfig, "hi", "--config", str(file)).chat
    assert not load(GenerateConfig, "hi", "--no-chat", PYLLM_CHAT="1").chat
    with pytest.raises(ConfigError, match="PYLLM_CHAT must be true or false"):
        load(GenerateConfig, "hi", PYLLM_CHAT="maybe")


def test_unset_temperature_differs_from_zero():
    assert load(TerminalConfig).temperature is load(TerminalConfig).max_tokens is None
    assert load(TerminalConfig, "--temperature", "0").temperature == 0


def test_a_json_flag_is_text_or_a_mapping_of_the_file(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("override_generation_config: {temperature: 0.5}")
    text = '{"temperature": 0.5}'
    for config in (
        load(ServerConfig, "--config", str(file)),
        load(ServerConfig, "--override-generation-config", text),
        load(ServerConfig, PYLLM_OVERRIDE_GENERATION_CONFIG=text),
    ):
        assert config.override_generation_config == {"temperature": 0.5}


def test_the_cap_of_logprobs_is_the_engines():
    assert load(ServerConfig).max_logprobs == MAX_LOGPROBS


def test_engine_gets_its_flags():
    assert load(ServerConfig, "--deterministic").engine_config(Path("x")).deterministic
    assert not load(ServerConfig).engine_config(Path("x")).deterministic
    assert load(ServerConfig, "--kv-cache-dtype", "fp8").engine_config(Path("x")).kv_cache_dtype == "fp8"
    assert load(ServerConfig).engine_config(Path("x")).max_num_seqs is None, "the engine knows the device"
    config = load(ServerConfig, "--max-num-seqs", "3", "--seed", "9", "--load-format", "dummy", "--num-kv-blocks", "7")
    engine = config.engine_config(Path("/some/folder"))
    assert (engine.model, engine.max_num_seqs, engine.seed) == ("/some/folder", 3, 9)
    assert (engine.load_format, engine.num_kv_blocks, engine.block_size) == ("dummy", 7, 16)


def test_local_model_is_named_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert model_name(str(tmp_path / "mine")) == model_name(".") == "mine"
    assert model_name("org/name") == "org/name"
    assert model_name(None) == "pyllm-demo"


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
    return subprocess.run(
        [sys.executable, "-m", "pyllm", *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def test_each_flag_of_the_server_is_in_one_group_of_its_help():
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(settings_of(ServerConfig))


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--tensor-parallel-size", ": PyLLM computes on one device, so leave it out."),
        ("--tensor_parallel_size=2", ": PyLLM computes on one device, so leave it out."),
        ("--ctx-size", ": use --max-model-len."),
        ("--trust-remote-code", ": no code of a checkpoint is ever run, so leave it out."),
        ("--quant", "; did you mean --quantization?"),
        ("--keyfile", "; did you mean --ssl-keyfile?"),
        ("--MAX_MODEL_LENGTH", "."),
        ("--lora-modules", "."),
        ("--reasoning-config", "."),
        ("--x", "."),
    ],
)
def test_an_unknown_flag_gets_the_right_hint_or_none(flag, says):
    with pytest.raises(ConfigError) as refused:
        load(ServerConfig, flag, "2")
    assert str(refused.value) == f"Unknown flag {flag.partition('=')[0].replace('_', '-')}{says}"


def test_help_shows_defaults_as_a_user_would_write_them(capsys):
    with pytest.raises(SystemExit):
        load(ServerConfig, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("before exiting (default: 0)", "--batch-dir (default: 10GB)", "listen on (default: 127.0.0.1)"):
        assert text in shown


def test_help_and_version_are_quick_and_complete():
    started = time.monotonic()
    assert "chat" in command("--help").stdout
    assert time.monotonic() - started < 2
    assert "--max-num-batched-tokens" in command("serve", "--help").stdout
    assert command("--version").stdout.startswith("pyllm ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sevre"], "use one of serve"),
        (["serv"], "did you mean serve?"),
        (["gen", "Hi"], "did you mean generate?"),
        (["org/model"], "as in: pyllm serve org/model"),
        (["completion", "sh"], "Name one shell: pyllm completion bash, zsh or fish."),
        (["serve", "--prot", "1"], "did you mean --port?"),
        (["generate"], "prompt is needed"),
        (["serve", "/no/such/folder", "--port", "0"], "/no/such/folder"),
        (["serve", "--host", "203.0.113.7", "--port", "0"], "Cannot listen on 203.0.113.7:0"),
    ],
)
def test_mistakes_end_with_code_2_and_one_sentence(arguments, words):
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_api_process_needs_no_torch():
    check = "import sys; import pyllm.server.serve, pyllm.server.cli.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
