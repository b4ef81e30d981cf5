"""Checks of one server that mostly wait, run at once; each of them is a test of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
from support.serving import ServerProcess

Check = Callable[[ServerProcess], None]


class Together:
    """Makes tests of checks, which get their outcomes from the fixture `outcomes`; see `run`."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def __call__(self, check: Check) -> Callable[[dict[str, Future[None]]], None]:
        """Make a test of a check; it must bear that the others use the server at the same time."""
        name = check.__name__
        self._checks[name] = check

        def test(outcomes: dict[str, Future[None]]) -> None:
            outcomes[name].result()

        test.__doc__ = check.__doc__
        return test

    def run(self, server: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Future[None]]:
        """Run those checks of the module of `request` that were selected, to their ends."""
        chosen = {getattr(item, "originalname", "") for item in request.session.items if item.path == request.path}
        checks = {name: check for name, check in self._checks.items() if name in chosen}
        with ThreadPoolExecutor(max(len(checks), 1)) as pool:
            outcomes = {name: pool.submit(check, server) for name, check in checks.items()}
            wait(outcomes.values())
        return outcomes
