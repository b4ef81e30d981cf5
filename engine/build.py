"""Builds an engine from its configuration: loads the model, chooses its kernels and sizes the KV cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..model.backend import Backend
from ..model.checkpoint.loader import Outline, load_checkpoint, outline_checkpoint
from ..model.config import DeepConfig
from ..model.cpu.backend import NativeBackend
from ..model.cpu.backend import available as native_available
from ..model.cpu.library import InstructionSetError
from ..model.files import CheckpointError
from ..model.fp8 import centre, has_fp8
from ..model.network import DeepNetwork
from ..model.tokenizer import Tokenizer
from .config import EngineConfig, ResolvedConfig, settings_of
from .errors import EngineStartError
from .grammar.compiler import GrammarCompiler
from .host import check_threads, compute_cores
from .memory import is_out_of_memory, num_kv_blocks
from .messages import CheckGrammar, EngineInfo, EngineRequest, GraphInfo, Kernels, SamplingParams
from .runner.model_runner import ModelRunner
from .runner.step_graphs import CudaGraphs, GraphMaker, token_counts
from .step.core import EngineCore
from .step.request import Request, ScheduledSequence

logger = logging.getLogger(__name__)

# This many prompt tokens take about twice as long as a decode step of eight sequences, so streams slow down at most
# threefold.
PREFILL_TOKENS = {"cpu": 32, "cuda": 496}
# (prompt tokens, sequences that decode after the prompt)
WARM_UP_STEPS: dict[Kernels, tuple[tuple[int, int], ...]] = {
    "native": ((16, 1), (64, 8)),
    "torch": ((16, 1), (64, 8)),
    # Each kernel is compiled for several ranges of sizes, and for multiples of 16 and other numbers.
    "triton": ((7, 1), (16, 2), (24, 4), (32, 8), (50, 16), (64, 24), (500, 33), (512, 48), (1500, 64), (2048, 100)),
}
STEP_MARGIN = 1.1  # a step takes more GPU memory than its tensors, because free memory is fragmented
GRAPH_BYTES = 256 << 20  # the usual size of graphs in addition to their working memory
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_engine(
    config: EngineConfig, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> EngineCore:
    """Load the model and build its engine; raise `EngineStartError`, with one sentence for the user, if that fails.

    `on_progress` is called during loading, with how many bytes of the weights are loaded and how many there are.
    """
    try:
        return _build(config, on_progress)
    except CheckpointError as error:
        raise EngineStartError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = "--kv-cache-memory-bytes"
        if isinstance(error, torch.OutOfMemoryError):  # torch's type for a GPU's memory
            flags = "--gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs"
        raise EngineStartError(
            f"The model and its KV cache do not fit in memory: lower {flags}, or use --dtype bfloat16."
        ) from None


def _build(config: EngineConfig, on_progress: Callable[[int, int], object]) -> EngineCore:
    device = _device(config)
    shape = DeepConfig.from_folder(config.model, config.generation_config)
    native = _can_use_native(device, shape)
    check_settings(config, device, native)
    _check_context(config, shape)
    _start_compute_threads(2 if native else 1)
    model, report = load_checkpoint(
        Path(config.model), network=DeepNetwork, config=shape, dtype=_dtype(config, device, native), device=device,
        load_format=config.load_format, seed=config.seed or 0, progress=not config.quiet,
        on_progress=on_progress,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    if config.kv_cache_dtype == "fp8":
        for layer in model.layers:
            centre(layer)
    kernels = _choose_kernels(config, model, device, native)
    resolved = resolve(config, model)
    size = block_bytes(model, resolved)
    reserve = step_bytes(model, resolved) + size if device.type == "cuda" else 0
    num_blocks = num_kv_blocks(config, device, size, resolved.max_model_len, reserve)
    resolved = replace(resolved, num_kv_blocks=num_blocks)
    runner = ModelRunner(model, resolved)
    for length, count in WARM_UP_STEPS[kernels]:
        _rehearse(runner, [length], min(count, num_blocks), SamplingParams(temperature=1.0, seed=0))
    graphs = None
    if device.type == "cuda" and model.ops.capturable and not config.enforce_eager:
        graphs = _capture(runner, CudaGraphs(device))
    runner.observer.reset()
    info = EngineInfo(
        config=resolved, era=report.era, parameters=report.parameters, active_parameters=model.active_parameters,
        sizes=model.sizes, file_dtypes=report.file_dtypes,
        load_seconds=report.seconds, vocab_size=model.config.vocab_size, eos_token_ids=model.config.eos_token_ids,
        hidden_size=model.config.hidden_size, num_layers=model.config.num_hidden_layers,
        num_experts=model.config.experts if model.config.use_token_routed_mlp else 0,
        kernels=kernels, instruction_set=getattr(model.ops, "instruction_set", ""), graphs=graphs,
        chunk_multiple=model.ops.prefill_multiple,
    )  # fmt: skip
    tokenizer = partial(Tokenizer.from_folder, config.model)
    compiler = GrammarCompiler[Request | CheckGrammar](tokenizer, info.vocab_size, info.eos_token_ids)
    return EngineCore(info, runner, runner.observer, compiler)


def _start_compute_threads(pools: int) -> None:
    """Let OpenMP start its threads now; raise `RuntimeError` if the system allows fewer, since OpenMP would exit.

    Without `OMP_NUM_THREADS` there are at most as many as cores to compute on: torch counts those of the machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), compute_cores()))
    count = torch.get_num_threads()
    check_threads(pools * (count - 1))  # the compiled kernels have a pool of their own
    torch.empty(count << 16).fill_(0.0)  # large enough for every thread to have a part


