"""Read checkpoint files of any era straight into the network's stacked parameters, and write them back.

Files are memory-mapped piece by piece and each piece is released once it is copied, so that loading needs little more
memory than the model itself. A network is returned only if every tensor fits.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import Architecture, DeepConfig
from ..files import CheckpointError, folder_of, is_present, newest_pack, read_json, shown
from ..network import DeepNetwork
from .eras import (
    EXPORT,
    FIRST_ROUTE,
    LATEST,
    OPTIONAL,
    REWRITE,
    SIBLING,
    Entry,
    Era,
    detect,
    is_derived,
    plan,
    shortened,
)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"(?!\.)[\w.+-]{1,200}\.safetensors", re.ASCII)
PIECE_ELEMENTS = 1 << 20  # mapped and copied at once: 4 MiB of FP32
PROGRESS_DELAY = 1.0  # loading takes at least this many seconds before a bar is shown
DUMMY_STD = 0.02

Network = TypeVar("Network", bound=DeepNetwork)


class LoadReport(NamedTuple):
    """Facts about the loaded weights."""

    era: str  # "dummy" and the newest era for random weights
    file_dtypes: tuple[str, ...]  # of the weights in the files, such as ("BF16", "F32"); empty for random weights
    parameters: int  # weights in memory, shared ones counted once
    bytes: int  # of the tensors read
    seconds: float


class Outline(NamedTuple):
    """A checkpoint whose names, shapes and dtypes fit together, before its weights are read."""

    era: Era
    network: DeepNetwork  # without memory
    tensors: dict[str, StoredTensor]  # by name without a leading `model.`

    @property
    def file_dtypes(self) -> tuple[str, ...]:
        """The number formats of its weights, as in `LoadReport`."""
        weights = (tensor for key, tensor in self.tensors.items() if not is_derived(key, self.era))
        return tuple(sorted({tensor.dtype for tensor in weights if tensor.dtype in FLOATS}))


class StoredTensor(NamedTuple):
    """A tensor in a file; `offset` in bytes from the file's start."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def load_checkpoint(
    folder: Path,  # holds `config.json` and the weights; or a `.safetensors` file next to its `config.json`
    *,
    network: type[Network],
    config: DeepConfig | None = None,  # by default, its `config.json`
    dtype: torch.dtype,  # of the large matrices; values are rounded to nearest
    device: torch.device,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,  # of the dummy weights
    progress: bool = True,  # show a bar on stderr if loading takes long and stderr is a terminal
    on_progress: Callable[[int, int], object] = lambda done, total: None,  # called with bytes after each tensor
) -> tuple[Network, LoadReport]:
    """Build a checkpoint's network and fill it, using at most one layer's memory beyond the model's own.

    The format "dummy" reads only `config.json`, and builds a network of the newest era with those sizes and random
    weights. Raises `CheckpointError` for a file that is missing, damaged or does not fit.
    """
    started = time.monotonic()
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: pass the folder that holds config.json and model.safetensors.")
    config = config or DeepConfig.from_folder(folder)
    read: list[StoredTensor] = []
    if load_format == "dummy":
        arch = Architecture.latest(config)
        _outline(config, arch, dtype, folder)
        model = network(config, arch, dtype=dtype, device=device)
        _fill_at_random(model, seed)
        name = f"dummy {arch.era}"
    else:
        era, outline, stored = outline_checkpoint(folder, config, dtype)
        model = network(outline.config, outline.architecture, dtype=dtype, device=device)
        read = _fill(model, plan(era, model), stored, progress, on_progress)
        if era is FIRST_ROUTE:
            _derive_routes(model)
        name = era.name
    dtypes = tuple(sorted({tensor.dtype for tensor in read if tensor.dtype in FLOATS}))
    parameters, size = sum(p.numel() for p in model.parameters()), sum(tensor.nbytes for tensor in read)
    return model, LoadReport(name, dtypes, parameters, size, time.monotonic() - started)


