"""Symmetric matrices by their lower triangles, tile by tile: half the work, nearly all of it in fast products.

What stands above the diagonal is anything.
"""

from __future__ import annotations

import torch

_TILE = 512  # rows and columns of a matrix that are computed at a time


def lower_gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T in float32, at least its lower triangle."""
    result = torch.zeros(len(x), len(x), device=x.device)
    add_lower_gram(result, x, 1.0)
    return result


def add_lower_gram(result: torch.Tensor, x: torch.Tensor, weight: float) -> None:
    """Adds weight X X^T in float32, at least its lower triangle."""
    if x.device.type != "cpu":
        result.addmm_(x, x.T, alpha=weight)
        return
    operands = [_operand(block) for block in torch.split(x, _TILE)]
    for column, other in enumerate(operands):
        for row in range(column, len(operands)):
            tile = _product(operands[row], other)
            result[row * _TILE :, column * _TILE :][: tile.shape[0], : tile.shape[1]].add_(tile, alpha=weight)


def factor_in_place(matrix: torch.Tensor) -> bool:
    """Puts the Cholesky factor of a float32 matrix on the CPU into its lower triangle; whether it failed."""
    for start in range(0, len(matrix), _TILE):
        corner, failed = torch.linalg.cholesky_ex(matrix[start : start + _TILE, start : start + _TILE])
        if failed:
            return True
        size, after = len(corner), start + len(corner)
        matrix[start:after, start:after] = corner
        if after == len(matrix):
            break
        inverse = _operand(torch.linalg.solve_triangular(corner, torch.eye(size), upper=False))
        column = torch.split(matrix[after:, start:after], _TILE)
        for tile in column:
            tile.copy_(_product(_operand(tile), inverse))
        operands = [_operand(tile) for tile in column]
        rest = torch.split(matrix[after:, after:], _TILE)
        for place, (rows, operand) in enumerate(zip(rest, operands, strict=True)):
            for tile, other in zip(torch.split(rows, _TILE, dim=1), operands[: place + 1], strict=False):
                tile.sub_(_product(operand, other))
    return False


def _operand(x: torch.Tensor) -> torch.Tensor:
    """What `_product` takes. torch leaves products in float32 to MKL, which on AMD's processors takes twice as long as
    oneDNN does; a tensor in oneDNN's own layout is multiplied by that."""
    x = x.contiguous()
    return x.to_mkldnn() if x.numel() and torch.backends.mkldnn.is_available() else x  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X Y^T of two operands."""
    product: torch.Tensor = torch.nn.functional.linear(x, y)
    return product.to_dense() if product.is_mkldnn else product
