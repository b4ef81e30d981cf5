"""What an engine is told at its start."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

DType = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
Quantization = Literal["none", "int8"]
KVCacheDType = Literal["auto", "fp8"]
SchedulingPolicy = Literal["fcfs", "priority"]
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]

MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next tokens of a sequence are guessed, to be checked several at a time.

    Attributes:
        method: `ngram` looks for the last tokens in the sequence itself.
        num_speculative_tokens: most tokens of one guess.
        prompt_lookup_min, prompt_lookup_max: how many tokens must have occurred before; longer runs are tried first.
        disable_by_batch_size: nothing is guessed in steps with more sequences that decode than this, where a guess
            costs as much as it saves.
    """

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    prompt_lookup_min: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    prompt_lookup_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    disable_by_batch_size: Count = 4

    def __post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min must be no larger than prompt_lookup_max")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine.

    Attributes:
        model: folder of the checkpoint.
        dtype: of the weights and products; `auto` is bfloat16.
        device: `auto` is cuda where there is one, else cpu.
        load_format: `dummy` gives random weights of the config's shapes.
        quantization: `int8` packs the weights of the large products to 8 bits at load.
        kv_cache_dtype: of keys and values in the cache; `auto` is that of the weights, `fp8` (e4m3) needs a GPU.
        seed: of dummy weights, and of the seeds drawn for requests that bring none; None draws those at random.
        max_model_len: most tokens of prompt and output together; None is the model's context.
        max_num_seqs: most sequences in one step; None chooses by device.
        max_num_batched_tokens: token budget of one step; a longer prompt is computed in chunks.
        max_num_prefill_tokens: most prompt tokens in a step in which up to eight other sequences decode, so that
            arriving prompts slow running streams down only so far; None chooses by device.
        max_num_queued_reqs: most requests that wait for their turn; more are refused.
        scheduling_policy: `fcfs` is first come, first served; with `priority`, a lower `priority` goes first.
        enable_prefix_caching: keep the KV blocks of finished sequences for others that begin with the same tokens.
        block_size: tokens per KV block.
        kv_cache_memory_bytes: size of the KV cache; None chooses one.
        gpu_memory_utilization: share of a GPU's memory that the engine may fill, where no size is given.
        num_kv_blocks: number of KV blocks, instead of a size in bytes (for tests and experiments).
        speculative_config: guess tokens and check several at a time; None computes one by one.
        overlap_scheduling: begin a step before the one before it is read; None is on a GPU only.
        enforce_eager: record no steps as CUDA graphs.
        engine_hang_timeout: seconds without any progress, not even of a layer, after which the engine counts as hung.
        deterministic: compute so that an answer's last bits do not depend on who else is being served, which takes a
            GPU longer, and refuse to start where that cannot be.
        quiet: no progress bar while loading.
    """

    model: str
    dtype: DType = "auto"
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    quantization: Quantization = "none"
    kv_cache_dtype: KVCacheDType = "auto"
    seed: int | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count = 2048
    max_num_prefill_tokens: Count | None = None
    max_num_queued_reqs: Count = 1024
    scheduling_policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    block_size: Count = 16
    kv_cache_memory_bytes: Count | None = None
    gpu_memory_utilization: Share = 0.92
    num_kv_blocks: Count | None = None
    speculative_config: SpeculativeConfig | None = None
    overlap_scheduling: bool | None = None
    enforce_eager: bool = False
    engine_hang_timeout: Seconds = 30.0
    deterministic: bool = False
    quiet: bool = False

    def most_seqs(self, device: str) -> int:
        """`max_num_seqs`, or what it is on a `cpu` or `cuda` where nothing is said."""
        return self.max_num_seqs or MAX_NUM_SEQS[device]
