"""The engine as a library: `LLM("folder").generate(["Once upon a time"])`, in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..model.checkpoint.hub import resolve_model
from ..model.tokenizer import Tokenizer
from .build import build_engine
from .client.output_processor import OutputProcessor, RequestOutput
from .config import EngineConfig, from_values
from .errors import EngineStartError
from .messages import (
    EngineRequest,
    FinishReason,
    Pooling,
    SamplingParams,
    TokenDynamics,
    TokenLogprobs,
    resolve_request,
)


@dataclass(slots=True)
class Completion:
    """The text and tokens generated for one prompt."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    dynamics: list[TokenDynamics] = field(default_factory=list)

    def add(self, output: RequestOutput) -> None:
        """Append a step's output."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.dynamics += output.dynamics
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason


class LLM:
    """An engine in this process, for scripts and experiments.

    `model` is the folder or hub id of a checkpoint, `revision` a branch, tag or commit on the hub; `engine_args` are
    fields of `EngineConfig`. Raises `CheckpointError` if the model cannot be found or has no tokenizer,
    `EngineStartError` if the engine cannot start.
    """

    def __init__(self, model: str, *, revision: str | None = None, **engine_args: Any) -> None:
        folder = resolve_model(model, revision)
        self.tokenizer = Tokenizer.from_folder(folder)
        try:
            config = from_values(EngineConfig, {"model": str(folder), **engine_args})
        except ValueError as error:
            raise EngineStartError(str(error)) from None
        self.core = build_engine(config)
        self._seeds = random.Random(config.seed)

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Generate for all prompts together, which are texts or lists of token ids.

        `params` apply to all prompts, or there is one for each; the default is `SamplingParams()`. Raises
        `RequestError`, before anything is generated, if a request can never run.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        messages = self._requests(prompts, each)
        completions = [Completion(message.prompt_token_ids) for message in messages]
        for output in self._run(messages):
            completions[int(output.request_id)].add(output)
        return completions

    def embed(self, prompts: Sequence[str | list[int]], pooling: Pooling = "mean") -> list[list[float]]:
        """Return each prompt's final hidden states, after the last norm: their mean, or the last token's.

        Each result has `hidden_size` numbers, not normalised. Raises `RequestError`, before anything is computed, if a
        prompt can never run.
        """
        messages = self._requests(prompts, [SamplingParams(max_tokens=1)] * len(prompts), pooling)
        found = {int(output.request_id): output.embedding or [] for output in self._run(messages)}
        return [found[i] for i in range(len(prompts))]

    def _requests(
        self, prompts: Sequence[str | list[int]], params: Sequence[SamplingParams], pooling: Pooling | None = None
    ) -> list[EngineRequest]:
        """Check the requests; their ids are their indexes."""
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            request = EngineRequest(request_id=str(index), prompt_token_ids=ids, params=own, pooling=pooling)
            requests.append(resolve_request(request, self.core.info, self._seeds))
        return requests

    def _run(self, messages: list[EngineRequest]) -> Iterator[RequestOutput]:
        """Step until all requests are finished; yield their outputs."""
        processor = OutputProcessor(self.tokenizer)
        try:
            for message in messages:
                processor.add(message.request_id, len(message.prompt_token_ids), message.params)
                self.core.add_request(message)
            while self.core.has_requests:
                self.core.wait_for_work()
                for token_output in self.core.step().outputs:
                    output = processor.process(token_output)
                    if output is not None:
                        yield output
                        if output.finish_reason is not None:  # perhaps by a stop string, which the engine does not know
                            self.core.abort([token_output.request_id])
        finally:
            self.core.abort([message.request_id for message in messages])  # nothing keeps running after Ctrl-C
        self.core.check_idle()
