"""Weights in tiles, which OpenBLAS multiplies by where they lie.

It copies a matrix into the order of its kernels before it multiplies, which takes 3 to 4 times as long as
reading it. Its kernels for AVX-512 leave that out for small products. So a large product is made of small
ones here, a few rows times one tile of the weights each, which this rank's cores share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import AVX512, kernels
from lockstep.model.cpu.blocks import by_blocks
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.layers import retype

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS takes a product for small."""

TILES = (64, 32, 16)
"""Outputs of one tile, the fastest first."""

TILED_DIMENSIONS = 5

MOST_ROWS, FEWEST_ROWS = 16, 4
"""Rows of one small product."""

SLICES = (16, 8)
"""Outputs of one small product by a matrix, the fastest first."""

ROWS_OF_SLICES = range(3, 65)
"""OpenBLAS copies no matrix for fewer, and more are multiplied in less time by a copy."""

MOST_PARTS = 32
"""Of all inputs, for which the products are made one by one and summed."""

WORTH_A_CORE = 16_000_000
"""Multiplications that repay handing them to another core: 0.8 ms for a few rows."""

MOST_NUMBERS = 2**31 - 1
"""That mlx can count of the tiles of all products in one call: it keeps the place of each in 32 bits."""


def cpu_tiles(model: nn.Module) -> None:
    """Let linear layers, and embeddings that are the head, multiply by tiles once their weights are such."""
    if kernels() in AVX512:
        retype(model, {nn.Linear: TiledLinear, nn.Embedding: TiledEmbedding})


def tile_of(
    outputs: Sequence[int], inputs: int, tiles: Sequence[int] = TILES, most_parts: int = MOST_PARTS
) -> tuple[int, int] | None:
    """How to cut weights of so many `outputs`, of which each must begin with a tile, and of so many inputs.

    Returns the outputs of a tile, the first of `tiles` that fits, and into how many parts its inputs are cut;
    None if there is no way.
    """
    if sum(outputs) * inputs > MOST_NUMBERS:
        return None
    for tile in tiles:
        if any(count % tile for count in outputs):
            continue
        most = SMALL_PRODUCT // (tile * FEWEST_ROWS)
        for parts in range(1, most_parts + 1):
            if inputs % parts == 0 and inputs // parts <= most:
                return tile, parts
    return None


def tiled(weights: Sequence[mx.array], tile: int, parts: int) -> mx.array:
    """All `weights` [outputs, inputs] as [their outputs / tile, parts, 1, inputs / parts, tile]."""
    views = [
        weight.reshape(-1, tile, parts, 1, weight.shape[1] // parts).transpose(0, 2, 3, 4, 1)
        for weight in weights
    ]
    return mx.contiguous(mx.concatenate(views))


def whole(tiles: mx.array) -> mx.array:
    """The opposite of `tiled`."""
    count, parts, _, width, tile = tiles.shape
    return tiles.transpose(0, 4, 2, 1, 3).reshape(count * tile, parts * width)


def multiplied(x: mx.array, weights: mx.array) -> mx.array:
    """`x` [..., inputs] times the weights, which are tiles or [outputs, inputs]: [..., outputs]."""
    by, unit = (_by_tiles, 1) if weights.ndim == TILED_DIMENSIONS else (by_matrix, SLICES[0])

    def compute(first: int, last: int) -> mx.array:
        own = weights[first:last]
        if own.dtype == mx.float32:
            return by(x, own)
        return by_blocks(lambda block: by(x, block.astype(mx.float32)), [own], own.size, unit)

    multiplications = max(math.prod(x.shape[:-1]), FEWEST_ROWS) * weights.size
    return on_cores(compute, len(weights), multiplications // WORTH_A_CORE, -1)


def by_matrix(x: mx.array, matrix: mx.array) -> mx.array:
    """`x` [..., inputs] times `matrix` [outputs, inputs], few rows by slices of it as if they were tiles."""
    outputs, inputs = matrix.shape
    few = math.prod(x.shape[:-1]) in ROWS_OF_SLICES and kernels() in AVX512
    cut = tile_of([outputs], inputs, SLICES, 1) if few else None
    if cut is None:
        return x @ matrix.T
    return _by_tiles(x, matrix.reshape(-1, 1, 1, cut[0], inputs).swapaxes(-1, -2))


def _by_tiles(x: mx.array, tiles: mx.array) -> mx.array:
    count, parts, _, width, tile = tiles.shape
    rows = math.prod(x.shape[:-1])
    most = min(SMALL_PRODUCT // (width * tile), MOST_ROWS)
    most_rows = MOST_NUMBERS // tiles.size * most
    if rows > most_rows:
        some = mx.split(x.reshape(rows, -1), range(most_rows, rows, most_rows))
        return mx.concatenate([_by_tiles(few, tiles) for few in some]).reshape(*x.shape[:-1], -1)
    groups = max(-(-rows // most), 1)
    each = -(-rows // groups)
    filled = groups * each
    few = x if filled == rows else mx.pad(x.reshape(rows, parts * width), [(0, filled - rows), (0, 0)])
    if parts > 1:
        few = few.reshape(filled, parts, width).swapaxes(0, 1)
    # mlx would copy a single row for every tile if it was broadcast.
    strides = (0, filled * width, each * width, width, 1)
    products = mx.as_strided(few, (count, parts, groups, each, width), strides) @ tiles
    if parts > 1:
        products = products.sum(axis=1, keepdims=True)
    if filled > 1:
        products = products.transpose(2, 3, 1, 0, 4)
    if filled > rows:
        products = products.reshape(filled, -1)[:rows]
    return products.reshape(*x.shape[:-1], count * tile)


class Tiled(nn.Module):  # type: ignore[misc]
    """A layer whose weights may be tiles, until somebody else asks for them."""

    @property
    def weight(self) -> mx.array:
        """The weights [outputs, inputs], as they lie from now on: they would be copied every time."""
        if is_tiled(self):
            self["weight"] = whole(self["weight"])
        return self["weight"]  # type: ignore[no-any-return]


class TiledLinear(Tiled, nn.Linear):  # type: ignore[misc]
    """A linear layer that multiplies by tiles."""

    def __call__(self, x: mx.array) -> mx.array:
        output = multiplied(x, self["weight"])
        return mx.add(output, self["bias"]) if "bias" in self else output


class TiledEmbedding(Tiled, nn.Embedding):  # type: ignore[misc]
    """An embedding that does so where it is the head."""

    def __call__(self, x: mx.array) -> mx.array:
        tiles: mx.array = self["weight"]
        if not is_tiled(self):
            return tiles[x].astype(mx.float32)
        tile = tiles.shape[-1]
        of_outputs = tiles.transpose(0, 4, 1, 2, 3)
        return of_outputs[x // tile, x % tile].reshape(*x.shape, -1).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        """`x` times the table, which makes logits."""
        return multiplied(x, self["weight"])


def is_tiled(layer: nn.Module) -> bool:
    """Whether the weights of this layer are tiles."""
    return layer["weight"].ndim == TILED_DIMENSIONS  # type: ignore[no-any-return]
