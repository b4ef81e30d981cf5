"""Environments of the clients that the tests try, made once from tests/clients/versions.toml and then kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

PINS = tomllib.loads((Path(__file__).parents[1] / "clients" / "versions.toml").read_text(encoding="utf-8"))


class UnavailableError(Exception):
    """A client cannot be installed here."""


def python_environment(name: str) -> Path:
    """A virtual environment that has the packages."""
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    folder = _folder("python", name)
    python = folder / "bin" / "python"
    return _made(
        folder, [[sys.executable, "-m", "venv", str(folder)], [str(python), *pip, *PINS["python"][name]]], timeout=1800
    )


def node_environment(name: str, timeout: float = 900) -> Path:
    """A folder whose `node_modules` has the packages."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise UnavailableError("node and npm are not installed")
    command = [npm, "install", "--no-package-lock", "--no-save", "--no-audit", "--no-fund", *PINS["node"][name]]
    return _made(_folder("node", name), [command], timeout)


def _folder(language: str, name: str) -> Path:
    """Named by its content, so that a changed version gets a new environment."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(repr((sys.version_info[:2], PINS[language][name])).encode()).hexdigest()[:8]
    return home / "pyllm-tests" / f"{language}-{name}-{digest}"


def _made(folder: Path, commands: list[list[str]], timeout: float) -> Path:
    """The folder, after commands that fill it, which run only the first time."""
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for command in commands:
            try:
                subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=True)
            except subprocess.TimeoutExpired:
                raise UnavailableError(f"{command} took longer than {timeout} s") from None
            except subprocess.CalledProcessError as error:
                raise UnavailableError(f"{command}: {(error.stderr or error.stdout)[-2000:]}") from None
        done.touch()
    return folder


def version(client: str) -> str:
    """The pinned version of a package."""
    for requirement in (r for group in PINS.values() for packages in group.values() for r in packages):
        name, _, pinned = requirement.rpartition("@") if "==" not in requirement else requirement.partition("==")
        if name.partition("[")[0] == client:
            return pinned
    raise KeyError(client)
