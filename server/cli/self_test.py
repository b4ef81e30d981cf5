"""Describe a checkpoint without reading its weights, and test the engine on them, for `pyllm check`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.build import block_bytes, outline_model
from ...engine.config import EngineConfig, EngineSettings, settings_of
from ...engine.errors import RequestError
from ...engine.host import free_host_bytes
from ...engine.llm import LLM
from ...engine.messages import EngineRequest, SamplingParams
from ...engine.runner.model_runner import ModelRunner
from ...engine.step.request import Request, ScheduledSequence
from ...model.backend import AttentionMetadata
from ...model.config import read_config

PROMPTS = ("The capital of Italy is", "Once upon a time", "2, 4, 6, 8,")
TOKENS = 16  # generated after each
LONG = 200  # tokens of a prompt that the engine computes in chunks, while others decode
CHUNK = 5
# By the format of the weights: the most that distributions may differ (mean KL divergence in nats), and how far a
# greedy token's score may be below the largest, as a share of the largest absolute score: rounding may change both.
LIMITS = {"float32": (1e-6, 1e-4), "bfloat16": (5e-2, 5e-2)}
PROGRESS_DELAY = 1.0  # seconds of a test before a bar is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The network as a checkpoint's files describe it."""

    era: str
    has_prefix: bool  # tensor names begin with `model.`
    files: tuple[str, ...]  # of the weights
    file_dtypes: tuple[str, ...]
    sizes: str  # in words
    parameters: int
    active_parameters: int  # those used to compute one token
    dtype: str  # in which the large products are computed
    device: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    block_bytes: int  # of one block of the KV cache
    weight_bytes: int
    free_bytes: int  # of the device's memory
    ends: dict[int, str]  # ids that end a text, and the file each comes from


class Check(NamedTuple):
    """The result of one test."""

    name: str
    passed: bool
    found: str  # the finding, in words


class Answer(NamedTuple):
    """A text that the model wrote."""

    prompt: str
    text: str


def describe(config: EngineConfig) -> Description:
    """Describe a checkpoint; raises `CheckpointError` or `EngineStartError` for one that is refused."""
    shape, ends = read_config(config.model, config.generation_config)
    outline, device = outline_model(config, shape)
    network = outline.network
    held = [*network.parameters(), *network.buffers()]
    return Description(
        era=outline.era.name,
        has_prefix=any(tensor.name.startswith("model.") for tensor in outline.tensors.values()),
        files=tuple(sorted({tensor.path.name for tensor in outline.tensors.values()})),
        file_dtypes=outline.file_dtypes,
        sizes=network.sizes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        active_parameters=network.active_parameters,
        dtype=str(network.dtype).removeprefix("torch."),
        device=device.type,
        vocab_size=network.config.vocab_size,
        max_model_len=config.max_model_len or shape.max_position_embeddings,
        max_num_seqs=config.most_seqs(device.type),
        block_size=config.block_size,
        block_bytes=block_bytes(network, config),
        weight_bytes=sum(tensor.nbytes for tensor in held),
        free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes(),
        ends=ends,
    )


def self_test(config: EngineConfig) -> tuple[list[Check], list[Answer]]:
    """Compute a few prompts in every way the engine has, and compare; return the checks and the texts written.

    Everything is compared with the cache-free pass over a whole sequence. Raises the errors of `LLM`.
    """
    settings = {name: getattr(config, name) for name in settings_of(EngineSettings)}
    llm = LLM(config.model, **settings | {"kv_cache_dtype": "auto"})
    test = _Test(llm)
    stages: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("greedy, alone", test.alone),
        ("no NaN", test.finite),
        ("cached = cache-free", partial(test.paged, chunk=1)),
        ("chunked = whole", partial(test.paged, chunk=CHUNK)),
        ("batched = alone", partial(test.paged, chunk=CHUNK + 2, together=True)),
        ("greedy, batched", test.together),
    ]
    checks = []
    # As while loading, the bar is shown on a terminal only.
    for name, run in tqdm(stages, desc="Testing", delay=PROGRESS_DELAY, disable=None, leave=False):
        try:
            with torch.inference_mode():
                checks.append(Check(name, *run()))
        except (RuntimeError, RequestError) as error:
            checks.append(Check(name, False, " ".join(str(error).split())[:300] or type(error).__name__))
    return checks, test.answers


