"""The API process's end of the socket to the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from ..messages import LENGTH_BYTES, FromEngine, encode_frame

_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Pipe(asyncio.Protocol):
    """Calls `on_message` with each message from the engine as it arrives; what that raises closes the pipe."""

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self.on_message = on_message
        self.num_received = 0  # how often data has arrived
        # Done, with an exception or None, when no more messages can arrive.
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to write to."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        """Handle the messages that are complete by now."""
        self.num_received += 1
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
        """Note that the engine has closed its end."""
        self._transport = None
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or drop it if the engine has closed its end."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        """Close the socket and drop what is not sent yet."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
