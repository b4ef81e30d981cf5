"""What is left of a request that has ended, before any garbage is collected."""

from __future__ import annotations

import gc

from pyllm.server.generation.generation import Generation


def test_a_generation_is_freed_with_its_request(harness):
    """It may hold millions of log-probabilities, and collections of old garbage are rare."""
    gc.collect()
    gc.disable()
    try:
        assert harness.complete(max_tokens=3, logprobs=2).status_code == 200
        assert not [one for one in gc.get_objects() if type(one) is Generation]
    finally:
        gc.enable()
