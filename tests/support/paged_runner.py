"""An engine without weights: a runner whose next token is a hash of what it finds in the pages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from support.configs import resolved_config

from pyllm.engine.messages import EngineInfo, EngineRequest, SamplingParams, TokenLogprobs, TokenOutput
from pyllm.engine.step.core import EngineCore
from pyllm.engine.step.request import PENDING_TOKEN, Request, SampledToken, ScheduledSequence

VOCAB = 50
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """Depends on every token and on their order."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def expected(prompt: list[int], params: SamplingParams, eos: tuple[int, ...] = (EOS,)) -> tuple[list[int], str]:
    """The output of a request on its own, in the plainest way."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        count = len(tokens) - len(prompt)
        if tokens[-1] in stops and count >= params.min_tokens:
            return tokens[len(prompt) :], "stop"
        if count == params.max_tokens:
            return tokens[len(prompt) :], "length"


class PagedRunner:
    """Writes tokens to pages and reads them back by the block table, as attention does."""

    def __init__(self, info: EngineInfo) -> None:
        config = info.config
        self.block_size = config.block_size
        self.pages: list[tuple[str | None, list[int]] | None] = [None] * (config.num_kv_blocks * config.block_size)
        self.num_computed = 0
        self.mixed_prefill_and_decode = False
        self.fail = False
        self.drawn: list[int] = []  # by the last step, where only the next one sees them
        self.num_launched = 0
        self.failures: list[bool] = []  # of the next steps: which ones find no memory

    def known(self, request: Request) -> list[int]:
        """Its tokens, the awaited one from the last step's draws."""
        assert PENDING_TOKEN not in request.token_ids[:-1]
        awaited = request.token_ids[-1] == PENDING_TOKEN
        return [*request.token_ids[:-1], self.drawn[request.draw_row] if awaited else request.token_ids[-1]]

    def launch(self, sequences: Sequence[ScheduledSequence]) -> LaunchedStep:
        self.num_launched += 1
        return LaunchedStep(self.execute(sequences))

    def release_cached_memory(self) -> None:
        pass

    def slot(self, sequence: ScheduledSequence, position: int) -> int:
        return sequence.request.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        if self.fail:
            raise RuntimeError("the network failed")
        if self.failures and self.failures.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        for sequence in sequences:
            request = sequence.request
            ids = self.known(request)
            start = request.num_computed_tokens
            self.num_computed += sequence.num_tokens
            for position in range(start, start + sequence.num_tokens):
                # As keys and values do, what is written depends on all tokens so far.
                entry = (request.cache_salt, ids[: position + 1])
                self.pages[self.slot(sequence, position)] = entry
        kinds = {s.request.num_computed_tokens < s.request.num_prompt_tokens for s in sequences}
        self.mixed_prefill_and_decode |= len(kinds) == 2
        draws, rows = [], []
        for sequence in sequences:
            if not sequence.samples:
                continue
            request = sequence.request
            ids, tokens = self.known(request), []
            rows.append(request)
            for position in range(request.num_computed_tokens + sequence.num_tokens):
                entry = self.pages[self.slot(sequence, position)]
                assert entry is not None, "a page was never written"
                assert entry[0] == request.cache_salt, "a page crossed from one salt to another"
                assert entry[1] == ids[: position + 1], "a page belongs to another sequence"
                tokens.append(entry[1][-1])
            token = next_token(tokens)
            found = TokenLogprobs(token_id=token, logprob=-1.0, top=[])
            draws.append(SampledToken(token, None if request.params.logprobs is None else found))
        self.drawn = [draw.token_id for draw in draws]
        for row, request in enumerate(rows):
            request.draw_row = row
        return draws


class LaunchedStep:
    """A step whose tokens are unknown before it is read."""

    def __init__(self, draws: list[SampledToken]) -> None:
        self._draws = draws
        self.is_read = False

    def __call__(self) -> list[SampledToken]:
        assert not self.is_read
        self.is_read = True
        return self._draws


def make_info(*, num_blocks: int = 64, chunk_multiple: int = 1, **settings: object) -> EngineInfo:
    return EngineInfo(
        config=resolved_config(num_kv_blocks=num_blocks, **settings), era="mock", parameters=0, load_seconds=0.0,
        vocab_size=VOCAB, eos_token_ids=(EOS,), chunk_multiple=chunk_multiple,
    )  # fmt: skip


def make_core(**sizes: object) -> EngineCore:
    info = make_info(**sizes)
    return EngineCore(info, PagedRunner(info))


def runner_of(core: EngineCore) -> PagedRunner:
    assert isinstance(core.runner, PagedRunner)
    return core.runner


def message(
    name: str, prompt: list[int], *, priority: int = 0, cache_salt: str | None = None, **params: object
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        priority=priority,
        cache_salt=cache_salt,
    )


def finish(core: EngineCore, limit: int = 2000) -> dict[str, list[TokenOutput]]:
    """Step until idle; the outputs of each request."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(limit):
        if not core.has_work:
            break
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    assert not core.has_work
    core.check_idle()
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
