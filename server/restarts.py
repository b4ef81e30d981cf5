"""Giving the server a new engine when its own has died, as often as `--restart-engine` allows."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from typing import TYPE_CHECKING

from ..engine.errors import EngineStartError

if TYPE_CHECKING:
    from .generation.served_model import ServedModel
    from .service import Service

logger = logging.getLogger("pyllm.server")

FIRST_PAUSE = 1.0
"""Seconds until the first restart; each further one comes after twice the time, and none after more than these:"""
LONGEST_PAUSE = 60.0
HEALTHY_SECONDS = 600.0
"""An engine that has served for so long has all its restarts again."""


class Restarts:
    """Counts the restarts of an engine.

    Args:
        most: how many there may be in a row.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._ready_since = time.monotonic()

    def next_pause(self) -> float | None:
        """Take one restart: how many seconds to wait before it; None if there are no more."""
        if self.used == self.most:
            return None
        self.used += 1
        return min(FIRST_PAUSE * 2.0 ** (self.used - 1), LONGEST_PAUSE)

    async def revive(self, service: Service, model: ServedModel) -> ServedModel | None:
        """Give `service` the model with a new engine, after that of `model` has died; None if it may not be.

        Requests are refused meanwhile. May be cancelled at any time.
        """
        if time.monotonic() - self._ready_since >= HEALTHY_SECONDS:
            self.used = 0
        service.restarting = "waiting" if self.used < self.most else ""
        await model.engine.shutdown(timeout=0.0)  # what it holds is free for its successor then
        reason = f"The engine has died: {model.engine.error}"
        while (pause := self.next_pause()) is not None:
            logger.error("%s It is started again in %g s (%d of %d).", reason, pause, self.used, self.most)
            service.restarting = "waiting"
            await asyncio.sleep(pause)
            service.restarting = "loading"
            try:
                engine = await model.engine.successor()
            except (EngineStartError, OSError) as error:  # OSError: there is no process to be had, or no memory for one
                reason = f"The engine does not start: {str(error).rstrip('.')}."
                continue
            self._ready_since = time.monotonic()
            model.metrics.follow(functools.partial(getattr, engine, "stats"))
            service.model = revived = dataclasses.replace(model, engine=engine)
            service.restarting = ""
            logger.info("The engine serves again.")
            return revived
        service.restarting = ""
        if self.used:
            logger.error("%s There are no restarts left.", reason)
        return None
