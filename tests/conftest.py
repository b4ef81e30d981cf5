"""What many tests share: the published fixtures where they are present, and checkpoints made on the spot."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest

gc.disable()  # until all is imported: the garbage collector would scan it again and again

# Before they are imported:
SUPPORT = (
    "async_engines", "batches", "chat_page", "closeness", "crowds", "grammars", "hash_engine", "hostile",
    "paged_runner", "reasoning_client", "response_stores", "responses_client", "scheduler_bench", "serving", "soak",
    "warm",
)  # fmt: skip
pytest.register_assert_rewrite(*(f"support.{name}" for name in SUPPORT))

import torch  # noqa: E402
from support import components  # noqa: E402
from support.checkpoints import write_checkpoint  # noqa: E402
from support.response_stores import STORES, Redis  # noqa: E402

# What the processes that tests start have compiled is kept for the next ones, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell has these ignored by what it runs in the background or under nohup, and so by all that tests would start.
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at its first import

ROOT = Path(__file__).resolve().parents[1]
LINES = ("golden", "golden-tr-hash")
"""The folders of published fixtures: the line with dynamics, and the TR-Hash line."""


def golden_folders(line: str) -> list[Path]:
    folder = ROOT.parent / "shared" / line
    return sorted(folder.iterdir()) if folder.is_dir() else []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(components.OPTION, action="store_true", help="fail, instead of skip, tests that lack a program")


def pytest_configure(config: pytest.Config) -> None:
    components.require(config.getoption(components.OPTION))


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    components.check(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the tests of each component came to, if all are required."""
    if config.getoption(components.OPTION):
        for line in components.table(terminalreporter.stats):
            terminalreporter.write_line(line)


def pytest_collection_finish() -> None:
    """Leave what is loaded to the end out of all garbage collections."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files of the upper folders first: the slowest of them, if it came last, would occupy one worker alone."""
    components.mark(items)
    items.sort(key=lambda item: len(item.path.parts))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument `golden` once for each published fixture; without them it does not exist here."""
    if "golden" in metafunc.fixturenames:
        if folders := [folder for line in LINES for folder in golden_folders(line)]:
            metafunc.parametrize("golden", folders, ids=[folder.name for folder in folders])
        else:
            reason = "the published fixtures are not next to this checkout; the tests on made checkpoints cover it"
            metafunc.parametrize("golden", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random v0.13 checkpoint with every feature and a byte-level tokenizer; made, not stored."""
    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    write_checkpoint(folder, seed=7)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Each client reads all of the machine's certificate authorities, for tens of milliseconds; here none is asked.
    first, end, _ = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----")
    path = tmp_path_factory.mktemp("authorities") / "one.pem"
    path.write_text(first + end + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(path))
        yield


@pytest.fixture(scope="module")
def settled() -> None:
    """Leave what earlier tests have loaded out of this module's garbage collections: late in a run, each takes 1 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    # Tiny matrices: a second thread only adds noise on a small machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One Redis for the whole run."""
    with Redis(tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind, for `--response-store`."""
    if request.param == "memory":
        return "memory"
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/responses.db"
    found: Redis = request.getfixturevalue("redis")
    assert found.ask("FLUSHALL") == "+OK"
    return found.url


@pytest.fixture(scope="session")
def https_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("pair")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate
