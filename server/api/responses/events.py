"""Writes a response while it is being generated: its output items, and the events of its stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from ....engine.client.output_processor import RequestOutput
from ....model.tokenizer import Tokenizer
from ...chat.parts import CallPiece, Part, Thought
from ...chat.tool_calls import decode_json
from ...chat.turn import Turn
from ...generation.generation import Choice, Generation
from ...generation.streaming import EventWriter
from ...generation.token_details import ShownLogprobs
from ...http.errors import ApiError, encode_json
from .wire import Item

Put = Callable[[dict[str, Any]], Awaitable[None]]


class Thoughts(NamedTuple):
    """How a response shows reasoning: the item's field and its part, and the names of the events."""

    field: str
    type: str
    text: str
    part: str


CONTENT = Thoughts("content", "reasoning_text", "reasoning_text", "content_part")
SUMMARY = Thoughts("summary", "summary_text", "reasoning_summary_text", "reasoning_summary_part")


def new_id(kind: str) -> str:
    """Return an id that cannot be guessed."""
    return f"{kind}_{uuid.uuid4().hex}"


class ResponseWriter(EventWriter):
    """Builds the output of `response`, identically however the text is chunked; `settle` calls `put` with it.

    The methods return the events of a stream, which a whole response ignores.
    """

    def __init__(
        self, response: dict[str, Any], turn: Turn, generation: Generation, tokenizer: Tokenizer, put: Put | None
    ) -> None:
        self.response = response
        self.shows_tokens = generation.with_logprobs
        self.error: ApiError | None = None  # why the response failed
        self._generation = generation
        self._put = put
        self._reader = turn.reader()
        self._turn = turn
        self._thoughts = CONTENT
        self._sequence = 0
        self._item: Item | None = None  # the one being written
        self._pieces: list[str] = []
        self._has_calls = False
        self._logprobs: list[dict[str, Any]] = []  # of the tokens that the text being written shows
        self._tokens = ShownLogprobs(tokenizer, turn.params.skip_special_tokens)

    def opening(self) -> bytes:
        """Return the response before it has any output."""
        return self._event("created", response=self.response) + self._event("in_progress", response=self.response)

    def piece(self, index: int, output: RequestOutput | Choice) -> bytes:
        """Write new text."""
        self._tokens.add(output.logprobs, "")
        data = b""
        for section, text in output.sections or [("content", output.text)]:
            if section != "content":
                self._tokens.add([], text)  # the response's log-probabilities cover only the answer
            data += self._write(self._turn.read_section(self._reader, section, text))
        return data

    def closing(self) -> bytes:
        """Write the text that the reader held back, and end the response."""
        choice = self._generation.choices[0]
        data = self._write(self._reader.finish(self._turn.cut_off(choice.finish_reason, choice.stop_reason)))
        if not self.response["output"] and not (self._reader.unfinished or choice.is_reasoning):
            data += self._open_message()
        data += self._write_last_logprobs()
        cut = "length" in (choice.finish_reason, self._reader.finish_reason)
        status = "incomplete" if cut else "completed"
        data += self._close(status)
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._end(status)
        return data

    def failure(self, error: ApiError) -> bytes:
        """End the response with an error and the output so far."""
        data = self._close("incomplete")
        self._fail(error)
        return data

    async def settle(self) -> bytes:
        """Store the response, and return the event that ends the stream; what cannot be stored has failed."""
        if self._put is not None:
            try:
                await self._put(self.response)
            except ApiError as error:
                self._fail(error)
        return self._event(self.response["status"], response=self.response)

    def _fail(self, error: ApiError) -> None:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.response["error"] = {"code": code, "message": error.message}
        self.error = error
        self._end("failed")

    def _end(self, status: str) -> None:
        usage = self._generation.usage()
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def _write(self, parts: Iterable[Part]) -> bytes:
        data = b""
        for part in parts:
            if isinstance(part, str):
                if self._item is None or self._item["type"] != "message":
                    data += self._close("completed") + self._open_message()
                data += self._write_text(part)
                continue
            if isinstance(part, Thought):
                if self._item is None or self._item["type"] != "reasoning":
                    data += self._close("completed") + self._open_reasoning()
                self._pieces.append(part.text)
                data += self._event(f"{self._thoughts.text}.delta", **self._reasoning_place(), delta=part.text)
                continue
            if part.id is not None:
                data += self._close("completed") + self._open_call(part)
            if part.arguments:
                self._pieces.append(part.arguments)
                data += self._event("function_call_arguments.delta", **self._place(), delta=part.arguments)
        return data

    def _write_text(self, text: str) -> bytes:
        """Add text to the open message."""
        self._pieces.append(text)
        # After a call, positions in the text no longer match: the reader removed the call.
        entries = [] if self._has_calls else self._tokens.add([], text)
        return self._delta(text, [entry for entry in entries if entry["bytes"]])

    def _write_last_logprobs(self) -> bytes:
        """Add the tokens that the text shows in part, and those of an unfinished last character."""
        if self._has_calls or self._item is None:
            return b""
        is_unfinished = self._tokens.is_inside_character
        entries = [entry for entry in self._tokens.finish() if entry["bytes"] or is_unfinished]
        return self._delta("", entries) if entries else b""

    def _delta(self, text: str, shown: list[dict[str, Any]]) -> bytes:
        self._logprobs += shown
        return self._event("output_text.delta", **self._place(), content_index=0, delta=text, logprobs=shown)

    def _open(self, item: Item) -> bytes:
        self._item = item
        self.response["output"].append(item)
        return self._event("output_item.added", output_index=len(self.response["output"]) - 1, item=item)

    def _open_message(self) -> bytes:
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message: Item = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        data = self._open(message | {"content": []})
        self.response["output"][-1]["content"] = [part]
        return data + self._event("content_part.added", **self._place(), content_index=0, part=part)

    def _open_reasoning(self) -> bytes:
        item: Item = {"id": new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        self._thoughts = CONTENT if self.response["reasoning"]["summary"] is None else SUMMARY
        data, part = self._open(item), {"type": self._thoughts.type, "text": ""}
        item[self._thoughts.field] = [part]
        return data + self._event(f"{self._thoughts.part}.added", **self._reasoning_place(), part=part)

    def _open_call(self, call: CallPiece) -> bytes:
        self._has_calls = True
        item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id}
        return self._open(item | {"name": call.name, "arguments": ""})

    def _close(self, status: str) -> bytes:
        """End the open item, if there is one."""
        if (item := self._item) is None:
            return b""
        place, text = self._place(), "".join(self._pieces)
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            part["text"], part["logprobs"] = text, self._logprobs
            data = self._event("output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs)
            data += self._event("content_part.done", **place, content_index=0, part=part)
        elif item["type"] == "reasoning":
            (part,) = item[self._thoughts.field]
            part["text"], place = text, self._reasoning_place()
            data = self._event(f"{self._thoughts.text}.done", **place, text=text)
            data += self._event(f"{self._thoughts.part}.done", **place, part=part)
        else:
            item["arguments"] = text
            # Clients run a completed call, even if the response is incomplete.
            item["status"] = "incomplete" if decode_json(text) is None else "completed"
            data = self._event("function_call_arguments.done", **place, arguments=text)
        self._item, self._pieces, self._logprobs = None, [], []
        return data + self._event("output_item.done", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        """Return the fields that say where the open item is."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _reasoning_place(self) -> dict[str, Any]:
        return self._place() | {f"{self._thoughts.field}_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        """Encode an event immediately: the objects that it shows are mutated later."""
        name = f"response.{kind}"
        content = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode_json(content))