def outline_checkpoint(folder: Path, config: DeepConfig, dtype: torch.dtype) -> Outline:
    """Recognise a checkpoint by the tensors its files list; raise `CheckpointError` if they do not fit together."""
    stored = _read_headers(folder)
    era, arch, config = detect({key: tensor.shape for key, tensor in stored.items()}, config, folder)
    outline = _outline(config, arch, dtype, folder)
    _check(stored, plan(era, outline), outline, era, folder)
    return Outline(era, outline, stored)


def _outline(config: DeepConfig, arch: Architecture, dtype: torch.dtype, folder: Path) -> DeepNetwork:
    """Build the network without memory, since the sizes in the file may be nonsense; raise for an impossible one."""
    try:
        return DeepNetwork(config, arch, dtype=dtype, device="meta")
    except CheckpointError as error:
        raise CheckpointError(f"{folder_of(folder) / 'config.json'}: {error}") from None


def _find_files(path: Path) -> list[Path]:
    """Find the safetensors files of the checkpoint at `path`, a folder or a file."""
    if not path.is_dir():
        if path.suffix == ".safetensors" and is_present(path):
            return [path]
        if path.suffix in PICKLES:
            raise _pickle_error(path)
        raise CheckpointError(f"{path} is not a .safetensors file: pass one, or the folder that holds it.")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if is_present(single):
        return [single]
    if (listed := read_json(index)) is not None:
        shards = [path / name for name in _shards(index, listed.get("weight_map"))]
        if absent := shortened([shard.name for shard in shards if not is_present(shard)]):
            raise CheckpointError(f"{path} lacks {absent}, which {index.name} lists: fetch the folder again.")
        return shards
    files = sorted(path.glob("*.safetensors"))
    steps = {int(m[1]): file for file in files if (m := re.fullmatch(r"step_(\d+)\.safetensors", file.name))}
    if steps:
        return [steps[max(steps)]]
    if len(files) == 1:
        return files
    if not files and (pack := newest_pack(file.name for file in path.iterdir() if file.is_dir())):
        return _find_files(path / pack)
    if names := shortened([file.name for file in files]):
        raise CheckpointError(f"{path} holds {names}: pass the path of one of them.")
    if pickles := sorted(file for file in path.glob("*") if file.suffix in PICKLES):
        raise _pickle_error(pickles[0])
    raise CheckpointError(f"{path} holds no .safetensors file: pass the folder that holds model.safetensors.")


def _shards(index: Path, weight_map: Any) -> list[str]:
    """Return the names of the files in the `weight_map` of an index; raise if one is not a file next to it."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not an index with a weight_map: fetch it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} lists {shown(name)}, which is not the name of a .safetensors file: fetch it again."
            )
    return sorted(set(weight_map.values()))


def _pickle_error(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run code when it is read, so convert it once: python -c 'import torch, "
        "safetensors.torch as s; s.save_file({k: v.contiguous().clone() for k, v in "
        f'torch.load("{file}", map_location="cpu", weights_only=True).items()}}, "{file.parent}/model.safetensors")\'.'
    )


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read where all files' tensors are, by name without a leading `model.`."""
    stored: dict[str, StoredTensor] = {}
    for path in _find_files(folder):
        is_present(path)
        try:
            with safe_open(path, framework="np"):
                pass  # opening it checks the length of the file and every offset
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({str(error)[:200].rstrip('.')}): fetch it again."
            ) from None
        header.pop("__metadata__", None)
        for name, value in header.items():
            begin, end = value["data_offsets"]
            tensor = StoredTensor(path, name, value["dtype"], tuple(value["shape"]), 8 + length + begin, end - begin)
            if stored.setdefault(key := name.removeprefix("model."), tensor) is not tensor:
                raise CheckpointError(f"{path} holds {key} again: fetch the checkpoint into a new folder.")
    return stored


