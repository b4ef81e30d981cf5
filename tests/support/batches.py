"""A client of a harness with a store of files and batches, and a worker that runs while the client works."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

from pyllm.server.api.batches.store import BatchStore
from pyllm.server.api.batches.wire import BatchObject
from pyllm.server.api.batches.worker import BatchWorker
from pyllm.server.http.keys import KeyRing

COMPLETIONS = "/v1/completions"
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


def line(custom_id="a", url=COMPLETIONS, method="POST", **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": {"prompt": "Hi"} | body})


class Batches:
    """A harness whose store is in a folder."""

    def __init__(self, harness, folder, max_bytes=10**7, concurrency=2, shared=False):
        self.harness = harness
        self.store = BatchStore(folder, max_bytes, shared=shared)
        harness.service.batches = self.store
        harness.service.keys = KeyRing(harness.service.config.api_key, None, self.store.secret)
        self.concurrency = concurrency

    def close(self):
        os.close(self.store._lock)

    def run(self, work, *, works=True):
        async def main(client):
            worker = BatchWorker(self.store, self.harness.app, self.concurrency, lambda: True)
            task = asyncio.ensure_future(worker.run()) if works else None
            try:
                return await work(client)
            finally:
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

        return self.harness.run(main)

    def upload(self, *lines, purpose="batch", **options):
        data = "\n".join(lines)
        return self.run(lambda client: post_file(client, data, purpose=purpose, **options), works=False)

    def batch(self, *lines, endpoint=COMPLETIONS, **fields):
        """Run a whole batch; return it and its rows by `custom_id`."""

        async def work(client):
            batch = await make_batch(client, *lines, endpoint=endpoint, **fields)
            return await ended(client, batch["id"])

        return self.run(work)


async def post_file(client, data, purpose="batch", headers=None, **fields):
    return await client.post(
        "/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": purpose} | fields, headers=headers
    )


async def make_batch(client, *lines, headers=None, **fields):
    file = (await post_file(client, "\n".join(lines), headers=headers)).json()
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"} | fields
    return (await client.post("/v1/batches", json=body, headers=headers)).json()


async def until(condition):
    while True:
        if found := condition():
            return found
        await asyncio.sleep(0.01)


async def ended(client, batch_id, headers=None):
    while True:
        batch = (await client.get(f"/v1/batches/{batch_id}", headers=headers)).json()
        if batch["status"] not in UNFINISHED:
            break
        await asyncio.sleep(0.02)
    BatchObject.model_validate(batch)
    rows = {}
    for name in ("output_file_id", "error_file_id"):
        if batch[name]:
            content = (await client.get(f"/v1/files/{batch[name]}/content", headers=headers)).text
            assert content.endswith("\n")
            rows |= {row["custom_id"]: row for row in map(json.loads, content.splitlines())}
    return batch, rows
