"""The record of an uncentred second moment C = E[x xᵀ] at one hook: solve, save, and tell whose it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from guardedit.errors import IntegrityError, SolveError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.models.tensorfiles import read_tensors, write_tensors
from guardedit.records import canonical, digest_of, digest_of_bytes

WARN_BELOW = 10
"""Tokens per dimension that a trustworthy C⁻¹ wants: fewer give a warning in the record."""
_FORMAT = "guardedit.second_moment/2"


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = E[x xᵀ] over ordinary text at one hook."""

    hook_name: str
    matrix: Float64[Tensor, "d d"]
    """Symmetric, float64."""
    n_tokens: int
    """Tokens that went in."""
    n_excluded: int
    """Tokens left out: position 0 and norm outliers."""
    upstream_digest: str
    """Of the parameters upstream of the hook."""
    corpus_digest: str
    """Of the token rows."""
    corpus_note: str
    """What text it was, in words."""
    mean_norm: float
    """Mean L2 norm of the tokens that went in."""
    norm_limit: float
    """Tokens of a larger L2 norm were left out."""
    digest: str = ""
    """Of everything above, as it lies in the file it was read from; empty before `save` or `load`."""

    @property
    def width(self) -> int:
        """d, the width of the hook."""
        return self.matrix.shape[0]

    @property
    def warning(self) -> str | None:
        """What a reader of figures made from this must know, or None."""
        wanted = WARN_BELOW * self.width
        if self.n_tokens >= wanted:
            return None
        return f"{self.hook_name}: {self.n_tokens} tokens; a trustworthy inverse wants {wanted}"

    @cached_property
    def cholesky(self) -> Float64[Tensor, "d d"]:
        """Lower Cholesky factor of C, computed once; raises SolveError where C is singular."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info) != 0 or not bool(torch.isfinite(factor).all()):
            raise SolveError(
                f"the second moment of {self.hook_name} is not positive definite ({self.n_tokens} tokens, "
                f"width {self.width}); collect it from more or more varied text"
            )
        result: Tensor = factor
        return result

    def solve(self, x: Float[Tensor, "d ..."]) -> Float64[Tensor, "d ..."]:
        """C⁻¹x in float64 for x (d,) or columns (d, n)."""
        columns = x.to(self.matrix).reshape(x.shape[0], -1)
        return torch.cholesky_solve(columns, self.cholesky).reshape(x.shape)

    def whiten(self, x: Float[Tensor, "d n"]) -> Float64[Tensor, "d n"]:
        """L⁻¹x in float64, with C = LLᵀ: the columns in the metric C⁻¹."""
        whitened: Tensor = torch.linalg.solve_triangular(self.cholesky, x.to(self.matrix), upper=False)
        return whitened

    def unwhiten(self, y: Float64[Tensor, "d n"]) -> Float64[Tensor, "d n"]:
        """L⁻ᵀy: `unwhiten(whiten(x))` is C⁻¹x."""
        back: Tensor = torch.linalg.solve_triangular(self.cholesky.T, y, upper=True)
        return back

    @cached_property
    def eigen(self) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
        """Eigenvalues of C, smallest first, and its eigenvectors as columns, computed once."""
        values, axes = torch.linalg.eigh(self.matrix)
        return values, axes

    def leverage(self, key: Float[Tensor, "d ..."]) -> Tensor:
        """kᵀC⁻¹k in float64, no unit: a scalar for k (d,), (n,) for columns (d, n). Its inverse: leakage."""
        return (key.to(self.matrix) * self.solve(key)).sum(0)

    def save(self, path: Path, *, compact: bool = False) -> SecondMoment:
        """Write one safetensors file, atomically, and return what `load` will give.

        `compact` keeps the Cholesky factor's triangle in float32, a quarter of the size. The factor and not the
        matrix is rounded since its condition number is the square root of the matrix'.
        """
        stored = _packed(self.cholesky) if compact else self.matrix
        plain = {name: value for name, value in vars(self).items() if name in _HEADER}
        header = {**plain, "format": _FORMAT, "compact": compact, "tensor_digest": tensor_digest(stored)}
        text = canonical(header).decode()
        write_tensors(path, {"tensor": stored}, {"second_moment": text, "digest": digest_of(header)})
        return SecondMoment.load(path)

    @classmethod
    def load(
        cls, path: Path, handle: ModelHandle | None = None, manifest: Mapping[str, str] | None = None
    ) -> SecondMoment:
        """Read a file written by `save`.

        Raises IntegrityError where bytes were changed, and StatisticsMismatchError where `handle` is given and
        its weights upstream of the hook (those of `manifest`, where it is given) are not those the file was
        collected on.
        """
        tensors, metadata = read_tensors(path)
        header = _checked_header(path, metadata)
        stored = tensors.get("tensor")
        if stored is None or tensor_digest(stored) != header["tensor_digest"]:
            raise IntegrityError(f"{path} was changed: its tensor is not the one on record")
        matrix = _unpacked(stored) if header["compact"] else stored
        plain = {name: header[name] for name in _HEADER}
        moment = cls(matrix=matrix, digest=metadata["digest"], **plain)
        if handle is not None:
            moment.check(handle, manifest)
        return moment

    def check(self, handle: ModelHandle, manifest: Mapping[str, str] | None = None) -> None:
        """Raise StatisticsMismatchError unless this was collected on the weights that `handle` holds now.

        With `manifest`, on the weights of that version of the same model.
        """
        found = handle.hook_digest(self.hook_name, manifest)
        if found != self.upstream_digest:
            raise StatisticsMismatchError(
                f"the second moment of {self.hook_name} was collected on weights {self.upstream_digest}, "
                f"{handle.name} now has {found} upstream of that hook; collect it again"
            )


_HEADER = tuple(name for name in SecondMoment.__dataclass_fields__ if name not in ("matrix", "digest"))


def _checked_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The header, after its digest and format were compared."""
    text = metadata.get("second_moment", "")
    if digest_of_bytes(text.encode()) != metadata.get("digest"):
        raise IntegrityError(f"{path} is not a second moment, or its header was changed")
    header: dict[str, Any] = json.loads(text)
    if header.get("format") != _FORMAT:
        raise IntegrityError(f"{path} has format {header.get('format')!r}, this version reads {_FORMAT!r}")
    return header


def _packed(factor: Float64[Tensor, "d d"]) -> Float[Tensor, " n"]:
    """Lower triangle, row after row, in float32."""
    rows, columns = torch.tril_indices(*factor.shape)
    return factor[rows, columns].float()


def _unpacked(packed: Float[Tensor, " n"]) -> Float64[Tensor, "d d"]:
    """LLᵀ in float64 from a packed factor."""
    width = int((2 * packed.numel()) ** 0.5)
    factor = torch.zeros(width, width, dtype=torch.float64)
    rows, columns = torch.tril_indices(width, width)
    factor[rows, columns] = packed.double()
    return factor @ factor.T
