"""An engine without weights: a runner whose next token is a hash of what it finds in the pages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from pyllm.engine.core import EngineCore
from pyllm.engine.messages import EngineInfo, EngineRequest, SamplingParams, TokenLogprobs, TokenOutput
from pyllm.engine.sampler import SampledToken
from pyllm.engine.scheduler import ScheduledSequence

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
        self.block_size = info.block_size
        self.pages: list[tuple[str | None, list[int]] | None] = [None] * (info.num_blocks * info.block_size)
        self.num_computed = 0
        self.prefill_beside_decode = False
        self.fail = False

    def slot(self, sequence: ScheduledSequence, position: int) -> int:
        return sequence.request.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def execute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        if self.fail:
            raise RuntimeError("the network failed")
        for sequence in sequences:
            request = sequence.request
            start = request.num_computed_tokens
            self.num_computed += sequence.num_tokens
            for position in range(start, start + sequence.num_tokens):
                # As keys and values do, what is written depends on all tokens so far.
                entry = (request.cache_salt, request.token_ids[: position + 1])
                self.pages[self.slot(sequence, position)] = entry
        kinds = {s.request.num_computed_tokens < s.request.num_prompt_tokens for s in sequences}
        self.prefill_beside_decode |= len(kinds) == 2
        draws = []
        for sequence in sequences:
            if not sequence.samples:
                continue
            request = sequence.request
            tokens = []
            for position in range(request.num_computed_tokens + sequence.num_tokens):
                entry = self.pages[self.slot(sequence, position)]
                assert entry is not None, "a page was never written"
                assert entry[0] == request.cache_salt, "a page crossed from one salt to another"
                assert entry[1] == request.token_ids[: position + 1], "a page belongs to another sequence"
                tokens.append(entry[1][-1])
            token = next_token(tokens)
            found = TokenLogprobs(token_id=token, logprob=-1.0, top=[])
            draws.append(SampledToken(token, None if request.params.logprobs is None else found))
        return draws


def make_core(**sizes: object) -> EngineCore:
    values = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4, "num_blocks": 64}
    info = EngineInfo(
        era="mock", dtype="float32", device="cpu", parameters=0, load_seconds=0.0, vocab_size=VOCAB,
        eos_token_ids=(EOS,), **(values | sizes),
    )  # fmt: skip
    return EngineCore(info, PagedRunner(info))


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
