"""Fixes the faults of Triton's interpreter that our kernels meet, and makes it faster; import it before Triton.

`benchmarks/gpu/gpu_check.py --dry-run --setup` runs this file too.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _as_float(data: Any) -> Any:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrowed(data: Any) -> Any:
    """Round FP32 to the nearest BF16, as hardware does; the interpreter truncates."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16).reshape(data.shape)


_cast = interpreter.InterpreterBuilder.cast_impl


def _fixed_cast(self: Any, src: Any, dst_type: Any) -> Any:
    target = dst_type.scalar
    if src.dtype.scalar == tl.float32 and target == tl.bfloat16:
        return interpreter.TensorHandle(_narrowed(src.data), target)
    if src.dtype.scalar == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(_as_float(src.data), target)
    return _cast(self, src, dst_type)


def _fixed_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
    """Multiply BF16 numbers; the interpreter multiplies their bit patterns as integers.

    Row by row, since NumPy may sum two rows of a product in different orders, which no GPU does.
    """
    left, right = (_as_float(side.data) if side.dtype.scalar == tl.bfloat16 else side.data for side in (a, b))
    product = np.matmul(left[:, None], right, dtype=np.float32)[:, 0]
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _fixed_fp8(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
    """Convert from and to FP8; the interpreter does not carry when it rounds up. Overflow is NaN."""
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.float8e4nv:
        bits = torch.from_numpy(np.array(src.data, dtype=np.uint8))
        data = bits.view(torch.float8_e4m3fn).float().numpy()
        return interpreter.TensorHandle(_narrowed(data) if target == tl.bfloat16 else data, target)
    assert (source, target) == (tl.float32, tl.float8e4nv)
    wide = torch.from_numpy(np.array(src.data, dtype=np.float32))
    bits = wide.to(torch.float8_e4m3fn).view(torch.uint8)
    bits[wide.abs() > 448] = 0x7F
    return interpreter.TensorHandle(bits.numpy(), target)


_patch_tensor = interpreter._patch_lang_tensor


def _fixed_tensor(tensor: Any, scope: Any) -> None:
    """Let a scalar, an array of one element, be a loop's bound, which NumPy 2.4 and later refuse."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_lang = interpreter._patch_lang
_patched: dict[tuple[str, ...], Any] = {}


class _Kept:
    def restore(self) -> None:
        pass


def _patch_once(function: Any) -> _Kept:
    """The language is replaced by the interpreter's for good, instead of at every call of a function."""
    names = tuple(name for name in ("tl", "core") if name in function.__globals__)
    if names not in _patched:
        _patched[names] = _patch_lang(function)
    return _Kept()


interpreter._patch_lang = _patch_once
interpreter._patch_lang_tensor = _fixed_tensor
interpreter.InterpreterBuilder.cast_impl = _fixed_cast
interpreter.InterpreterBuilder.create_dot = _fixed_dot
interpreter.InterpreterBuilder.create_fp_to_fp = _fixed_fp8
# Without these, most of the time goes into a table rebuilt at every look-up, a proof at every sum of integers that it
# fits, which with shapes this small tells nothing, descriptions of the same few shapes, and how to add like to like.
_by_dtype = functools.cache(interpreter._get_np_dtype)


def _np_dtype(dtype: Any) -> Any:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _by_dtype(scalar)


_init_block, _init_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _sizes(shape: Any) -> tuple[int, ...]:
    values = getattr(shape, "values", None) or getattr(shape, "value", shape)
    return tuple([getattr(size, "value", size) for size in values])


def _block_once(self: Any, element_ty: Any, shape: Any) -> None:
    """Describe each block once; a tensor's shape is checked when it is new."""
    sizes = _sizes(shape)
    known = _blocks.get((element_ty.name, sizes))
    if known is None:
        _init_block(self, element_ty, shape)
        _blocks[element_ty.name, sizes] = dict(self.__dict__)
    else:
        self.__dict__.update(known)


def _tensor_once(self: Any, handle: Any, type: Any) -> None:
    """Share the shape of all tensors that have the same."""
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in _shapes:
        _init_tensor(self, handle, type)
        _shapes[sizes] = self.shape, self.numel
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[sizes]


_broadcast = interpreter.interpreter_semantic.broadcast_impl_value


def _broadcast_others(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Broadcast two tensors, unless their shapes are equal."""
    sides = [side.type.shape.values if side.type.is_block() else [] for side in (lhs, rhs)]
    return (lhs, rhs) if sides[0] == sides[1] else _broadcast(lhs, rhs)


_to_ir = tl.core.block_type.to_ir


def _block_to_ir(self: Any, builder: Any) -> Any:
    """Unsigned numbers become signed ones; most types stay."""
    return self if self.element_ty.name in _SAME else _to_ir(self, builder)


_check_types = interpreter.interpreter_semantic.binary_op_type_checking_impl
_SAME = {"fp32": float, "int32": int}
"""Types of tensors, and the numbers that take their type next to them."""


@functools.lru_cache(maxsize=4096)
def _filled(number: float, dtype: Any, sizes: tuple[int, ...]) -> Any:
    data = np.full(sizes or (1,), number, dtype=_by_dtype(dtype))
    data.flags.writeable = False
    return data


def _check_others(lhs: Any, rhs: Any, *how: Any, **flags: Any) -> tuple[Any, Any]:
    """Find the common type of two operands, unless it is the first one's."""
    dtype = lhs.dtype if type(lhs) is tl.tensor else None
    number = dtype and _SAME.get(dtype.name)
    if number:
        if type(rhs) is tl.tensor and rhs.dtype.name == dtype.name:
            return _broadcast_others(lhs, rhs)
        if type(rhs) is number and (number is float or -(2**31) <= rhs < 2**31):
            sizes = tuple(lhs.type.shape.values) if lhs.type.is_block() else ()
            return lhs, tl.tensor(interpreter.TensorHandle(_filled(rhs, dtype, sizes), dtype), lhs.type)
    return _check_types(lhs, rhs, *how, **flags)


interpreter._get_np_dtype = _np_dtype
interpreter.interpreter_semantic.broadcast_impl_value = _broadcast_others
interpreter.interpreter_semantic.binary_op_type_checking_impl = _check_others
interpreter.TensorHandle.__post_init__ = lambda self: None  # a proof of the same kind
tl.core.block_type.to_ir = _block_to_ir
tl.core.block_type.__init__ = _block_once
tl.core.tensor.__init__ = _tensor_once
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=False)
