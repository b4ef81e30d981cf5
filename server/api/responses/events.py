"""A response as it grows: items from a turn's text, and the events that tell of them."""

from __future__ import annotations

import codecs
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ....engine.client.output_processor import RequestOutput
from ....engine.messages import TokenLogprobs
from ....model.tokenizer import Tokenizer
from ...chat.tool_calls import CallPiece, TurnPiece
from ...chat.turn import Turn
from ...generation.generation import Generation
from ...generation.streaming import EventWriter
from ...generation.token_details import chat_logprobs
from ...http.errors import ApiError, encode_json

Item = dict[str, Any]
CONTENT = -1
_CUT = re.compile(r"[^<>{}]*[<>{}]|[^<>{}]+")
"""Cuts text where calls may begin or end, so that no piece holds both a call and content that follows it."""


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}_{uuid.uuid4().hex}"


def _runs(pieces: Iterable[TurnPiece]) -> list[CallPiece]:
    """What belongs together as one; content stands there as the arguments of call `CONTENT`."""
    runs: list[CallPiece] = []
    for piece in pieces:
        content = [CallPiece(index=CONTENT, arguments=piece.content)] if piece.content else []
        for new in content + piece.calls:
            if runs and runs[-1].index == new.index:
                last = runs.pop()
                runs.append(msgspec.structs.replace(last, arguments=last.arguments + new.arguments))
            else:
                runs.append(new)
    return runs


class Answer:
    """Makes the output of one response from its text, the same however the text is cut.

    The methods return the events that a stream shows; a whole answer has no use for them.

    Attributes:
        response: the response object so far.
    """

    def __init__(self, response: dict[str, Any], turn: Turn, tokenizer: Tokenizer) -> None:
        self.response = response
        self._reader = turn.reader()
        self._must_call = turn.must_call
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if turn.params.skip_special_tokens else frozenset()
        self._sequence = 0
        self._item: Item | None = None
        self._pieces: list[str] = []
        self._calls = False
        # Log-probabilities belong to a text as far as their tokens begin inside of it.
        self._logprobs: list[dict[str, Any]] = []
        self._ahead: deque[tuple[int, TokenLogprobs]] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens_end = self._text_end = 0

    def start(self) -> bytes:
        """Say that it begins."""
        return self._event("created", response=self.response) + self._event("in_progress", response=self.response)

    def take(self, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        """Read more text."""
        for position in logprobs:
            self._ahead.append((self._tokens_end, position))
            if position.token_id not in self._hidden:
                self._tokens_end += len(self._decoder.decode(self._tokenizer.token_bytes(position.token_id)))
        return self._show(self._reader.feed(part) for part in _CUT.findall(text))

    def finish(self, reason: str | None, usage: dict[str, Any]) -> bytes:
        """Read what was held back, and end as the engine's finish reason says."""
        data = self._show([self._reader.finish()])
        if not self.response["output"] and not self._must_call:
            data += self._open_message()
        data += self._say_unfinished()
        status = "incomplete" if reason == "length" else "completed"
        data += self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return data + self._end(status, usage)

    def fail(self, error: ApiError, usage: dict[str, Any]) -> bytes:
        """End in the middle."""
        data = self._close("incomplete")
        self.response["error"] = {
            "code": "server_error" if error.status >= 500 else "invalid_prompt",
            "message": error.message,
        }
        return data + self._end("failed", usage)

    def _end(self, status: str, usage: dict[str, Any]) -> bytes:
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
        return self._event(status, response=self.response)

    def _show(self, pieces: Iterable[TurnPiece]) -> bytes:
        data = b""
        for run in _runs(pieces):
            if run.index == CONTENT:
                if self._item is None or self._item["type"] != "message":
                    data += self._close("completed") + self._open_message()
                data += self._say(run.arguments)
                continue
            if run.id is not None:
                data += self._close("completed") + self._open_call(run)
            if run.arguments:
                self._pieces.append(run.arguments)
                data += self._event("function_call_arguments.delta", **self._place(), delta=run.arguments)
        return data

    def _say(self, text: str) -> bytes:
        """More text of the open message."""
        self._pieces.append(text)
        positions = []
        if not self._calls:  # between a text after a call and the tokens stands what the reader took away
            self._text_end += len(text)
            while self._ahead and self._ahead[0][0] < self._text_end:
                positions.append(self._ahead.popleft()[1])
        return self._delta(text, positions)

    def _say_unfinished(self) -> bytes:
        """The tokens of a character that the answer's end leaves unfinished, of which the text shows nothing."""
        if self._calls or not self._decoder.getstate()[0] or self._text_end != self._tokens_end:
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
        message: Item = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        data = self._open(message)
        self.response["output"][-1]["content"] = [part]
        return data + self._event("content_part.added", **self._place(), content_index=0, part=part)

    def _open_call(self, call: CallPiece) -> bytes:
        self._calls = True
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
        """Where the open item is."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event in bytes, so that what it shows may change later."""
        name = f"response.{kind}"
        content = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode_json(content))


class ResponseEvents(EventWriter):
    """The events of a response's stream; `keep` is called with the response when it has ended."""

    def __init__(self, answer: Answer, generation: Generation, keep: Callable[[dict[str, Any]], None]) -> None:
        self._answer = answer
        self._generation = generation
        self._keep = keep
        self.shows_tokens = generation.with_logprobs

    def opening(self) -> bytes:
        """The response before it has any output."""
        return self._answer.start()

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """New text."""
        return self._answer.take(output.text, output.logprobs)

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """Nothing: the response's end is the only choice's end."""
        return b""

    def closing(self) -> bytes:
        """The end of the open item, and the whole response."""
        data = self._answer.finish(self._generation.choices[0].finish_reason, self._generation.usage())
        self._keep(self._answer.response)
        return data

    def failure(self, error: ApiError) -> bytes:
        """The response as far as it came, and what went wrong."""
        data = self._answer.fail(error, self._generation.usage())
        self._keep(self._answer.response)
        return data
