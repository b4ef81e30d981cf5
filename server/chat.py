"""Chat completions: from messages to an answer."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine.errors import RequestError
from ..engine.messages import TokenLogprobs
from ..model.tokenizer import Tokenizer
from .errors import JsonResponse, encode_json
from .generation import Generation, sampling_params
from .protocol import ChatCompletionRequest
from .served_model import ServedModel
from .streaming import Chunks, EventStream

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks, as OpenAI does it."""


async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, model: ServedModel, keep_alive_seconds: float
) -> Response:
    """Answer a chat, whole or as a stream; every refusal is raised before the answer begins."""
    name = model.check_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    prompt = await model.render([_plain(message.model_dump(exclude_none=True)) for message in body.messages])
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None and (default := model.defaults.get("max_tokens")) is not None:
        max_tokens = min(default, max(model.engine.info.max_model_len - len(prompt), 1))
    params = sampling_params(
        body,
        model,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        turn_ends=model.template.stop_strings,
    )
    generation = Generation(model, request, [prompt], params, body, "messages")
    head = {"id": f"chatcmpl-{request.state.request_id}", "created": int(time.time()), "model": name}
    if body.stream:
        head["object"] = "chat.completion.chunk"
        chunks = ChatChunks(head, generation, model.tokenizer, body)
        return EventStream(generation, chunks, keep_alive_seconds)
    await generation.collect()
    choices = []
    for index, choice in enumerate(generation.choices):
        logprobs = chat_logprobs(choice.logprobs, model.tokenizer) if body.logprobs else None
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        entry: dict[str, Any] = {"index": index, "message": message, "logprobs": logprobs}
        entry["finish_reason"] = choice.finish_reason
        if body.return_token_ids:
            entry["token_ids"] = choice.token_ids
        choices.append(entry)
    answer = head | {"object": "chat.completion", "choices": choices, "usage": generation.usage()}
    return JsonResponse(answer | ({"prompt_token_ids": prompt} if body.return_token_ids else {}))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: parts joined to one text."""
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(part["text"] for part in message["content"])
    return message


def chat_logprobs(positions: list[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log-probabilities in the chat format."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

    return {
        "content": [
            entry(position.token_id, position.logprob) | {"top_logprobs": [entry(*pair) for pair in position.top]}
            for position in positions
        ]
    }


class ChatChunks(Chunks):
    """Chunks whose choices have a delta."""

    member, empty = b"delta", b"{}"

    def opening(self) -> bytes:
        """The assistant's role for every choice."""
        ids = b',"prompt_token_ids":' + encode_json(self.choices[0].prompt_token_ids) if self.with_ids else b""
        role = b'{"role":"assistant","content":""}'
        return b"".join(self.chunk(index, role, beside=ids) for index in range(len(self.choices)))

    def piece(self, index: int, text: str, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bytes:
        """New text."""
        shown = encode_json(chat_logprobs(logprobs, self.tokenizer)) if self.with_logprobs else b"null"
        ids = b',"token_ids":' + encode_json(token_ids) if self.with_ids else b""
        return self.chunk(index, b'{"content":%s}' % encode_json(text), logprobs=shown, more=ids)
