"""A router's side of the KV cache's events, written from the frames that vLLM documents and not from our encoder."""

from __future__ import annotations

from typing import Any

import msgspec

END = b"\xff" * 8
SHAPES = {"BlockStored": (8, 9), "BlockRemoved": (3, 3), "AllBlocksCleared": (1, 1)}
"""The fewest and the most items of each event."""


class CacheView:
    """What a router knows of one cache.

    Attributes:
        prefixes: the salt and all tokens up to the end of each cached block, by the block's hash; None if the blocks
            before it are not known.
        last: the number of the last message.
        restarts: how many times all blocks were cleared.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.prefixes: dict[int, tuple[str | None, list[int]] | None] = {}
        self.last = -1
        self.restarts = 0

    def receive(self, frames: list[bytes], topic: bytes) -> None:
        """Take a message of the publisher, or of a replay."""
        name, number, payload = frames
        assert (name, len(number)) == (topic, 8)
        self.last = int.from_bytes(number, "big")
        moment, events, rank = msgspec.msgpack.decode(payload)
        assert isinstance(moment, float)
        assert rank == 0
        self.apply(events)

    def apply(self, events: list[list[Any]]) -> None:
        """Follow the events of a step."""
        assert events
        for event in events:
            fewest, most = SHAPES[event[0]]
            assert fewest <= len(event) <= most
            if event[0] == "BlockStored":
                self._store(*event[1:])
            elif event[0] == "BlockRemoved":
                for block in event[1]:
                    del self.prefixes[block]
            else:
                self.prefixes.clear()
                self.restarts += 1

    def _store(
        self, blocks: list[int], parent: int | None, tokens: list[int], size: int, lora_id: None, medium: str,
        lora_name: None, extra: list[list[str] | None] | None = None,
    ) -> None:  # fmt: skip
        assert (size, lora_id, medium, lora_name) == (self.block_size, None, "CPU", None)
        assert len(tokens) == size * len(blocks)
        before = (None, []) if parent is None else self.prefixes.get(parent)
        for place, block in enumerate(blocks):
            assert 0 <= block < 2**64
            assert block not in self.prefixes, "what is cached is not stored again"
            if before is not None:
                salt = extra[place] if extra is not None else None
                before = (salt[0] if salt else before[0]), [*before[1], *tokens[place * size : (place + 1) * size]]
            self.prefixes[block] = before

    def num_cached(self, tokens: list[int], salt: str | None = None) -> int:
        """How many tokens of a prompt the engine must find in its cache, which are never all of them."""
        known = {(prefix[0], tuple(prefix[1])) for prefix in self.prefixes.values() if prefix is not None}
        count = 0
        while count + self.block_size < len(tokens) and (salt, tuple(tokens[: count + self.block_size])) in known:
            count += self.block_size
        return count
