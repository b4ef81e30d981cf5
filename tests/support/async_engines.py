"""Clients of real engine processes that compute a tiny checkpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from pyllm import SamplingParams
from pyllm.engine.client.async_engine import AsyncEngine
from pyllm.engine.client.output_processor import RequestOutput, RequestStream
from pyllm.engine.config import EngineConfig
from pyllm.model.tokenizer import Tokenizer

ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


def config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", device="cpu", quiet=True, num_kv_blocks=200)


async def start(folder: Path) -> AsyncEngine:
    return await AsyncEngine.start(config(folder), Tokenizer.from_folder(folder))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]
