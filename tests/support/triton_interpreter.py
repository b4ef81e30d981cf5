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


_common: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
_types: dict[tuple[str, tuple[int, ...]], Any] = {}


def _typed(side: Any, sizes: tuple[int, ...]) -> Any:
    """Give the type of a shape to a tensor whose data NumPy will broadcast to it."""
    scalar = side.type.scalar
    if (known := _types.get((scalar.name, sizes))) is None:
        known = _types[scalar.name, sizes] = tl.block_type(scalar, list(sizes))
    return tl.tensor(side.handle, known)


def _broadcast_types(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Broadcast the types of the operands of one operation, which broadcasts their data itself."""
    left, right = (tuple(side.type.shape.values) if side.type.is_block() else () for side in (lhs, rhs))
    if left == right:
        return lhs, rhs
    if (sizes := _common.get((left, right))) is None:
        sizes = _common[left, right] = np.broadcast_shapes(left, right)
    return lhs if left == sizes else _typed(lhs, sizes), rhs if right == sizes else _typed(rhs, sizes)


_to_ir = tl.core.block_type.to_ir


def _block_to_ir(self: Any, builder: Any) -> Any:
    """Unsigned numbers become signed ones; most types stay."""
    return self if self.element_ty.name in _SAME else _to_ir(self, builder)


_check_types = interpreter.interpreter_semantic.binary_op_type_checking_impl
_SAME = {"fp32": float, "int32": int}
"""Types of tensors, and the numbers that take their type next to them."""


_ALIKE = {*_SAME, "fp64", "int64", "uint32", "int1"}
"""Types that stay as they are next to their like."""
_OFFSETS = {"int32", "int64"}


@functools.lru_cache(maxsize=4096)
def _filled(number: float, dtype: Any) -> Any:
    data = np.full(1, number, dtype=_by_dtype(dtype))
    data.flags.writeable = False
    return data


def _check_others(lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, *how: Any, **flags: Any) -> tuple[Any, Any]:
    """Find the common type of two operands, unless it is the first one's."""
    if type(lhs) is tl.tensor:
        dtype = lhs.dtype
        points = allow_lhs_ptr and dtype.is_ptr()
        if type(rhs) is tl.tensor:
            other = rhs.dtype.name
            if (other in _OFFSETS) if points else (other == dtype.name and other in _ALIKE):
                return _broadcast_types(lhs, rhs)
        elif type(rhs) is (number := int if points else _SAME.get(dtype.name)):
            dtype = tl.int32 if points else dtype
            if number is float or -(2**31) <= rhs < 2**31:
                return _broadcast_types(lhs, tl.tensor(interpreter.TensorHandle(_filled(rhs, dtype), dtype), dtype))
    return _check_types(lhs, rhs, allow_lhs_ptr, *how, **flags)


_unwrap = tl.core._unwrap_if_constexpr


def _unwrap_others(value: Any) -> Any:
    kind = type(value)
    return value if kind is tl.tensor or kind is int else value.value if kind is tl.constexpr else _unwrap(value)


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Call a function of the language without the checks of its wrapper."""
    inner = member.__wrapped__ if hasattr(member, "__wrapped__") else member

    def call(*args: Any, **how: Any) -> Any:
        how["_semantic"] = interpreter.interpreter_semantic
        return inner(*args, **how)

    scope.set_attr(obj, name, call)


interpreter._patch_attr = _patch_attr
tl.core._unwrap_if_constexpr = _unwrap_others
interpreter._get_np_dtype = _np_dtype
interpreter.interpreter_semantic.broadcast_impl_value = _broadcast_others
interpreter.interpreter_semantic.binary_op_type_checking_impl = _check_others
interpreter.TensorHandle.__post_init__ = lambda self: None  # a proof of the same kind
tl.core.block_type.to_ir = _block_to_ir
tl.core.block_type.__init__ = _block_once
tl.core.tensor.__init__ = _tensor_once
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=False)
