"""Responses for HTTP/1.0 clients, which do not know chunks."""

from __future__ import annotations

import sys

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


async def answer_without_chunks(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run `app` for an HTTP/1.0 client: a response of unknown length ends when the connection closes."""
    is_delimited = True

    async def send_unchunked(message: Message) -> None:
        nonlocal is_delimited
        while cycle.flow.write_paused and not cycle.disconnected:  # wait now, so that the length is still right below
            await cycle.flow.drain()
        if message["type"] == "http.response.start":
            is_delimited = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if is_delimited else False
        elif not is_delimited:  # uvicorn subtracts the piece, and compares the rest at the end
            cycle.expected_content_length = sys.maxsize if message.get("more_body") else len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_unchunked)
