"""A served model with a scripted engine, and the application around it, in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import httpx
import msgspec
import pytest
import tokenizers
from support.configs import resolved_config
from support.grammars import check_grammar
from tokenizers import decoders, models, pre_tokenizers

from pyllm.engine.client.output_processor import OutputProcessor, RequestStream, Wakeup
from pyllm.engine.errors import EngineBusyError, EngineDeadError
from pyllm.engine.messages import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    Pooling,
    SamplingParams,
    StepOutputs,
    TokenDynamics,
    TokenLogprobs,
    TokenOutput,
    resolve_request,
)
from pyllm.model.tokenizer import Tokenizer
from pyllm.server.app import create_app
from pyllm.server.chat.served_model import ServedModel
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.flags import ServerConfig
from pyllm.server.generation.metrics import Metrics
from pyllm.server.service import Service

CONTEXT = 200


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer with one token per byte, after `</s>`, `<pad>` and `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate(["</s>", "<pad>", "<s>", *alphabet])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library, names={"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"})


def dynamics_of(place: int) -> TokenDynamics:
    """What the scripted network did for its token number `place`, from 1."""
    return TokenDynamics(
        input_token_id=place, experts=[place % 4, 0], rerouted=[True, False], mu_norm=[0.5, 1.0],
        velocity_norm=[0.0, 2.0], routed_experts=[[place % 4], [0]], expert_weights=[[1.0], [1.0]],
    )  # fmt: skip


class ScriptedEngine:
    """Replaces `AsyncEngine`: answers every request with `reply`, and records the requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer)
        self.info = EngineInfo(
            config=resolved_config(max_model_len=CONTEXT, max_num_batched_tokens=64, block_size=16, num_kv_blocks=100),
            era="test", parameters=1, load_seconds=0.0, vocab_size=tokenizer.vocab_size, eos_token_ids=(0,),
            hidden_size=4, num_layers=2, num_experts=4,
        )  # fmt: skip
        self.stats = EngineStats(
            num_running=2, num_waiting=1, kv_cache_usage=0.25, num_preemptions=4,
            prefix_cache_queries=50, prefix_cache_hits=20,
        )  # fmt: skip
        self.step_listener: Callable[[StepOutputs], None] | None = None
        self.error: str | None = None
        self.reply = "Hello, wörld!"
        self.hold_after = 10**9
        self.release = asyncio.Event()
        self.fail_after = 0
        self.requests: list[tuple[str, list[int], SamplingParams]] = []
        self.extras: list[tuple[int, str | None]] = []
        self.clients: list[str] = []
        self.most = 10**9
        self.running: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.aborted: list[str] = []

    def configure(self, **settings: int) -> None:
        """Change settings that the engine reports."""
        self.info = msgspec.structs.replace(self.info, config=dataclasses.replace(self.info.config, **settings))

    @property
    def is_alive(self) -> bool:
        return self.error is None

    async def wait_dead(self) -> None:
        await asyncio.Event().wait()

    async def shutdown(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109
        self.error = "The server is shutting down."

    async def check_grammar(self, grammar: str, param: str | None = None) -> None:
        await check_grammar(grammar, param)

    def check_room(self, count: int = 1, client: str = "") -> None:
        if len(self.running) + count > self.most:
            raise EngineBusyError("Too many requests are waiting.", retry_after=7)

    def submit(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, wakeup: Wakeup | None = None,
        priority: int = 0, background: bool = False, client: str = "", cache_salt: str | None = None,
        pooling: Pooling | None = None,
    ) -> RequestStream:  # fmt: skip
        if self.error is not None:
            raise EngineDeadError(self.error)
        message = EngineRequest(
            request_id=request_id, prompt_token_ids=prompt_token_ids, params=params, pooling=pooling
        )
        message = resolve_request(message, self.info, random.Random(0))
        self.processor.add(request_id, len(prompt_token_ids), message.params)
        self.requests.append((request_id, prompt_token_ids, params))
        self.extras.append((priority, cache_salt))
        self.clients.append(client)
        self.running.add(request_id)
        stream = RequestStream(request_id, wakeup or Wakeup(), self._abort)
        self._tasks.append(asyncio.get_running_loop().create_task(self._answer(stream, message)))
        return stream

    async def _answer(self, stream: RequestStream, message: EngineRequest) -> None:
        """Send the reply token by token, or only what belongs to the prompt."""
        request_id, params = message.request_id, message.params
        ids = [*self.tokenizer.encode(self.reply), 0]
        of_prompt = self._prompt_logprobs(message)
        if message.pooling or params.max_tokens == 0:
            await asyncio.sleep(0)
            embedding = self.embed(message.prompt_token_ids, message.pooling) if message.pooling else None
            reason = "stop" if message.pooling else "length"
            self._send(stream, request_id, finish_reason=reason, prompt_logprobs=of_prompt, embedding=embedding)
            return
        for sent in count(1):
            await asyncio.sleep(0)
            if sent > self.hold_after:
                await self.release.wait()
            if request_id not in self.running:
                return
            if self.error is not None:
                stream.die(self.error)
                return
            token = ids[(sent - 1) % len(ids)]
            stops = token == 0 and not params.ignore_eos
            reason = "stop" if stops else "length" if sent == params.max_tokens else None
            if self.fail_after == sent:
                reason = "error"
            logprobs = []
            if params.logprobs is not None:
                top = [(token, -0.5), (2, -1.5), (1, float("-inf"))][: params.logprobs]
                logprobs = [TokenLogprobs(token_id=token, logprob=-0.5, top=top)]
            self._send(
                stream, request_id, token, logprobs=logprobs, finish_reason=reason,
                stop_token_id=0 if stops else None, num_cached_tokens=3,
                prompt_logprobs=of_prompt if sent == 1 else [],
                dynamics=[dynamics_of(sent)] if params.return_dynamics else [],
            )  # fmt: skip
            if request_id not in self.running:
                return

    def _send(self, stream: RequestStream, request_id: str, *token_ids: int, **fields: Any) -> None:
        """Send one output; a finish reason ends the request."""
        token = TokenOutput(request_id=request_id, token_ids=[*token_ids], scheduled_time=time.monotonic(), **fields)
        output = self.processor.process(token)
        assert output is not None
        stream.put(output)
        if output.finish_reason is not None:
            self.running.discard(request_id)

    @staticmethod
    def embed(prompt: list[int], pooling: Pooling) -> list[float]:
        """Make up the hidden states of a prompt."""
        return [float(prompt[-1] if pooling == "last" else sum(prompt)), 3.0, 0.0, -4.0]

    @staticmethod
    def _prompt_logprobs(message: EngineRequest) -> list[TokenLogprobs]:
        """Make each token of the prompt the second likeliest at its position, after `<s>`."""
        count = message.params.prompt_logprobs
        if count is None:
            return []
        return [
            TokenLogprobs(token_id=id_, logprob=-1.0 - place, top=[(2, -0.25), (id_, -1.0 - place)][:count], rank=2)
            for place, id_ in enumerate(message.prompt_token_ids[1:], 1)
        ]

    def _abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running.discard(request_id)
            self.aborted.append(request_id)


class Harness:
    """The application with a scripted engine; each call runs in its own event loop."""

    def __init__(self, **flags: Any) -> None:
        self.tokenizer = byte_tokenizer()
        self.engine = ScriptedEngine(self.tokenizer)
        self.metrics = Metrics("org/tiny", lambda: self.engine.stats, self.engine.info.config)
        self.model = ServedModel(
            names=("org/tiny", "alias"),
            tokenizer=self.tokenizer,
            template=ChatTemplate.from_tokenizer(self.tokenizer),
            engine=self.engine,  # type: ignore[arg-type]
            defaults={},
            metrics=self.metrics,
            created=1,
            longest_token=4,
            flags=ServerConfig(**flags),
        )
        self.service = Service(self.model.flags, model=self.model)
        self.app = create_app(self.service)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                try:
                    return await asyncio.wait_for(work(client), 20)
                finally:
                    await self.service.responses.close()  # connections belong to this loop

        return asyncio.run(main())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.run(lambda client: client.get(path, headers=headers))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        options = options if "content" in options else options | {"json": body}
        return self.run(lambda client: client.post(path, **options))

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Hi"} | fields)


def stream_events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the JSON of the events of a whole stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2] if not block.startswith(":")]


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture(scope="session")
def make_harness() -> type[Harness]:
    return Harness


@pytest.fixture
def events_of() -> Callable[[httpx.Response], list[dict[str, Any]]]:
    return stream_events
