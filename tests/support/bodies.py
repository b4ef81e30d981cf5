"""A small request for each route that takes one."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "Hi"}
POSTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [USER], "max_tokens": 3, "temperature": 0},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "temperature": 0},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 3, "temperature": 0, "store": False},
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},
    "/v1/messages": {"model": "tiny", "messages": [USER], "max_tokens": 3, "temperature": 0},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [USER]},
    "/tokenize": {"model": "tiny", "prompt": "Hi"},
    "/detokenize": {"model": "tiny", "tokens": [40, 41]},
}
"""Each route that takes a body, with a small body that it serves."""