class _Test:
    """The tests, each after those it needs."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        runner = cast(ModelRunner, llm.core.runner)
        self._model, self._config = runner.model, llm.core.info.config
        self._limit, self._margin = LIMITS[self._config.dtype]
        room = max(1, self._config.max_model_len - TOKENS)
        ids = [[id_ for id_ in llm.tokenizer.encode(text) if id_ < self._model.config.vocab_size] for text in PROMPTS]
        self._prompts = [each[:room] or [0] for each in ids]
        self._long = ([id_ for prompt in self._prompts for id_ in prompt] * LONG)[: min(LONG, room)]
        self._sequences: list[list[int]] = []  # prompts and the text written after them
        self._whole: list[Tensor] = []  # their scores without a cache, FP32 [T, vocab]
        self.answers: list[Answer] = []

    def alone(self) -> tuple[bool, str]:
        """Generate one text after the other."""
        outputs = [self._generate([prompt])[0] for prompt in self._prompts]
        for text, prompt, (written, ids) in zip(PROMPTS, self._prompts, outputs, strict=True):
            self.answers.append(Answer(text, written))
            self._sequences.append(prompt + ids)
        self._whole = [self._cache_free(ids) for ids in self._sequences]
        ends = zip(self._prompts, self._whole, strict=True)
        return self._most_likely([ids for _, ids in outputs], [scores[len(prompt) - 1 :] for prompt, scores in ends])

    def finite(self) -> tuple[bool, str]:
        """Look for NaN and infinity."""
        bad = sum(int((~scores.isfinite()).sum()) for scores in self._whole)
        return bad == 0 and bool(self._whole), f"{bad} of {sum(map(Tensor.numel, self._whole)):,} scores are not finite"

    def paged(self, chunk: int, together: bool = False) -> tuple[bool, str]:
        """Compare the scores from the KV cache, filled `chunk` tokens at a time, all sequences `together` or not."""
        steps = [self._sequences] if together else [[ids] for ids in self._sequences]
        found = [scores for step in steps for scores in self._paged(step, chunk)]
        worst = max(map(_divergence, self._whole, found), key=lambda value: (value != value, value), default=math.nan)
        return worst <= self._limit, f"KL divergence {worst:.1e}, at most {self._limit:.0e}"

    def together(self) -> tuple[bool, str]:
        """Generate all texts at once, next to a prompt so long that it is computed in chunks."""
        prompts = [*self._prompts, self._long]
        drawn = [ids for _, ids in self._generate(prompts)]
        scores = [self._cache_free(prompt + ids, len(prompt) - 1) for prompt, ids in zip(prompts, drawn, strict=True)]
        return self._most_likely(drawn, scores)

    def _generate(self, prompts: Sequence[list[int]]) -> list[tuple[str, list[int]]]:
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, skip_special_tokens=False)
        return [(answer.text, answer.token_ids) for answer in self._llm.generate(list(prompts), params)]

    def _most_likely(self, texts: list[list[int]], scores: list[Tensor]) -> tuple[bool, str]:
        """Compare the tokens of each text with the largest scores [tokens + 1, vocab] of the cache-free pass."""
        right = 0
        for ids, before in zip(texts, scores, strict=True):
            drawn = before[: len(ids)].gather(1, torch.tensor(ids, device=before.device)[:, None])[:, 0]
            gaps = before[: len(ids)].amax(dim=1) - drawn
            right += int((gaps <= self._margin * before.abs().amax()).sum())
        count = sum(map(len, texts))
        return right == count, f"{right} of {count} tokens are the most likely ones without a cache"

    def _cache_free(self, ids: list[int], first: int = 0) -> Tensor:
        """Scores of the next tokens from index `first`, FP32 [T - first, vocab]."""
        device = self._model.device
        step = AttentionMetadata.without_cache([len(ids)])
        hidden = self._model(torch.tensor(ids, device=device), torch.arange(len(ids), device=device), step)
        return self._model.logits(hidden[first:])

    def _paged(self, sequences: Sequence[list[int]], chunk: int) -> list[Tensor]:
        """Scores of all next tokens in a KV cache of their own: FP32 [T, vocab] for each sequence."""
        size, first, requests = self._config.block_size, 0, []
        for ids in sequences:
            request = Request(EngineRequest(request_id="self-test", prompt_token_ids=ids, params=SamplingParams()))
            request.block_ids = list(range(first, first + len(ids) // size + 1))
            first += len(request.block_ids)
            requests.append(request)
        runner = ModelRunner(self._model, replace(self._config, num_kv_blocks=first))
        scores: list[list[Tensor]] = [[] for _ in sequences]
        while any(request.num_computed_tokens < request.num_tokens for request in requests):
            lengths = [min(chunk, request.num_tokens - request.num_computed_tokens) for request in requests]
            order = sorted((length, n) for n, length in enumerate(lengths) if length)  # decodes come first
            step = [ScheduledSequence(requests[n], length, False) for length, n in order]
            hidden = self._model(*runner.prepare(step), runner.kv_cache)
            parts = self._model.logits(hidden).split([length for length, _ in order])
            for (length, n), part in zip(order, parts, strict=True):
                scores[n].append(part.clone())
                requests[n].num_computed_tokens += length
        return [torch.cat(parts) for parts in scores]


def _divergence(expected: Tensor, found: Tensor) -> float:
    """The mean KL divergence of next-token distributions, from scores [T, vocab]."""
    p, q = (scores.double().log_softmax(dim=-1) for scores in (expected, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())
