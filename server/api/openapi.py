"""The OpenAPI document: FastAPI's, with groups, a description of every field, and requests that work unchanged."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .descriptions import DESCRIPTIONS

REFERENCE = "#/components/schemas/{model}"
ABOUT = """\
PyLLM serves one language model to clients of OpenAI's API, of vLLM's extensions of it, and of Anthropic's Messages API.

- **Base URL**: this server's address and `/v1`.
- **Key**: if the server has keys, send one as `Authorization: Bearer KEY` (or `x-api-key: KEY`). *Authorize* does so
  for this page.
- **Errors** have the status 4xx or 5xx and one shape: `{"error": {"message", "type", "param", "code"}}`.
- **Fields**: null means the default. A field that this server does not know, and that would change the answer, is a
  400. A hint without effect is accepted, and the header `x-pyllm-ignored` names it.
- **Streams** are server-sent events.
- **The same request gets the same answer** if it is greedy or seeded, streamed or not, however busy the server is.
"""


class Group(NamedTuple):
    """A group of routes."""

    name: str
    description: str
    paths: tuple[str, ...]  # how they begin


GROUPS = (
    Group("Chat", "Answer a conversation, in OpenAI's shape.", ("/v1/chat",)),
    Group("Responses", "Answer items and keep the conversation, in OpenAI's newer shape.", ("/v1/responses",)),
    Group("Messages", "Answer a conversation, in Anthropic's shape.", ("/v1/messages",)),
    Group("Completions", "Continue a text.", ("/v1/completions",)),
    Group("Embeddings", "Turn texts into vectors.", ("/v1/embeddings",)),
    Group("Tokens", "Turn text into token ids and back.", ("/tokenize", "/detokenize", "/tokenizer_info")),
    Group("Models", "What this server serves.", ("/v1/models",)),
    Group(
        "Files and batches", "Many requests in one file, answered while the server has room.",
        ("/v1/files", "/v1/batches"),
    ),
    Group(
        "Server", "Whether the server is alive, what it can take, and its metrics.",
        ("/health", "/ready", "/ping", "/is_sleeping", "/version", "/server_info", "/get_model_info", "/metrics"),
    ),
)  # fmt: skip
BATCHES_OFF = "**Off on this server**: start it with `--batch-dir FOLDER`."

# The page replaces each of these three with the last id of its kind that it has seen.
PLACEHOLDERS = {
    "/{name}": "dummy",
    "/{file_id}": "file-example",
    "/{batch_id}": "batch_example",
    "/{response_id}": "resp_example",
}

CAPITAL = {"role": "user", "content": "What is the capital of Italy?"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
}
FUNCTION = {"name": "weather", "description": "The weather of the next days.", "parameters": WEATHER}
FORECAST = {"role": "user", "content": "How will the weather be in Rome?"}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
}
CHAT = {"messages": [CAPITAL], "max_tokens": 64, "temperature": 0}
LINE = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "A question": CHAT,
        "A stream": CHAT | {"stream": True, "stream_options": {"include_usage": True}},
        "JSON that satisfies a schema": {
            "messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        },
        "A call of a function": {
            "messages": [FORECAST], "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required",
            "parallel_tool_calls": False, "max_tokens": 64,
        },
        "The network's dynamics": CHAT | {"max_tokens": 4, "return_dynamics": True},
    },
    "/v1/responses": {
        "A question": {"input": "What is the capital of Italy?", "max_output_tokens": 64, "temperature": 0},
        "A stream": {"input": "What is 7+5?", "instructions": "Be brief.", "max_output_tokens": 64, "stream": True},
        "A call of a function": {
            "input": FORECAST["content"], "tools": [{"type": "function"} | FUNCTION], "tool_choice": "required",
            "max_output_tokens": 64,
        },
    },
    "/v1/messages": {
        "A question": {"model": "dummy", "messages": [CAPITAL], "max_tokens": 64, "temperature": 0},
        "A stream": {
            "model": "dummy", "system": "Be brief.", "messages": [CAPITAL], "max_tokens": 64, "stream": True,
        },
    },
    "/v1/messages/count_tokens": {"A question": {"model": "dummy", "messages": [CAPITAL]}},
    "/v1/completions": {
        "A text": {"prompt": "The capital of Italy is", "max_tokens": 8, "temperature": 0},
        "Log-probabilities of a text": {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1},
        "One of several words": {
            "prompt": "The capital of Italy is", "structured_outputs": {"choice": ["Paris", "Rome"]}, "temperature": 0,
        },
    },
    "/v1/embeddings": {"Two texts": {"input": ["red", "green"]}},
    "/tokenize": {
        "A text": {"prompt": "Hello!", "return_token_strs": True},
        "A conversation": {"messages": [CAPITAL]},
    },
    "/detokenize": {"Three tokens": {"tokens": [40, 41, 42]}},
    "/v1/files": {"Lines of a batch": {"purpose": "batch", "file": json.dumps(LINE) + "\n"}},
    "/v1/batches": {
        "Answer a file": {
            "input_file_id": PLACEHOLDERS["/{file_id}"], "endpoint": LINE["url"], "completion_window": "24h",
        },
    },
}  # fmt: skip
"""For each route that takes a body, example requests by title."""


def write_document(app: FastAPI, models: set[type[BaseModel]], *, with_batches: bool) -> dict[str, Any]:
    """Return the document of all routes, with the schemas of `models`, which FastAPI does not know."""
    document = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, extra = models_json_schema([(model, "validation") for model in ordered], ref_template=REFERENCE)
    schemas = document["components"]["schemas"]
    schemas |= extra["$defs"]
    for model, schema in schemas.items():
        _describe_fields(schema, model)
    document["paths"] = dict(sorted(document["paths"].items(), key=lambda item: (_place(item[0]), len(item[0]))))
    for path, item in document["paths"].items():
        for operation in item.values():
            operation["tags"] = [GROUPS[_place(path)[0]].name]
            _complete(operation, path)
    document["tags"] = [{"name": group.name, "description": group.description} for group in GROUPS]
    if not with_batches:
        document["tags"][-2]["description"] += f" {BATCHES_OFF}"
    return document


def _place(path: str) -> tuple[int, int]:
    """Return the number of a path's group, and of the beginning in it that the path has."""
    starts = ((n, m, start) for n, group in enumerate(GROUPS) for m, start in enumerate(group.paths))
    return next((n, m) for n, m, start in starts if path.startswith(start))


def _complete(operation: dict[str, Any], path: str) -> None:
    """Describe the parameters, and add example requests."""
    for parameter in operation.get("parameters", ()):
        name = parameter["name"]
        key = f"/{{{name}}}" if parameter["in"] == "path" else f"?{name}"
        parameter["description"] = DESCRIPTIONS[key]
        if key in PLACEHOLDERS:
            parameter["example"] = PLACEHOLDERS[key]
    for media in operation.get("requestBody", {}).get("content", {}).values():
        _describe_fields(media["schema"], "")
        media["examples"] = {name: {"summary": name, "value": value} for name, value in EXAMPLES[path].items()}


def _describe_fields(schema: dict[str, Any], model: str) -> None:
    """Describe the fields whose models have no description."""
    for name, field in schema.get("properties", {}).items():
        if text := DESCRIPTIONS.get(f"{model}.{name}", DESCRIPTIONS.get(name)):
            field.setdefault("description", text)
