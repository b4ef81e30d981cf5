"""Java's own HTTP client: each method of `java/Client.java` is one test. Skipped where there is no Java compiler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.components import missing
from support.serving import PATIENCE, ServerProcess, environment

SOURCE = Path(__file__).parent / "java" / "Client.java"
METHODS = re.findall(r"^    static void (\w+)\(\) ", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def java_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled client."""
    folder = tmp_path_factory.mktemp("java")
    command = ["javac", "--release", "17", "-Xlint:all", "-Werror", "-d", str(folder), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if "release version 17 not supported" in done.stderr:
        missing("the Java compiler is older than 17")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_java_client(java_client: Path, server: ServerProcess, method: str) -> None:
    said = len(server.settled_log())
    command = ["java", "-cp", str(java_client), "Client", server.url, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    server.wait_until_idle()
    assert "WARNING" not in server.settled_log()[said:]
