"""What an engine is told at its start."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

DType = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
Count = Annotated[int, msgspec.Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine.

    Attributes:
        model: folder of the checkpoint.
        dtype: of the weights and products; `auto` is bfloat16.
        device: `auto` is cuda where there is one, else cpu.
        load_format: `dummy` gives random weights of the config's shapes.
        seed: of dummy weights, and of the seeds drawn for requests that bring none; None draws those at random.
        max_model_len: most tokens of prompt and output together; None is the model's context.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: token budget of one step; a longer prompt is computed in chunks.
        block_size: tokens per KV block.
        kv_cache_memory_bytes: size of the KV cache; None chooses one.
        num_kv_blocks: number of KV blocks, instead of a size in bytes (for tests and experiments).
        quiet: no progress bar while loading.
    """

    model: str
    dtype: DType = "auto"
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    seed: int | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count = 2048
    block_size: Count = 16
    kv_cache_memory_bytes: Count | None = None
    num_kv_blocks: Count | None = None
    quiet: bool = False
