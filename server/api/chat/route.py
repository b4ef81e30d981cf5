"""Chat completions: from messages to an answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.responses import Response

from ....engine.client.output_processor import RequestOutput
from ....model.tokenizer import Tokenizer
from ...chat.tool_calls import TurnPiece, TurnReader
from ...chat.turn import Turn, prepare_turn, read_turn
from ...generation.generation import Choice, Generation
from ...generation.served_model import ServedModel
from ...generation.streaming import Chunks, EventStream
from ...generation.token_details import chat_logprobs, show_details, show_prompt_logprobs
from ...http.context import RequestContext
from ...http.errors import JsonResponse, encode_json
from .wire import ChatCompletionRequest


async def create_chat_completion(context: RequestContext, body: ChatCompletionRequest, model: ServedModel) -> Response:
    """Answer a chat, whole or as a stream; every refusal is raised before the answer begins."""
    turn = await prepare_turn(body, model)
    generation = turn.generate(model, context, body)
    head = {"id": f"chatcmpl-{context.request_id}", "created": int(time.time()), "model": body.model}
    if body.stream:
        head["object"] = "chat.completion.chunk"
        chunks = ChatChunks(head, generation, model.tokenizer, body, turn)
        return EventStream(generation, chunks, model.flags.sse_keep_alive_interval)
    await generation.collect()

    def answer() -> Response:
        choices = [_whole(index, choice, body, turn, model) for index, choice in enumerate(generation.choices)]
        content = head | {"object": "chat.completion", "choices": choices, "usage": generation.usage()}
        if body.return_token_ids:
            content["prompt_token_ids"] = turn.prompt
        if body.prompt_logprobs is not None:
            positions = generation.choices[0].prompt_logprobs
            content["prompt_logprobs"] = show_prompt_logprobs(turn.prompt, positions, model.tokenizer)
        return JsonResponse(content)

    # Candidates for each token of a long prompt are many.
    return answer() if body.prompt_logprobs is None else await asyncio.to_thread(answer)


def _whole(index: int, choice: Choice, body: ChatCompletionRequest, turn: Turn, model: ServedModel) -> dict[str, Any]:
    """One choice of a whole answer."""
    read = read_turn(turn.reader(), choice.text)
    message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
    if read.calls:
        message["content"] = read.content or None
        message["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, name, arguments in read.calls
        ]
    reason = read.finish_reason if choice.finish_reason == "stop" else choice.finish_reason
    entry: dict[str, Any] = {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
    if body.logprobs:
        entry["logprobs"] = chat_logprobs(choice.logprobs, model.tokenizer)
    return entry | show_details(choice, body, model.tokenizer)


class ChatChunks(Chunks):
    """Chunks whose choices have a delta."""

    member, empty = b"delta", b"{}"

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        tokenizer: Tokenizer,
        body: ChatCompletionRequest,
        turn: Turn,
    ) -> None:
        super().__init__(head, generation, tokenizer, body)
        self._must_call = turn.must_call
        # Without tools the text needs no reading.
        self._readers = [] if turn.reader is TurnReader else [turn.reader() for _ in self.choices]
        self._prompt_due = body.prompt_logprobs is not None

    def opening(self) -> bytes:
        """The assistant's role for every choice; the content is null where only calls can follow."""
        ids = b',"prompt_token_ids":' + encode_json(self.choices[0].prompt_token_ids) if self.with_ids else b""
        role = b'{"role":"assistant","content":%s}' % (b"null" if self._must_call else b'""')
        return b"".join(self.chunk(index, role, beside=ids) for index in range(len(self.choices)))

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """New text."""
        shown = encode_json(chat_logprobs(output.logprobs, self.tokenizer)) if self.with_logprobs else b"null"
        deltas = [b'{"content":%s}' % encode_json(output.text)]
        if self._readers:
            deltas = _deltas(self._readers[index].feed(output.text)) or ([self.empty] if self.shows_tokens else [])
            if not deltas:
                return b""
        first = self.chunk(
            index, deltas[0], logprobs=shown, more=self.details(output), beside=self._about_prompt(index)
        )
        return first + b"".join(self.chunk(index, delta) for delta in deltas[1:])

    def ending(self, index: int, output: RequestOutput) -> bytes:
        """What the reader held back, and the finish reason."""
        held, about = b"", self._about_prompt(index)
        if self._readers:
            reader = self._readers[index]
            held = b"".join(self.chunk(index, delta) for delta in _deltas(reader.finish()))
            if output.finish_reason == "stop":
                return held + self.last(index, reader.finish_reason, output.stop_reason, about)
        return held + self.last(index, output.finish_reason, output.stop_reason, about)

    def _about_prompt(self, index: int) -> bytes:
        """The prompt's log-probabilities, once; they are complete when the first choice has a token."""
        if not self._prompt_due or index:
            return b""
        self._prompt_due = False
        choice = self.choices[0]
        shown = show_prompt_logprobs(choice.prompt_token_ids, choice.prompt_logprobs, self.tokenizer)
        return b',"prompt_logprobs":' + encode_json(shown)


def _deltas(piece: TurnPiece) -> list[bytes]:
    """What a piece of a turn adds, one delta for each step: clients join those of different chunks only."""
    deltas = [b'{"content":%s}' % encode_json(piece.content)] if piece.content else []
    for call in piece.calls:
        function: dict[str, Any] = {"arguments": call.arguments}
        shown: dict[str, Any] = {"index": call.index, "function": function}
        if call.id is not None:
            shown = {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name} | function}
        deltas.append(b'{"tool_calls":[%s]}' % encode_json(shown))
    return deltas