def outline_model(config: EngineConfig, shape: DeepConfig) -> tuple[Outline, torch.device]:
    """Recognise a model with this `config.json`, and choose its device, without reading its weights.

    Raises as `build_engine` does.
    """
    device = _device(config)
    _check_context(config, shape)
    try:
        dtype = _dtype(config, device, _can_use_native(device, shape))
        return outline_checkpoint(Path(config.model), shape, dtype), device
    except CheckpointError as error:
        raise EngineStartError(str(error)) from None


def resolve(config: EngineConfig, model: DeepNetwork) -> ResolvedConfig:
    """Decide the settings that `config` leaves open; the number of KV blocks, which depends on memory, is 1 here."""
    device = model.device.type
    decided = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "max_model_len": config.max_model_len or model.config.max_position_embeddings,
        "max_num_seqs": config.most_seqs(device),
        "max_num_prefill_tokens": config.max_num_prefill_tokens or PREFILL_TOKENS[device],
        "num_kv_blocks": 1,
        "overlap_scheduling": device == "cuda" if config.overlap_scheduling is None else config.overlap_scheduling,
    }
    return ResolvedConfig(**{name: getattr(config, name) for name in settings_of(EngineConfig)} | decided)


def _choose_kernels(config: EngineConfig, model: DeepNetwork, device: torch.device, native: bool) -> Kernels:
    """Give the model its operations, and return which kernels they use."""
    if native:
        model.ops = NativeBackend(model, int8=config.quantization == "int8")
        return "native"
    if device.type == "cuda":
        model.ops = cuda_ops(model, deterministic=config.deterministic)
    if model.ops.capturable:
        return "triton"
    if config.deterministic:
        raise EngineStartError(
            "--deterministic needs the compiled CPU kernels or a GPU's Triton kernels, and neither can run here."
        )
    return "torch"


def cuda_ops(model: DeepNetwork, *, deterministic: bool = False) -> Backend:
    """Return the Triton kernels, or plain torch, with a warning, if they cannot run."""
    from ..model.cuda import backend as cuda  # slow: it imports Triton, which only a GPU needs

    reason = "Triton is not installed, or they cannot hold this model"
    if cuda.available(model.config):
        ops = cuda.TritonBackend(model, deterministic=deterministic)
        try:
            ops.rms_norm(model.norm[None], model.norm, model.config.rms_norm_eps)
        except Exception as error:  # for example without a C compiler, which Triton calls at its first kernel
            reason = _first_words(error)
        else:
            return ops
    logger.warning("The Triton kernels cannot run; using plain torch, which is slower: %s", reason)
    return model.ops


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _capture(runner: ModelRunner, maker: GraphMaker) -> GraphInfo | None:
    """Record steps as graphs; if that fails, log a warning and return None, because the engine works without them."""
    try:
        return runner.capture(maker, token_counts=token_counts(runner.config.max_num_batched_tokens))
    except RuntimeError as error:
        runner.graphs = None
        logger.warning("CUDA graphs cannot be recorded; all but very large steps are slower: %s", _first_words(error))
        return None


