"""Writes a response while it is generated: its output items, and the events of its stream."""

from __future__ import annotations

import codecs
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ....engine.client.output_processor import RequestOutput
from ....engine.messages import TokenLogprobs
from ....model.tokenizer import Tokenizer
from ...chat.tool_calls import CallPiece, Part
from ...chat.turn import Turn
from ...generation.generation import Choice, Generation
from ...generation.streaming import EventWriter
from ...generation.token_details import chat_logprobs
from ...http.errors import ApiError, encode_json
from .wire import Item

Put = Callable[[dict[str, Any]], None]


def new_id(kind: str) -> str:
    """Return an id that cannot be guessed."""
    return f"{kind}_{uuid.uuid4().hex}"


class ResponseWriter(EventWriter):
    """Builds the output of `response`, identically however the text is chunked; calls `put` with it at the end.

    The methods return the events of a stream, which a whole response ignores.
    """

    def __init__(
        self, response: dict[str, Any], turn: Turn, generation: Generation, tokenizer: Tokenizer, put: Put | None
    ) -> None:
        self.response = response
        self.shows_tokens = generation.with_logprobs
        self._generation = generation
        self._put = put
        self._reader = turn.reader()
        self._turn = turn
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if turn.params.skip_special_tokens else frozenset()
        self._sequence = 0
        self._item: Item | None = None  # the one that is being written
        self._pieces: list[str] = []
        self._has_calls = False
        # The log-probabilities of a text are those of the tokens that begin inside it.
        self._logprobs: list[dict[str, Any]] = []
        self._ahead: deque[tuple[int, TokenLogprobs]] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens_end = self._text_end = 0

    def opening(self) -> bytes:
        """Return the response before it has any output."""
        return self._event("created", response=self.response) + self._event("in_progress", response=self.response)

    def piece(self, index: int, output: RequestOutput | Choice) -> bytes:
        """Write new text."""
        for position in output.logprobs:
            self._ahead.append((self._tokens_end, position))
            if position.token_id not in self._hidden:
                self._tokens_end += len(self._decoder.decode(self._tokenizer.token_bytes(position.token_id)))
        return self._write(self._reader.feed(output.text))

    def closing(self) -> bytes:
        """Write the text that the reader held back, and end the response."""
        choice = self._generation.choices[0]
        data = self._write(self._reader.finish(self._turn.is_cut(choice.finish_reason, choice.stop_reason)))
        if not self.response["output"] and not self._reader.unfinished:
            data += self._open_message()
        data += self._write_unfinished_character()
        cut = "length" in (choice.finish_reason, self._reader.finish_reason)
        status = "incomplete" if cut else "completed"
        data += self._close(status)
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return data + self._end(status)

    def failure(self, error: ApiError) -> bytes:
        """End the response with an error and the output so far."""
        data = self._close("incomplete")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.response["error"] = {"code": code, "message": error.message}
        return data + self._end("failed")

    def _end(self, status: str) -> bytes:
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
        if self._put is not None:
            self._put(self.response)
        return self._event(status, response=self.response)

    def _write(self, parts: Iterable[Part]) -> bytes:
        data = b""
        for part in parts:
            if isinstance(part, str):
                if self._item is None or self._item["type"] != "message":
                    data += self._close("completed") + self._open_message()
                data += self._write_text(part)
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
        positions = []
        if not self._has_calls:  # after a call, positions in the text no longer match: the reader removed the call
            self._text_end += len(text)
            while self._ahead and self._ahead[0][0] < self._text_end:
                positions.append(self._ahead.popleft()[1])
        return self._delta(text, positions)

    def _write_unfinished_character(self) -> bytes:
        """Add the tokens of a last character that the text does not show because it is incomplete."""
        if self._has_calls or not self._decoder.getstate()[0] or self._text_end != self._tokens_end:
            return b""
        positions = [position for _, position in self._ahead if position.token_id not in self._hidden]
        return self._delta("", positions) if positions and self._item is not None else b""

    def _delta(self, text: str, positions: list[TokenLogprobs]) -> bytes:
        shown = chat_logprobs(positions, self._tokenizer)["content"] if positions else []
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
        else:
            item["arguments"] = text
            data = self._event("function_call_arguments.done", **place, arguments=text)
        self._item, self._pieces, self._logprobs = None, [], []
        return data + self._event("output_item.done", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        """Return the fields that say where the open item is."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _event(self, kind: str, **fields: Any) -> bytes:
        """Encode an event immediately: the objects that it shows are mutated later."""
        name = f"response.{kind}"
        content = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode_json(content))
