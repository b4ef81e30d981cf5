"""Java's own HTTP client: each method of `java/Client.java` is one test. Skipped where there is no Java compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.serving import PATIENCE, ServerProcess, environment

SOURCE = Path(__file__).parent / "java" / "Client.java"
METHODS = re.findall(r"^    static void (\w+)\(\) ", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled client."""
    java, compiler = shutil.which("java"), shutil.which("javac")
    if java is None or compiler is None:
        pytest.skip("java and javac are not installed")
    folder = tmp_path_factory.mktemp("java")
    command = [compiler, "--release", "17", "-Xlint:all", "-Werror", "-d", str(folder), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if "release version 17 not supported" in done.stderr:
        pytest.skip("the Java compiler is older than 17")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_java_client(compiled: Path, server: ServerProcess, method: str) -> None:
    said = len(server.settled_log())
    command = [shutil.which("java") or "java", "-cp", str(compiled), "Client", server.url, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    server.wait_until_idle()
    assert "WARNING" not in server.settled_log()[said:]
