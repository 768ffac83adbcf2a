"""How many keys of a batch are independent, and how well-posed a system is: eigenvalues of Gram matrices.

Small matrices are decomposed. Of large ones only the two ends of the spectrum are asked for, by Lanczos iterations on
the matrix and on its Cholesky factor: some dozens of products, where a decomposition costs ten factorisations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

INDEPENDENT = 1e-10
"""Smallest eigenvalue of the keys' correlation matrix (in the metric C⁻¹) that counts as independent keys.

Keys of one subject behind one text differ by the rounding of a forward pass in float32, some 1e-6 of their norm. A
constraint on their difference would be met by an enormous update, so they must count as one key.
"""
EXACT = 1024
"""Up to this many rows a matrix is decomposed."""
_TOLERANCE = 1e-3
"""Of the ends of a large matrix' spectrum, relative: a condition number needs no more."""


def scale_(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    """Scale to a unit diagonal, in place, and return the scale: keys of different norms are not thereby dependent."""
    scale = gram.diagonal().sqrt()
    gram.div_(scale).div_(scale[:, None])
    return scale


def count_independent(gram: Float64[Tensor, "n n"]) -> int | None:
    """Number of independent keys behind a Gram matrix; None above EXACT rows."""
    if gram.shape[0] > EXACT:
        return None
    scaled = gram.clone()
    scale_(scaled)
    return int((torch.linalg.eigvalsh(scaled) > INDEPENDENT).sum())


def ends(matrix: Float64[Tensor, "n n"], factor: Float64[Tensor, "n n"]) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a positive definite matrix with the lower Cholesky factor `factor`."""
    if matrix.shape[0] <= EXACT:
        values = torch.linalg.eigvalsh(matrix)
        return float(values[0]), float(values[-1])
    largest = _largest(matrix.shape[0], lambda x: matrix @ x)
    return 1 / _largest(matrix.shape[0], lambda x: torch.cholesky_solve(x, factor)), largest


def _largest(size: int, product: Callable[[Tensor], Tensor]) -> float:
    """Largest eigenvalue of a symmetric operator; the same bits in every run, as the start is fixed."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    def multiply(x: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(x).reshape(size, 1))[:, 0].numpy()

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.cos(np.arange(size, dtype=np.float64))
    found = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False)
    return float(found[0])
