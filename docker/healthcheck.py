"""The image's health check: ask /health of the `pyllm serve` that runs here, wherever its flags let it listen.

python healthcheck.py [PID]    # exit code 0 if it is healthy; PID: of this process only
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

from pyllm.server.arguments import load_config
from pyllm.server.flags import ServerConfig

SECONDS = 4.0


def served(pids: list[int]) -> ServerConfig:
    """Return the flags of the first of these processes that is `pyllm serve`, or starts it, as `docker-init` does."""
    for process in (Path("/proc", str(pid)) for pid in pids):
        words = (process / "cmdline").read_text(errors="surrogateescape").split("\0")[:-1]
        pairs = list(pairwise(words))
        places = [n for n, (word, command) in enumerate(pairs) if word.endswith("pyllm") and command == "serve"]
        if places:
            lines = (process / "environ").read_text(errors="surrogateescape").split("\0")
            variables = dict(line.partition("=")[::2] for line in lines)
            os.chdir(process / "cwd")
            return load_config(ServerConfig, words[places[0] + 2 :], variables, program="pyllm serve", description="")
    raise SystemExit("There is no `pyllm serve` here.")


def status(config: ServerConfig) -> int:
    """Return the HTTP status of /health."""
    if config.uds:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(SECONDS)
        connection.connect(config.uds)
    else:  # Linux takes 0.0.0.0 and :: for this machine
        connection = socket.create_connection((config.host, config.port), timeout=SECONDS)
    if config.ssl_certfile:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is this machine, by another name
        connection = context.wrap_socket(connection)
    client = HTTPConnection("localhost")
    client.sock = connection
    client.request("GET", "/health")
    return client.getresponse().status


if __name__ == "__main__":
    running = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    found = status(served([int(pid) for pid in sys.argv[1:]] or running))
    sys.exit(0 if found == 200 else f"/health answered {found}.")
