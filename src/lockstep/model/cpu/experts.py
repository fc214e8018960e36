"""Experts' weights in tiles, as those of other layers (`cpu/tiles.py`).

mlx multiplies each token by each of its experts alone, which OpenBLAS does not do before it has copied all
weights of that expert.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from lockstep.model.blas import AVX512, kernels
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.layers import retype
from lockstep.model.cpu.tiles import FEWEST_ROWS, SMALL_PRODUCT, TILES, WORTH_A_CORE

TILED_DIMENSIONS = 4


def cpu_experts(model: nn.Module) -> None:
    """Let the experts of `model` multiply by tiles once their weights are such."""
    if kernels() in AVX512:
        retype(model, {SwitchLinear: TiledExperts})


def lay_out_experts(model: nn.Module) -> None:
    """Make tiles, lazily, of the weights of all experts that multiply by them, where they fit."""
    for module in model.modules():
        # Those of other ranks are None.
        if isinstance(module, TiledExperts) and module.get("weight") is not None:
            _, outputs, inputs = module["weight"].shape
            tile = next((tile for tile in TILES if outputs % tile == 0), None)
            if tile is not None and inputs * tile <= SMALL_PRODUCT:
                module["weight"] = tiled(module["weight"], tile)


def tiled(weight: mx.array, tile: int) -> mx.array:
    """`weight` [experts, outputs, inputs] as [experts, outputs / tile, inputs, tile]."""
    experts, outputs, inputs = weight.shape
    return mx.contiguous(weight.reshape(experts, outputs // tile, tile, inputs).swapaxes(-1, -2))


def whole(tiles: mx.array) -> mx.array:
    """The opposite of `tiled`."""
    experts, count, inputs, tile = tiles.shape
    return tiles.swapaxes(-1, -2).reshape(experts, count * tile, inputs)


def gathered(x: mx.array, tiles: mx.array, indices: mx.array) -> mx.array:
    """Each of `x` [..., rows, inputs] times the weights of its expert: [*indices, rows, outputs].

    `indices` [...] name the experts; what comes before the rows of `x` is broadcast to them.
    """
    count, inputs, tile = tiles.shape[1:]
    rows = x.shape[-2]
    multiplications = indices.size * max(rows, FEWEST_ROWS) * count * inputs * tile
    products = on_cores(partial(_gathered, x, tiles, indices), count, multiplications // WORTH_A_CORE, 0)
    return mx.moveaxis(products, 0, -2).reshape(*indices.shape, rows, count * tile)


def _gathered(x: mx.array, tiles: mx.array, indices: mx.array, first: int, last: int) -> mx.array:
    """Those of each expert's tiles from `first` to before `last`: [tiles, *indices, rows, tile]."""
    experts, count, inputs, tile = tiles.shape
    # One tile after the other, each with all tokens of its expert: it stays in the processor's cache.
    places = mx.arange(first, last, dtype=mx.uint32).reshape(-1, *[1] * indices.ndim)
    of_tiles = indices.astype(mx.uint32) * count + places
    return products(x, tiles.reshape(experts * count, inputs, tile), of_tiles)


def products(x: mx.array, matrices: mx.array, indices: mx.array) -> mx.array:
    """Each of `x` [..., rows, inputs] times one of `matrices` [all, inputs, outputs].

    `indices` name these; what comes before the rows of `x` is broadcast to them: [*indices, rows, outputs].
    """
    of_x = mx.arange(math.prod(x.shape[:-2]), dtype=mx.uint32).reshape(x.shape[:-2])
    return mx.gather_mm(
        x.reshape(-1, *x.shape[-2:]),
        matrices,
        lhs_indices=mx.broadcast_to(of_x, indices.shape),
        rhs_indices=indices,
    )


def with_biases(output: mx.array, layer: nn.Module, indices: mx.array) -> mx.array:
    """`output` [*indices, rows, outputs] of experts, and their biases if they have any."""
    return output + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else output


class TiledExperts(SwitchLinear):  # type: ignore[misc]
    """Experts that multiply by tiles, until somebody else asks for their weights."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if not self.are_tiles:
            return super().__call__(x, indices, sorted_indices)  # type: ignore[no-any-return]
        return with_biases(gathered(x, self["weight"], indices), self, indices)

    @property
    def are_tiles(self) -> bool:
        """Whether the weights are tiles now."""
        return self["weight"].ndim == TILED_DIMENSIONS  # type: ignore[no-any-return]

    @property
    def weight(self) -> mx.array:
        """Those [experts, outputs, inputs], as they lie from now on: they would be copied every time."""
        if self.are_tiles:
            self["weight"] = whole(self["weight"])
        return self["weight"]  # type: ignore[no-any-return]
