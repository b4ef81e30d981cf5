"""How an engine is set up for a GPU, as far as that can be tried without one."""

from __future__ import annotations

import pytest
import torch
from support.configs import resolved_config

from pyllm.engine import build
from pyllm.engine.build import build_engine, check_settings, cuda_ops, step_bytes
from pyllm.engine.config import EngineConfig
from pyllm.engine.errors import EngineStartError
from pyllm.model import DeepForCausalLM
from pyllm.model.backend import Backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_device_cuda_is_refused_in_one_sentence(tiny_checkpoint):
    with pytest.raises(EngineStartError) as caught:
        build_engine(EngineConfig(model=str(tiny_checkpoint), device="cuda"))
    assert str(caught.value) == (
        "There is no CUDA device that torch can use: leave out --device cuda to run on the CPU."
    )


def test_kernels_that_cannot_run_are_replaced_with_a_warning(tiny_checkpoint, monkeypatch, caplog):
    from pyllm.model.cuda import backend as cuda

    class Broken(Backend):
        def __init__(self, model: DeepForCausalLM, *, deterministic: bool) -> None:
            pass

        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    model = DeepForCausalLM.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(cuda, "available", lambda config: True)
    monkeypatch.setattr(cuda, "TritonBackend", Broken)
    assert cuda_ops(model) is model.ops
    assert "using plain torch, which is slower: Failed to find C compiler. Please specify one" in caplog.text
    monkeypatch.setattr(cuda, "available", lambda config: False)
    assert cuda_ops(model) is model.ops
    assert "Triton is not installed" in caplog.text


@pytest.mark.parametrize("usable", [True, False])
def test_deterministic_on_a_gpu_works_or_refuses(tiny_checkpoint, monkeypatch, usable):
    from pyllm.model.cuda import backend as cuda

    made: list[bool] = []

    class StartedError(Exception):
        pass

    class Kernels(Backend):
        capturable = True

        def __init__(self, model: DeepForCausalLM, *, deterministic: bool) -> None:
            made.append(deterministic)

    def stop(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(cuda, "available", lambda config: usable)
    monkeypatch.setattr(cuda, "TritonBackend", Kernels)
    monkeypatch.setattr(build, "_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(build, "step_bytes", stop)
    plain = build.load_checkpoint

    def load(folder: object, **settings: object) -> object:
        return plain(folder, **{**settings, "device": torch.device("cpu")})

    monkeypatch.setattr(build, "load_checkpoint", load)
    config = EngineConfig(model=str(tiny_checkpoint), deterministic=True, quiet=True)
    with pytest.raises(StartedError if usable else EngineStartError) as caught:
        build_engine(config)
    assert made == [True] * usable
    if not usable:
        assert str(caught.value) == (
            "--deterministic needs the compiled CPU kernels or a GPU's Triton kernels, and neither can run here."
        )


def test_memory_for_steps_is_found_by_trying_the_largest_ones(tiny_checkpoint, monkeypatch):
    model = DeepForCausalLM.from_pretrained(tiny_checkpoint)
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def watched(ids, positions, metadata, *rest, **named):
        seen.append((len(ids), len(metadata.query_lens)))
        return forward(ids, positions, metadata, *rest, **named)

    model.forward = watched
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + 500)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    config = resolved_config(block_size=4, max_model_len=100, max_num_seqs=7, max_num_batched_tokens=250)
    assert step_bytes(model, config) == int(1000 * build.STEP_MARGIN) + build.GRAPH_BYTES
    assert seen == [(250, 3), (7, 7)]


def test_too_little_gpu_memory_names_the_flag(tiny_checkpoint, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(build, "load_checkpoint", load)
    with pytest.raises(EngineStartError, match="lower --gpu-memory-utilization, --max-num-batched-tokens or"):
        build_engine(EngineConfig(model=str(tiny_checkpoint)))


@pytest.mark.parametrize(("native", "setting"), [(False, {"quantization": "int8"}), (True, {"kv_cache_dtype": "fp8"})])
def test_impossible_settings_are_refused_before_loading(tiny_checkpoint, monkeypatch, native, setting):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(build, "load_checkpoint", load)
    monkeypatch.setattr(build, "native_available", lambda config: native)
    with pytest.raises(EngineStartError):
        build_engine(EngineConfig(model=str(tiny_checkpoint), device="cpu", **setting))


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_a_gpu_that_has_no_fp8_refuses_it_in_one_sentence(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = EngineConfig(model="m", kv_cache_dtype="fp8")
    if fits:
        check_settings(config, torch.device("cuda"), native=False)
        return
    with pytest.raises(EngineStartError) as caught:
        check_settings(config, torch.device("cuda"), native=False)
    assert str(caught.value) == (
        "--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or more; this one has less."
    )
