"""One server for the whole run, and the clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from support.checkpoints import TINY, write_checkpoint
from support.client_environments import UnavailableError, node_environment
from support.components import missing
from support.dialogues import FOLDER, FORMS
from support.reasoning_client import Reasoner
from support.serving import PATIENCE, ServerProcess

from pyllm.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from support.chat_page import Visit

FLAGS = ("--dtype", "float32", "--max-num-batched-tokens", "64", "--max-num-seqs", "24")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint with a context so long that a request lasts until the test is done with it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    write_checkpoint(folder, seed=7, config=replace(TINY, max_position_embeddings=8192))
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose steps are so small that prompts are cut in chunks and mixed with decodes."""
    log = tmp_path_factory.mktemp("server") / "log"
    names = ("--served-model-name", "tiny", "--served-model-name", "team/alias")
    with ServerProcess(log, str(checkpoint), *FLAGS, *names, cold=True) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
async def async_client(server: ServerProcess, anyio_backend: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`pyllm serve`, with no model named."""
    with ServerProcess(tmp_path_factory.mktemp("demo") / "log", cold=True) as process:
        yield process


@pytest.fixture(scope="session", params=FORMS, ids=lambda form: form.name)
def reasoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reasoner]:
    """A small model that was trained to reason, in each chat form of the TR-Hash line."""
    log, folder = tmp_path_factory.mktemp("reasoner") / "log", FOLDER / request.param.name
    with ServerProcess(log, str(folder), "--dtype", "float32", "--served-model-name", "reasoner") as process:
        yield Reasoner(request.param, Tokenizer.from_folder(folder), process)


KEY = "open sesame"


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind a key."""
    with ServerProcess(tmp_path_factory.mktemp("guarded") / "log", "--api-key", KEY) as process:
        yield process


@pytest.fixture(scope="module")  # while it is open, no other test can run an event loop in this thread
def browser() -> Iterator[Browser]:
    from support.chat_page import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def axe() -> Path:
    try:
        return node_environment("axe", timeout=120) / "node_modules" / "axe-core" / "axe.min.js"
    except UnavailableError as error:
        missing(str(error)[-300:])


@pytest.fixture
def visit(browser: Browser, guarded: ServerProcess) -> Iterator[Visit]:
    """The page of the demo; afterwards, nothing may have been asked of others, nor anything have gone wrong unseen."""
    from support.chat_page import SCRIPTED, Visit

    with browser.new_context() as context:
        context.add_init_script(SCRIPTED)
        made = Visit(context.new_page(), guarded.url)
        yield made
    assert made.urls
    assert not [url for url in made.urls if not url.startswith((guarded.url, "data:", "blob:"))]
    # A browser counts every answer of 400 and above as an error of the page.
    assert not [text for text in made.complaints if "status of 401" not in text]


@pytest.fixture
def signed_in(visit: Visit) -> Visit:
    visit.open().use_key(KEY)
    visit.wait_for_model()  # so that its requests are over
    return visit
