"""What the tests of `/v1/responses` share: a client that holds every answer against its models, and what is sent."""

from __future__ import annotations

import itertools
import json

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pyllm.server.api.responses.wire import ResponseEvent, ResponseObject

REPLY = "Hello, wörld!"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
EVENT = TypeAdapter(ResponseStreamEvent)


def creator(harness):
    """Makes a response; a whole answer comes as JSON after it was held against both models of it."""

    def create(expect: int = 200, **fields):
        response = harness.post("/v1/responses", {"input": "Hi"} | fields)
        assert response.status_code == expect, response.text
        if expect != 200:
            return response.json()["error"]
        if fields.get("stream"):
            return events_of(response.text)
        ResponseObject.model_validate_json(response.content)
        Response.model_validate_json(response.content)
        return response.json()

    return create


def events_of(text):
    """The events, after a look at their numbers, their names and their shapes."""
    blocks = [block for block in text.split("\n\n")[:-1] if not block.startswith(":")]
    pairs = [block.split("\n") for block in blocks]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        ResponseEvent.model_validate(event)
        assert type(EVENT.validate_python(event)).model_fields["type"].annotation.__args__ == (event["type"],)
    return events


def types_of(events):
    """The events' types, each once where it repeats."""
    return [kind.removeprefix("response.") for kind, _ in itertools.groupby(event["type"] for event in events)]


def prompts(harness):
    return [harness.tokenizer.decode(prompt) for _, prompt, _ in harness.engine.requests]


def without_ids(value):
    """A response without what differs each time."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return [without_ids(entry) for entry in value] if isinstance(value, list) else value
