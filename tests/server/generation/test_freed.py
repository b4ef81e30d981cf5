"""What is left of a request that has ended, before any garbage is collected."""

from __future__ import annotations

import gc
import json
import tracemalloc

import pytest
from support.serving import wait_for

from pyllm.server.generation.generation import Generation

pytestmark = pytest.mark.usefixtures("settled")
LONG = [*range(1000, 20_000)]


def test_a_generation_is_freed_with_its_request(harness):
    """It may hold millions of log-probabilities, and collections of old garbage are rare."""
    gc.collect()
    gc.disable()
    try:
        assert harness.complete(max_tokens=3, logprobs=2).status_code == 200
        assert not [one for one in gc.get_objects() if type(one) is Generation]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": LONG, "n": "x"}),
        ("/v1/completions", {"prompt": LONG, "suffix": "x"}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", {"messages": LONG}),
        ("/v1/embeddings", {"input": LONG}),
        ("/v1/responses", {"input": "x", "metadata": {"x": LONG}}),
        ("/v1/messages", {"messages": LONG}),
        ("/detokenize", {"tokens": [*LONG, 10**6]}),
        ("/v1/models", {"prompt": LONG}),
    ],
)
def test_a_refused_body_is_freed_with_its_request(harness, path, fields):
    content = json.dumps(fields).encode()
    assert harness.post(path, content=content).status_code in (400, 405)  # loads what is needed first
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        harness.post(path, content=content)
        # The thread that has read it forgets it a moment later. As a list of integers, it takes 680,000 bytes.
        wait_for(lambda: tracemalloc.get_traced_memory()[0] < 300_000, "the body to be freed", seconds=10)
    finally:
        tracemalloc.stop()
        gc.enable()