def _check(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, Entry], model: DeepNetwork, era: Era, path: Path
) -> None:
    """Raise for names, shapes and dtypes that do not fit, before any weight is read."""
    if unknown := [t.name for key, t in stored.items() if key not in expected and not is_derived(key, era)]:
        raise CheckpointError(
            f"{path} has tensors that a network of era {model.architecture.era} with its config.json does not have "
            f"({shortened(unknown)}): use the config.json that was saved with it, or a checkpoint of a known era."
        )
    needed = [key for key in expected if not OPTIONAL.fullmatch(key)]
    if not era.routes_by_modulo:
        needed += [key for key in expected if key.endswith("token_to_expert")]
    absent = [key for key in needed if key not in stored]
    if missing := shortened([key for key in absent if key != "lm_head.weight"]):
        raise CheckpointError(
            f"{path} lacks {missing}: fetch it again together with its config.json, or pass a Complexity-Deep model if "
            "it is another kind."
        )
    if absent and not model.architecture.tied:
        raise CheckpointError(
            f"{path} lacks lm_head.weight: fetch it again, or set tie_word_embeddings to true in config.json."
        )
    for key, entry in expected.items():
        if (tensor := stored.get(key)) is None:
            continue
        if tensor.shape != entry.shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has the shape {list(tensor.shape)}, but config.json implies "
                f"{list(entry.shape)}: use the config.json that was saved with it."
            )
        is_table = not entry.parts[0].target.is_floating_point()
        if tensor.dtype not in (INTEGERS if is_table else FLOATS):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} is stored as {tensor.dtype}, which is not supported: "
                + ("save it as I64, since it lists experts." if is_table else "save it as F32, F16 or BF16.")
            )


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread for it


def _fill(
    model: DeepNetwork, expected: Mapping[str, Entry], stored: Mapping[str, StoredTensor], progress: bool,
    on_progress: Callable[[int, int], object],
) -> list[StoredTensor]:  # fmt: skip
    """Copy all tensors to their parameters and fill those that the file lacks; return the tensors read."""
    for key in expected.keys() - stored.keys() - {"lm_head.weight"}:
        for target, *_ in expected[key].parts:
            if key.endswith("token_to_expert"):
                torch.arange(len(target), out=target).remainder_(model.config.experts)
            else:
                target.zero_()
    wanted = {key: stored[key] for key in expected if key in stored}
    if model.architecture.tied and "lm_head.weight" in stored:
        del wanted["embed_tokens.weight"]  # both share a parameter; if they differ in the file, the head's tensor wins
    order = sorted(wanted.items(), key=lambda item: (item[1].path, item[1].offset))
    total, done = sum(tensor.nbytes for tensor in wanted.values()), 0
    hidden = None if progress else True  # None: hidden unless stderr is a terminal
    with _Bar(total=total, unit="B", unit_scale=True, desc="Loading", delay=PROGRESS_DELAY, disable=hidden) as bar:
        for path, tensors in itertools.groupby(order, lambda item: item[1].path):
            with path.open("rb") as file:
                for key, tensor in tensors:
                    _copy(file, tensor, expected[key], model.config.experts)
                    bar.update(tensor.nbytes)
                    done += tensor.nbytes
                    on_progress(done, total)
    return list(wanted.values())


def _copy(file: BinaryIO, tensor: StoredTensor, entry: Entry, experts: int) -> None:
    """Copy one tensor of a file to its parts, piece by piece; raise for values that are not finite."""
    kind = (FLOATS | INTEGERS)[tensor.dtype]
    shape = tensor.shape[-max(part.target.dim() for part in entry.parts) :] or (1,)
    for index, first, size in _pieces(shape, any(part.transposed for part in entry.parts)):
        # A private mapping of only this piece, so that its pages are freed with it.
        begin = tensor.offset + first * kind.itemsize
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        count = math.prod(size)
        length = begin - start + count * kind.itemsize
        mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        piece = torch.frombuffer(mapping, dtype=kind, count=count, offset=begin - start).view(size)
        low, high = (float(bound) for bound in piece.aminmax())
        if not kind.is_floating_point and not 0 <= low <= high < experts:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} refers to experts {low:.0f} to {high:.0f}, but there are only "
                f"{experts}: use the config.json that was saved with it."
            )
        limit = torch.finfo(entry.parts[0].target.dtype).max if kind.is_floating_point else math.inf
        if not -limit <= low <= high <= limit:  # false for NaN too
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} holds NaN, infinite or too large values: "
                "fetch it again, or use a checkpoint from before the training diverged."
            )
        column = 0
        for part in entry.parts:
            source = piece.narrow(-1, column, part.width)
            column += part.width
            if part.target.numel():  # the first layer reads no mu
                target = part.target[index]
                # Transposing within one dtype is faster.
                target.copy_(source.to(target.dtype).mT if part.transposed else source)


