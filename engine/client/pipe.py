"""Our end of the socket to the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from ..messages import LENGTH_BYTES, FromEngine, encode_frame

_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Pipe(asyncio.Protocol):
    """What the engine says is handed out as it arrives, without waking a task.

    Attributes:
        on_message: gets each message; whatever it raises ends the conversation.
        num_heard: how often something has come.
        ended: done, with that exception or None, when nothing will come any more.
    """

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self.on_message = on_message
        self.num_heard = 0
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what can be written to."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Hand out the messages that are whole by now."""
        self.num_heard += 1
        self._buffer += data
        start = 0
        try:
            while (body := start + LENGTH_BYTES) <= len(self._buffer):
                end = body + int.from_bytes(self._buffer[start:body], "little")
                if end > len(self._buffer):
                    break
                message = _decoder.decode(self._buffer[body:end])
                start = end
                self.on_message(message)
        except Exception as error:
            self._end(error)
            self.close()
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has closed."""
        self._transport = None
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def send(self, message: msgspec.Struct) -> None:
        """Write a message; nothing happens where the other side is gone."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        """Let go of the socket, whatever still waits to be sent."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
