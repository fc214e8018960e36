"""Rotary position embedding for CPUs, where mlx has no kernel for it.

There it is made of 27 small operations, and a token spends more time on them than on its attention. Here
it is six, and one product for a single token: the angles are the same for all layers of a pass, so their
tables or matrices are made once.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.classes import become

_MATRIX_DIMS = 128
"""Most dimensions for which a product by a matrix takes less time than the operations it stands for."""


def cpu_rope(model: nn.Module) -> None:
    """Let the model's rotary embeddings compute the same in fewer operations. Kinds not known here stay."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    shared: dict[tuple[Any, ...], Angles] = {}
    for module in model.modules():
        if type(module) is nn.RoPE:
            key: tuple[Any, ...] = (module.dims, module.traditional, module.base, module.scale)
            exponents = mx.arange(0, module.dims, 2) / module.dims
            periods = mx.power(mx.array(float(module.base)), exponents) / module.scale
        elif type(module) is Llama3RoPE:
            periods = module._freqs
            key = (module.dims, module.traditional, id(periods))
        else:
            continue
        angles = shared.setdefault(key, Angles(periods, module.traditional))
        _replace_call(module, angles)


class Angles:
    """Rotations to all positions that a pass needs, in the layout of the rotated vectors."""

    def __init__(self, periods: mx.array, traditional: bool) -> None:
        """`periods` are the positions per radian of each pair; pairs are neighbours where `traditional`."""
        self._traditional = traditional
        speeds, ones = 1 / periods.astype(mx.float32), mx.ones(periods.shape)
        # One column per member of a pair, then the pairs in their order.
        axis = 1 if traditional else 0
        self._speeds = mx.stack([speeds, speeds], axis).flatten()
        self._signs = mx.stack([-ones, ones], axis).flatten()
        self._unit = mx.eye(self._speeds.size)
        self._turn = self._partners(self._unit) * self._signs
        self._last: tuple[Any, mx.array | tuple[mx.array, mx.array]] | None = None

    def rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """`x` [rows, heads, length, dims], which begins at position `offset` (of each row, if an array)."""
        rotation = self._rotation(offset, x.shape[-2], x.dtype)
        if isinstance(rotation, tuple):
            cosines, sines = rotation
            return x * cosines + self._partners(x) * sines
        return (x.squeeze(-2) @ rotation)[:, :, None]

    def _partners(self, x: mx.array) -> mx.array:
        if self._traditional:
            return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
        half = x.shape[-1] // 2
        return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)

    def _rotation(
        self, offset: int | mx.array, length: int, dtype: mx.Dtype
    ) -> mx.array | tuple[mx.array, mx.array]:
        # Caches change their offsets in place, so only the numbers tell whether a pass is still the same.
        numbers: Any = offset.tolist() if isinstance(offset, mx.array) else offset
        key = numbers, length, dtype
        if self._last is None or self._last[0] != key:
            starts = mx.array(numbers).reshape(-1, 1, 1, 1) if isinstance(numbers, list) else numbers
            if length > 1 or self._speeds.size > _MATRIX_DIMS:
                angles = (starts + mx.arange(length)[:, None]) * self._speeds
                cosines, sines = mx.cos(angles), mx.sin(angles) * self._signs
                self._last = key, (cosines.astype(dtype), sines.astype(dtype))
            else:
                self._last = key, self._matrix(starts * self._speeds).astype(dtype)
        return self._last[1]

    def _matrix(self, angles: mx.array) -> mx.array:
        """What multiplies the vectors of each row, or of all: [rows or 1, dims, dims]."""
        angles = angles.reshape(-1, 1, self._speeds.size)
        return self._unit * mx.cos(angles) + self._turn * mx.sin(angles)


def _replace_call(module: Any, angles: Angles) -> None:
    base, dims = type(module), module.dims

    def call(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if x.ndim != 4:
            return base.__call__(self, x, offset=offset)  # type: ignore[no-any-return]
        if x.shape[-1] == dims:
            return angles.rotate(x, offset)
        return mx.concatenate([angles.rotate(x[..., :dims], offset), x[..., dims:]], axis=-1)

    become(module, __call__=call)
