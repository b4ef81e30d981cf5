"""Replace a dead engine, as many times as `--restart-engine` allows."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time

from ..engine.errors import EngineStartError
from .chat.served_model import ServedModel
from .service import Service

logger = logging.getLogger("pyllm.server")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart: they double from the first to the longest
HEALTHY_SECONDS = 600.0  # without a failure, after which all restarts are available again


class Restarts:
    """Restarts an engine at most `limit` times in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._ready_since = time.monotonic()

    def next_pause(self) -> float | None:
        """Use one restart; return the seconds to wait before it, or None if no restarts are left."""
        if self.used == self.limit:
            return None
        self.used += 1
        return min(FIRST_PAUSE * 2.0 ** (self.used - 1), LONGEST_PAUSE)

    async def supervise(self, service: Service, model: ServedModel) -> None:
        """Restart the engine whenever it dies; return when no restarts are left."""
        current: ServedModel | None = model
        while current is not None:
            await current.engine.wait_dead()
            current = await self.revive(service, current)

    async def revive(self, service: Service, model: ServedModel) -> ServedModel | None:
        """Give `service` the model with a new engine, and refuse requests meanwhile; return None if it cannot start.

        May be cancelled at any time.
        """
        if time.monotonic() - self._ready_since >= HEALTHY_SECONDS:
            self.used = 0
        service.restarting = "waiting" if self.used < self.limit else ""
        await model.engine.shutdown(timeout=0.0)  # frees its memory for the new engine
        reason = f"The engine has died: {model.engine.error}"
        while (pause := self.next_pause()) is not None:
            logger.error("%s Restarting it in %g s (%d of %d).", reason, pause, self.used, self.limit)
            service.restarting = "waiting"
            await asyncio.sleep(pause)
            service.restarting = "loading"
            try:
                engine = await model.engine.successor()
            except (EngineStartError, OSError) as error:  # OSError: no process or memory is available
                reason = f"The engine failed to start: {str(error).rstrip('.')}."
                continue
            self._ready_since = time.monotonic()
            model.metrics.follow(functools.partial(getattr, engine, "stats"), engine.info.config)
            service.model = revived = dataclasses.replace(model, engine=engine)
            service.restarting = ""
            logger.info("The engine is serving again.")
            return revived
        service.restarting = ""
        if self.used:
            logger.error("%s No restarts are left.", reason)
        return None