def _derive_routes(model: DeepNetwork) -> None:
    """Fill tables of a file with one row only: the next row has the next expert, or the first after the last."""
    for layer in model.layers:
        assert layer.routes is not None
        steps = torch.arange(len(layer.routes), device=model.device)[:, None]
        layer.routes.copy_((layer.routes[:1] + steps) % model.config.experts)


def _pieces(shape: tuple[int, ...], whole: bool) -> Iterator[tuple[tuple[int | slice, ...], int, tuple[int, ...]]]:
    """Cut a tensor into matrices, and these into runs of rows unless `whole`: index, first element, shape of each."""
    if len(shape) == 3:
        for outer in range(shape[0]):
            for index, first, size in _pieces(shape[1:], whole):
                yield (outer, *index), outer * math.prod(shape[1:]) + first, size
    elif len(shape) == 1 or whole:
        yield (), 0, shape
    else:
        step = max(1, PIECE_ELEMENTS // shape[1])
        for row in range(0, shape[0], step):
            stop = min(row + step, shape[0])
            yield (slice(row, stop),), row * shape[1], (stop - row, shape[1])


@torch.no_grad()
def _fill_at_random(model: DeepNetwork, seed: int) -> None:
    """Fill with weights whose activations stay finite at any depth, since each layer adds little to the residual."""
    generator = torch.Generator(model.device).manual_seed(seed)
    residual = DUMMY_STD / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm", "output_gates")):
            parameter.fill_(1.0)
        elif name.endswith("controller_out_bias"):
            # alpha 0.9, beta 0.1, gate 0.5 for a controller output of 0, as training starts.
            starts = torch.tensor((math.log(0.9 / 0.1), math.log(math.expm1(0.1)), 0.0))
            parameter.copy_(starts.repeat_interleave(model.config.hidden_size))
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            std = residual if name.endswith(("o_proj", "down")) else DUMMY_STD
            parameter.normal_(0.0, std, generator=generator)
    for name, table in model.named_buffers():
        if name.endswith("token_to_expert"):
            torch.arange(len(table), out=table).remainder_(model.config.experts)
        elif name.endswith("routes"):
            scores = torch.rand(table.shape[1], model.config.experts, generator=generator, device=model.device)
            table.copy_(scores.argsort(dim=1)[:, : len(table)].T)


def save_checkpoint(model: DeepNetwork, folder: Path, *, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` in the newest format of the model's line.

    Models of any era can be saved; tensors that the era lacks are left out. The folder is created if missing, and files
    in it are overwritten. `dtype` applies to the large matrices. Norms, biases and the router are written in FP32, as
    the network keeps them, so that loading in `dtype` gives exactly the saved weights.
    """
    arch = model.architecture
    era = EXPORT if arch.routes else SIBLING if not arch.mu else REWRITE if arch.mu_guidance else LATEST
    tensors: dict[str, Tensor] = {}
    for key, entry in plan(era, model).items():
        if (key == "lm_head.weight" and arch.tied) or ("mu_to_v" in key and not arch.mu_highway):
            continue
        views = [part.target.mT if part.transposed else part.target for part in entry.parts]
        whole = torch.cat(views, dim=-1).cpu()
        if not whole.numel():  # the first layer reads no mu, but files have its weights
            whole = torch.zeros(entry.shape)
        if whole.is_floating_point():
            small = whole.dim() == 1 or key.endswith(("mu_router.weight", "hash_channel_scale"))
            whole = whole.to(torch.float32 if small else dtype)
        name = key if arch.mu_guidance or key == "lm_head.weight" else f"model.{key}"
        tensors[name] = whole.reshape(entry.shape).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    values = model.config.to_dict() | {"tie_word_embeddings": arch.tied}
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(config.stat().st_mode)  # the library makes the file readable by its owner only