def step_bytes(model: DeepNetwork, config: ResolvedConfig) -> int:
    """Measure how much GPU memory the largest steps take, in addition to weights and KV cache, by running them."""
    device = model.device
    runner = ModelRunner(model, replace(config, num_kv_blocks=1))
    longest = config.max_model_len - 1
    whole, rest = divmod(config.max_num_batched_tokens, longest)
    lengths = [longest] * whole + [rest] * (rest > 0)
    params = SamplingParams(temperature=1.0, seed=0, top_p=0.9, frequency_penalty=0.1, logprobs=1)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _rehearse(runner, lengths[: config.max_num_seqs], config.max_num_seqs, params)
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner
    torch.cuda.empty_cache()
    return int(2 * peak * STEP_MARGIN) + GRAPH_BYTES  # graphs work in memory of their own


def _rehearse(runner: ModelRunner, lengths: list[int], count: int, params: SamplingParams) -> None:
    """Compute made-up prompts, and `count` decodes after them, so that the first real step is not slow.

    Their keys and values in the KV cache are overwritten later, like those of any finished sequence.
    """
    config = runner.config
    count = min(count, config.max_num_seqs)
    lengths = [min(length, config.max_num_batched_tokens, config.max_model_len - 1) for length in lengths]
    requests = []
    for index in range(max(count, len(lengths))):
        length = lengths[min(index, len(lengths) - 1)]
        request = Request(EngineRequest(request_id="warm-up", prompt_token_ids=[0] * length, params=params))
        # A prompt wraps around in one block: its results are never read.
        request.block_ids = [index % config.num_kv_blocks] * (length // config.block_size + 1)
        requests.append(request)
    runner.execute([ScheduledSequence(*pair, True) for pair in zip(requests, lengths, strict=False)])
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.append(0)
    runner.execute([ScheduledSequence(request, 1, True) for request in requests[:count]])


def _device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise EngineStartError("There is no CUDA device that torch can use: leave out --device cuda to run on the CPU.")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def _can_use_native(device: torch.device, shape: DeepConfig) -> bool:
    try:
        return device.type == "cpu" and native_available(shape)
    except InstructionSetError as error:
        raise EngineStartError(str(error)) from None


def _dtype(config: EngineConfig, device: torch.device, native: bool) -> torch.dtype:
    """Choose the weights' number format: in plain torch, FP32 is faster on a CPU without BF16 instructions."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    bf16 = native or device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def check_settings(config: EngineConfig, device: torch.device, native: bool) -> None:
    """Raise `EngineStartError`, before the weights are read, for settings that this device cannot support."""
    if config.quantization == "int8" and not native:
        raise EngineStartError("--quantization int8 needs the compiled CPU kernels, which cannot run on this machine.")
    if config.kv_cache_dtype == "fp8" and native:
        raise EngineStartError("--kv-cache-dtype fp8 needs a GPU: the compiled CPU kernels do not support it.")
    if config.kv_cache_dtype == "fp8" and not has_fp8(device):
        raise EngineStartError("--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or more; this one has less.")


def _check_context(config: EngineConfig, shape: DeepConfig) -> None:
    """Raise `EngineStartError` for a context that the model was not trained for, unless the user insists."""
    asked, context = config.max_model_len or 0, shape.max_position_embeddings
    if asked > context and not config.allow_long_max_model_len:
        raise EngineStartError(
            f"--max-model-len {asked} is more than the {context} positions that the model was trained for "
            "(max_position_embeddings in its config.json), and beyond them it writes nonsense: lower it, or insist "
            "with --allow-long-max-model-len (PYLLM_ALLOW_LONG_MAX_MODEL_LEN=1)."
        )


def block_bytes(model: DeepNetwork, config: EngineConfig) -> int:
    """Return the bytes of one KV block over all layers."""
    shape, itemsize = model.config, 1 if config.kv_cache_dtype == "fp8" else model.dtype.itemsize
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * config.block_size * itemsize
