"""The endpoints that convert text to token ids and back, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

from fastapi import FastAPI
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from ...engine.errors import RequestError
from ...model.tokenizer import DecodeStream
from ..chat.served_model import TOKENIZING_FACTOR, ServedModel
from ..chat.template import TokenIds
from ..chat.turn import prepare_prompt, tokenizing_bytes
from ..http.body import off_loop_if_large
from ..http.errors import JsonResponse, encode_json
from ..http.middleware import RequestContext
from .reading import Messages, TemplateOptions, read_chat
from .types import MAX_IDS, MAX_INT, Name, StrictModel, Text, TokenId

LONGEST_SPECIAL = 256  # characters
LARGE_IDS = 4000  # up to this many token ids are answered at once; more in pieces, made off the event loop


class TokenizeRequest(TemplateOptions):
    """Body of `POST /tokenize`: a prompt as for completions, or messages as for chat completions."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Put the begin-of-sequence token before the prompt.")
    return_token_strs: bool | None = Field(None, description="Return the text of each token too.")


class TokenizeAnswer(StrictModel):
    """Response body of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(StrictModel):
    """Body of `POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text.")


class DetokenizeAnswer(StrictModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class AddedToken(StrictModel):
    content: str
    special: bool


class TokenizerInfo(StrictModel):
    """Response body of `GET /tokenizer_info`, with the names of transformers' `tokenizer_config.json`."""

    tokenizer_class: str
    chat_template: str
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    added_tokens_decoder: dict[str, AddedToken]


def add_tokenizer_route(app: FastAPI, ready_model: Callable[[], ServedModel]) -> None:
    """Add the route; `ready_model` returns the model or raises `ApiError`."""

    @app.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info() -> Response:
        """The special tokens and the chat template, for clients that prepare prompts themselves."""
        model = ready_model()
        tokenizer, info = model.tokenizer, model.engine.info
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        texts = {id_: tokenizer.token_text(id_) for id_ in sorted(tokenizer.special_ids)}
        return JsonResponse(
            {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": model.template.source}
            | {"model_max_length": info.config.max_model_len, "vocab_size": info.vocab_size}
            | {f"{role}_token_id": id_ for role, id_ in ids.items()}
            | {f"{role}_token": None if id_ is None else tokenizer.token_text(id_) for role, id_ in ids.items()}
            | {"added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in texts.items()}}
        )


async def tokenize(context: RequestContext, body: TokenizeRequest, model: ServedModel) -> Response:
    """Return the token ids of a prompt, or of messages rendered with the chat template."""
    if body.prompt is None:
        ids = await _chat_ids(context, body, model)
    else:
        context.hold("tokenizing", TOKENIZING_FACTOR * len(body.prompt))  # until the whole answer is sent
        ids = await _prompt_ids(body, body.prompt, model)
        body.prompt = None  # which may be long
    pieces = _tokenize_answer(ids, model, with_texts=bool(body.return_token_strs))
    return _json_response(pieces, is_large=len(ids) >= LARGE_IDS)


def _tokenize_answer(ids: TokenIds, model: ServedModel, *, with_texts: bool) -> Iterator[bytes]:
    yield b'{"count":%d,"max_model_len":%d,"tokens":[' % (len(ids), model.engine.info.config.max_model_len)
    slices = [slice(start, start + LARGE_IDS) for start in range(0, len(ids), LARGE_IDS)]
    for part in slices:
        yield b"," * bool(part.start) + encode_json(list(ids[part]))[1:-1]
    yield b'],"token_strs":' + (b"[" if with_texts else b"null}")
    for part in slices if with_texts else ():
        yield b"," * bool(part.start) + encode_json([model.tokenizer.token_text(id_) for id_ in ids[part]])[1:-1]
    if with_texts:
        yield b"]}"


def _json_response(pieces: Iterator[bytes], *, is_large: bool) -> Response:
    """Answer with JSON in pieces: at once, or one after the other, made in threads as the client reads them."""
    if is_large:
        return StreamingResponse(pieces, media_type=JsonResponse.media_type)
    return Response(b"".join(pieces), media_type=JsonResponse.media_type)


async def _prompt_ids(body: TokenizeRequest, prompt: str, model: ServedModel) -> TokenIds:
    if body.messages is not None:
        raise RequestError("prompt and messages cannot both be given.", param="messages")
    for name in TemplateOptions.model_fields:
        if getattr(body, name) is not None:
            raise RequestError(f"{name} is only for messages.", param=name)
    add_bos = bool(body.add_special_tokens)
    if not add_bos and len(prompt) < LONGEST_SPECIAL and model.tokenizer.spells_special(prompt):
        ids = model.tokenizer.encode_prompt(prompt)
        if len(ids) == 1:  # a client looks up the id of this special token
            return ids
    return await model.encode(prompt, "prompt", add_bos=add_bos, any_length=True)


async def _chat_ids(context: RequestContext, body: TokenizeRequest, model: ServedModel) -> TokenIds:
    if body.messages is None:
        raise RequestError("Either prompt or messages is needed.", param="prompt", code="missing_required_parameter")
    if body.add_special_tokens:
        message = "add_special_tokens is only for a prompt: in messages, the template adds them."
        raise RequestError(message, param="add_special_tokens")
    # keep_tokens allows more tokens than the context has.
    conversation = await off_loop_if_large(read_chat, body.messages, body, keep_tokens=MAX_INT)
    context.hold("tokenizing", tokenizing_bytes(conversation))
    prompt, _, _ = await prepare_prompt(conversation, model)
    return prompt


async def detokenize(context: RequestContext, body: DetokenizeRequest, model: ServedModel) -> Response:
    """Return the text of token ids, with special tokens unless they are to be skipped."""
    size = model.engine.info.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise RequestError(f"tokens has a token id outside 0 to {size - 1}.", param="tokens")

    context.hold("tokenizing", TOKENIZING_FACTOR * len(body.tokens))
    pieces = _detokenize_answer(body.tokens, model.tokenizer.decode_stream(bool(body.skip_special_tokens)))
    return _json_response(pieces, is_large=len(body.tokens) >= LARGE_IDS)


def _detokenize_answer(ids: list[int], stream: DecodeStream) -> Iterator[bytes]:
    yield b'{"prompt":"'
    for start in range(0, len(ids), LARGE_IDS):
        yield encode_json("".join(map(stream.step, ids[start : start + LARGE_IDS])))[1:-1]
    yield encode_json(stream.finish())[1:-1] + b'"}'
