"""From a configuration to a running engine core: loads the model and sizes the KV cache."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model.config import CheckpointError, DeepConfig
from ..model.loader import load_checkpoint
from ..model.native import NativeBackend
from ..model.native import available as native_available
from ..model.tokenizer import Tokenizer
from .config import EngineConfig
from .core import EngineCore
from .errors import EngineStartError
from .grammar import GrammarCompiler
from .memory import num_kv_blocks
from .messages import EngineInfo, EngineRequest, SamplingParams
from .model_runner import ModelRunner
from .request import Request
from .scheduler import ScheduledSequence

# Prompt tokens that take about twice as long as a decode step of eight sequences: streams slow down threefold at most.
PREFILL_TOKENS = {"cpu": 32, "cuda": 1024}
WARM_UP_STEPS = ((16, 1), (64, 8))
"""(prompt tokens, sequences that decode after it)."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_engine(config: EngineConfig) -> EngineCore:
    """Load the model and make its engine.

    Raises:
        EngineStartError: the checkpoint, the device or the memory do not allow it; one plain sentence.
    """
    try:
        return _build(config)
    except CheckpointError as error:
        raise EngineStartError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        # torch has a type of its own for a GPU's memory only.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise EngineStartError(
            "The model and its KV cache do not fit in memory: lower --kv-cache-memory-bytes, or use --dtype bfloat16."
        ) from None


def _build(config: EngineConfig) -> EngineCore:
    device = _device(config)
    model, report = load_checkpoint(
        Path(config.model),
        dtype=_dtype(config, device),
        device=device,
        load_format=config.load_format,
        seed=config.seed or 0,
        progress=not config.quiet,
    )
    model.eval().requires_grad_(False)
    native = device.type == "cpu" and native_available(model.config)
    if config.quantization == "int8" and not native:
        raise EngineStartError("--quantization int8 needs the CPU's compiled kernels, which this machine cannot use.")
    if config.deterministic and not native:
        raise EngineStartError(
            "--deterministic needs the CPU's compiled kernels, which this machine, device or model cannot use."
        )
    if native:
        model.ops = NativeBackend(model, int8=config.quantization == "int8")
    max_model_len = config.max_model_len or model.config.max_position_embeddings
    size = block_bytes(model.config, config.block_size, model.dtype.itemsize)
    num_blocks = num_kv_blocks(config, device, size, max_model_len)
    info = EngineInfo(
        era=report.era,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        parameters=report.parameters,
        file_dtypes=report.file_dtypes,
        load_seconds=report.seconds,
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=model.config.eos_token_ids,
        kernels="native" if native else "torch",
        quantization=config.quantization,
        chunk_multiple=model.ops.prefill_multiple,
        max_num_prefill_tokens=config.max_num_prefill_tokens or PREFILL_TOKENS[device.type],
        scheduling_policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
        speculative_config=config.speculative_config,
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        num_experts=model.config.num_experts if model.config.use_token_routed_mlp else 0,
    )
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=config.block_size)
    _warm_up(runner, info)
    grammars = GrammarCompiler(lambda: Tokenizer.from_folder(config.model), info.vocab_size, info.eos_token_ids)
    return EngineCore(info, runner, runner.watcher, grammars)


def _warm_up(runner: ModelRunner, info: EngineInfo) -> None:
    """Compute prompts, and decodes after them, of no request, so that the first one finds everything in place.

    What they write to the KV cache is written over, like all that a finished sequence leaves there.
    """
    params = SamplingParams(temperature=1.0, seed=0)
    for length, count in WARM_UP_STEPS:
        length = min(length, info.max_num_batched_tokens, info.max_model_len - 1)
        message = EngineRequest(request_id="warm-up", prompt_token_ids=[0] * length, params=params)
        requests = [Request(message, ()) for _ in range(min(count, info.max_num_seqs, info.num_blocks))]
        for block_id, request in enumerate(requests):
            # Prompts wrap around in one block: what they compute is of no use to anybody.
            request.block_ids = [block_id] * (length // info.block_size + 1)
        runner.execute([ScheduledSequence(requests[0], length, True)])
        for request in requests:
            request.append(0)
            request.num_computed_tokens = length
        runner.execute([ScheduledSequence(request, 1, True) for request in requests])
    runner.watcher.reset()


def _device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise EngineStartError("There is no CUDA device that torch can use: leave out --device cuda to run on the CPU.")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The weights' number format; where the CPU has no instructions for BF16, FP32 is the faster one."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    bf16 = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def block_bytes(config: DeepConfig, block_size: int, itemsize: int) -> int:
    """Bytes of one KV block over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_size * itemsize
