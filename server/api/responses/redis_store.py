"""Stored responses in Redis, which servers on several machines share.

    response:ID    hash: the owner, the client, the sizes of its parts, the ids of its output items, the data
    item:ID        the response of an output item
    used:CLIENT    sorted set of the client's entries, by the time of their last use; an entry is SIZE:ID
    ends           sorted set of ENTRY:CLIENT by the time when it is deleted
    counts, sizes  sorted sets of clients by the number and the bytes of their responses
    size           bytes of all responses

Each operation is one script, so it is done whole or not at all. The sets count what Redis deletes by itself (because
its time is over) until a server purges it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

from ...flags import ConfigError
from .store import Bounds, Caller, Packed, ResponseStore, StoredResponse

PREFIX = "{pyllm}:1:"  # in a cluster, keys with the same text in braces are on the same node
MAX_CONNECTIONS = 16
NETWORK_SECONDS = 2.0  # to connect, and to wait for each answer
COMMON = """
local P = KEYS[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6

-- Count `change` more bytes of a client, after its entries have changed.
local function weigh(client, change)
  local count = redis.call('ZCARD', P .. 'used:' .. client)
  redis.call('INCRBY', P .. 'size', change)
  if count == 0 then
    redis.call('ZREM', P .. 'counts', client)
    redis.call('ZREM', P .. 'sizes', client)
  else
    -- Of clients with the same count, the least recently used comes first.
    local used = redis.call('ZRANGE', P .. 'used:' .. client, -1, -1, 'WITHSCORES')[2]
    redis.call('ZADD', P .. 'counts', count + 1 - used / 2^33, client)
    redis.call('ZINCRBY', P .. 'sizes', change, client)
  end
end

local function drop(entry, client)
  local size, id = string.match(entry, '^(%d+):(.*)$')
  local items = redis.call('HGET', P .. 'response:' .. id, 'items')
  for item in string.gmatch(items or '', '%S+') do redis.call('DEL', P .. 'item:' .. item) end
  redis.call('DEL', P .. 'response:' .. id)
  redis.call('ZREM', P .. 'ends', entry .. ':' .. client)
  redis.call('ZREM', P .. 'used:' .. client, entry)
  weigh(client, -size)
end

local function purge()
  for _, found in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ends', '-inf', now, 'LIMIT', 0, 1000)) do
    drop(string.match(found, '^(%d+:[^:]*):(.*)$'))
  end
end

local function find(id, owner)
  local found = redis.call('HMGET', P .. 'response:' .. id, 'owner', 'client', 'sizes', 'size')
  if found[1] ~= owner then return false end
  return {entry = found[4] .. ':' .. id, client = found[2], sizes = found[3]}
end

local function use(id, owner)
  local found = find(id, owner)
  if not found then return false end
  redis.call('ZADD', P .. 'used:' .. found.client, 'XX', now, found.entry)
  weigh(found.client, 0)
  return {id, found.sizes}
end
"""
SCRIPTS = {
    "put": """
local id, owner, client, items, sizes, data = unpack(ARGV, 1, 6)
local ttl, most, most_bytes = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local key, entry = P .. 'response:' .. id, #data .. ':' .. id

-- The client that has the most loses its least recently used response.
local function evict(measure)
  local top = redis.call('ZREVRANGE', P .. measure, 0, 1, 'WITHSCORES')
  local loser = top[1]
  if loser == client and top[2] == top[4] then loser = top[3] end
  local entry = loser and redis.call('ZRANGE', P .. 'used:' .. loser, 0, 0)[1]
  if entry then drop(entry, loser) end  -- else Redis itself has evicted one of the sets
end

purge()
if redis.call('EXISTS', key) == 1 then return end  -- the client tries again, and did not read the first answer
redis.call('HSET', key, 'owner', owner, 'client', client, 'items', items, 'sizes', sizes, 'size', #data, 'data', data)
for item in string.gmatch(items, '%S+') do
  redis.call('SET', P .. 'item:' .. item, id)
  if ttl > 0 then redis.call('EXPIRE', P .. 'item:' .. item, ttl) end
end
if ttl > 0 then redis.call('EXPIRE', key, ttl) end
redis.call('ZADD', P .. 'ends', ttl > 0 and now + ttl or '+inf', entry .. ':' .. client)
redis.call('ZADD', P .. 'used:' .. client, now, entry)
weigh(client, #data)
for _ = 1, 1000 do
  if redis.call('ZCARD', P .. 'ends') > most then evict('counts')
  elseif tonumber(redis.call('GET', P .. 'size')) > most_bytes then evict('sizes')
  else break end
end
""",
    "find": "return use(ARGV[1], ARGV[2])",
    "find_holders": """
local found = {}
for n = 2, #ARGV do
  local id = redis.call('GET', P .. 'item:' .. ARGV[n])
  found[n - 1] = id and use(id, ARGV[1])
end
return found
""",
    "read": "return find(ARGV[1], ARGV[2]) and redis.call('HGET', P .. 'response:' .. ARGV[1], 'data')",
    "remove": """
local found = find(ARGV[1], ARGV[2])
if found then drop(found.entry, found.client) end
return found and 1 or 0
""",
    "purge": "purge()",
    "count": "return {redis.call('ZCARD', P .. 'ends'), tonumber(redis.call('GET', P .. 'size') or 0)}",
    "probe": "redis.call('SET', P .. 'probe', 1, 'EX', 60)",
}


class RedisStore(ResponseStore):
    """Responses in one Redis or Valkey database."""

    def __init__(self, name: str, bounds: Bounds, *, tls: bool = False, **options: Any) -> None:
        """`options` are those of a connection; raises `ConfigError` without the package."""
        super().__init__(name, bounds)
        try:
            redis: Any = importlib.import_module("redis.asyncio")
            retry: Any = importlib.import_module("redis.asyncio.retry")
            backoff: Any = importlib.import_module("redis.backoff")
        except ImportError:
            message = "--response-store with Redis needs the package redis: pip install 'pyllm-deep[redis]'."
            raise ConfigError(message) from None
        self.failures = (redis.RedisError, OSError)
        self._errors = redis
        # Connections that a restart of Redis has broken are found by using them.
        once = retry.Retry(backoff.NoBackoff(), 1, (redis.ConnectionError,))
        pool = redis.BlockingConnectionPool(
            max_connections=MAX_CONNECTIONS, timeout=NETWORK_SECONDS, socket_timeout=NETWORK_SECONDS,
            socket_connect_timeout=NETWORK_SECONDS, socket_keepalive=True, protocol=2, retry=once,
            connection_class=redis.SSLConnection if tls else redis.Connection, **options,
        )  # fmt: skip
        self._client = redis.Redis.from_pool(pool)
        self._scripts = {name: self._client.register_script(COMMON + text) for name, text in SCRIPTS.items()}

    async def open(self) -> None:
        """Try to connect; raise `ConfigError` if Redis refuses the password, the database or our commands."""
        try:
            await self._run("probe")
        except self.failures as error:
            # Its subclasses say that Redis is out of memory, read-only or still loading, which will pass.
            if isinstance(error, self._errors.AuthenticationError) or type(error) is self._errors.ResponseError:
                message = f"--response-store: {self.name} refuses this server: {str(error).rstrip('.')}."
                raise ConfigError(message) from None
            self.note_failure(error)

    async def close(self) -> None:
        """Close the connections."""
        with contextlib.suppress(*self.failures):
            await self._client.aclose()

    async def _run(self, script: str, *args: str | int | bytes) -> Any:
        return await self._scripts[script](keys=[PREFIX], args=args)

    async def _put(self, packed: Packed, caller: Caller) -> None:
        sizes, bounds = " ".join(map(str, packed.sizes)), self.bounds
        kept = (packed.id, caller.owner, caller.client, " ".join(packed.item_ids), sizes, packed.data)
        await self._run("put", *kept, bounds.seconds, bounds.max_responses, bounds.max_bytes)

    async def _find(self, response_id: str, caller: Caller) -> StoredResponse | None:
        return _stored(await self._run("find", response_id, caller.owner), caller.owner)

    async def _find_holders(self, item_ids: Sequence[str], caller: Caller) -> dict[str, StoredResponse]:
        answer = await self._run("find_holders", caller.owner, *item_ids)
        found = {item_id: _stored(one, caller.owner) for item_id, one in zip(item_ids, answer, strict=True)}
        return {item_id: stored for item_id, stored in found.items() if stored is not None}

    async def _read(self, stored: StoredResponse) -> bytes | None:
        data: bytes | None = await self._run("read", stored.id, stored.owner)
        return data

    async def _remove(self, response_id: str, caller: Caller) -> bool:
        return bool(await self._run("remove", response_id, caller.owner))

    async def _purge(self) -> None:
        await self._run("purge")

    async def _count(self) -> tuple[int, int]:
        count, size = await self._run("count")
        return count, size

    async def _probe(self) -> None:
        await self._run("probe")


def _stored(found: tuple[bytes, bytes] | None, owner: str) -> StoredResponse | None:
    if found is None:
        return None
    response, input_, output = map(int, found[1].split())
    return StoredResponse(found[0].decode(), owner, (response, input_, output))
