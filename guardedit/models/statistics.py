"""Uncentred second moments C = E[x xᵀ] of activations: the geometry that every edit and every risk score is measured in.

Position 0 and tokens of outlying norm are left out and counted: at SmolLM2's layer 9, one token in a hundred would
carry a third of the variance. How far C⁻¹ can be trusted depends on tokens per dimension, hence the two limits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardedit.errors import IntegrityError, SolveError, StatisticsMismatchError, TooFewTokensError
from guardedit.models import hooks
from guardedit.models.corpus import Batch, chain_digest
from guardedit.models.handle import ModelHandle, preserved, tensor_digest

REFUSE_BELOW = 2
"""Tokens per dimension under which C⁻¹ is noise: refused."""
WARN_BELOW = 10
"""Tokens per dimension that a trustworthy C⁻¹ wants: fewer give a warning in the record."""
OUTLIER = 5.0
"""Tokens whose norm exceeds this many medians (of the first batch) are left out."""
_FORMAT = "guardedit.second_moment/1"


@dataclass(frozen=True)
class SecondMoment:
    """C = E[x xᵀ] over ordinary text at one hook."""

    hook_name: str
    matrix: Tensor
    """(d, d) float64, symmetric."""
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

    @property
    def width(self) -> int:
        """d."""
        return self.matrix.shape[0]

    @property
    def warning(self) -> str | None:
        """What a reader of figures made from this must know, or None."""
        wanted = WARN_BELOW * self.width
        if self.n_tokens >= wanted:
            return None
        return f"{self.hook_name}: {self.n_tokens} tokens; a trustworthy inverse wants {wanted} ({WARN_BELOW} x d)"

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower Cholesky factor of C (d, d) float64; raises SolveError where C is singular."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info) != 0 or not bool(torch.isfinite(factor).all()):
            raise SolveError(
                f"the second moment of {self.hook_name} is not positive definite ({self.n_tokens} tokens, "
                f"width {self.width}); collect it from more or more varied text"
            )
        return factor

    def solve(self, x: Tensor) -> Tensor:
        """C⁻¹x in float64 for x (d,) or columns (d, n)."""
        columns = x.double().reshape(x.shape[0], -1).to(self.matrix.device)
        return torch.cholesky_solve(columns, self.cholesky).reshape(x.shape)

    def leverage(self, key: Tensor) -> Tensor:
        """kᵀC⁻¹k in float64, without unit: a scalar for k (d,), (n,) for columns (d, n). Small keys' edits leak far."""
        return (key.double().to(self.matrix.device) * self.solve(key)).sum(0)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically, with its own digest in the metadata."""
        plain = {name: value for name, value in vars(self).items() if name not in ("matrix", "cholesky")}
        header = {"format": _FORMAT, "matrix_digest": tensor_digest(self.matrix), **plain}
        write_tensors(path, {"matrix": self.matrix}, {"second_moment": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, handle: ModelHandle | None = None) -> SecondMoment:
        """Read a file written by `save`.

        Raises IntegrityError where bytes were changed, and StatisticsMismatchError where `handle` is given and its
        weights upstream of the hook are not those the file was collected on.
        """
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata["second_moment"])
            expected, version = header.pop("matrix_digest"), header.pop("format")
            moment = cls(matrix=tensors["matrix"], **header)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is not a second moment that this version reads: {error}") from error
        if version != _FORMAT or tensor_digest(moment.matrix) != expected:
            raise IntegrityError(f"{path} was changed: format {version!r}, recorded matrix digest {expected}")
        if handle is not None:
            moment.check(handle)
        return moment

    def check(self, handle: ModelHandle) -> None:
        """Raise StatisticsMismatchError unless this was collected on the weights that `handle` holds now."""
        found = handle.hook_digest(self.hook_name)
        if found != self.upstream_digest:
            raise StatisticsMismatchError(
                f"the second moment of {self.hook_name} was collected on weights {self.upstream_digest}, "
                f"{handle.name} now has {found} upstream of that hook; collect it again (guardedit stats collect)"
            )


@dataclass
class _Sums:
    """Running sums at one hook."""

    outer: Tensor
    norm: float = 0.0
    n_tokens: int = 0
    n_excluded: int = 0
    norm_limit: float = 0.0

    def add(self, activations: Tensor, mask: Tensor) -> None:
        """Add a batch (batch, seq, d) with its attention mask (batch, seq)."""
        real = mask.bool()
        first = real & (real.cumsum(-1) == 1)
        candidates = activations[real & ~first].double()
        norms = candidates.norm(dim=-1)
        if self.norm_limit == 0.0:
            self.norm_limit = OUTLIER * float(norms.median())
        kept = candidates[norms <= self.norm_limit]
        self.outer.addmm_(kept.T, kept)
        self.norm += float(norms[norms <= self.norm_limit].sum())
        self.n_tokens += len(kept)
        self.n_excluded += int(real.sum()) - len(kept)


@dataclass
class _State:
    """Everything an interrupted collection needs to go on to the same bits."""

    sums: dict[str, _Sums]
    upstream: dict[str, str]
    n_batches: int = 0
    corpus_digest: str = ""
    autocast: str = "None"

    def save(self, path: Path) -> None:
        """Write atomically."""
        plain = {name: {k: v for k, v in vars(s).items() if k != "outer"} for name, s in self.sums.items()}
        header = {**{k: v for k, v in vars(self).items() if k != "sums"}, "sums": plain}
        write_tensors(path, {name: s.outer for name, s in self.sums.items()}, {"state": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> _State:
        """Read what `save` wrote."""
        tensors, metadata = read_tensors(path)
        header = json.loads(metadata["state"])
        sums = {name: _Sums(outer=tensors[name], **plain) for name, plain in header.pop("sums").items()}
        return cls(sums=sums, **header)


def collect(
    handle: ModelHandle,
    hook_names: Sequence[str],
    batches: Iterable[Batch],
    *,
    corpus_note: str = "",
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    state: Path | None = None,
    save_every: int = 50,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SecondMoment]:
    """Second moments of several hooks in one forward pass a batch, ended after the uppermost hook; float64 sums.

    `state` is a file that makes the collection resumable: a later call with the same arguments skips the batches that
    are in it (comparing their digest) and arrives at the same bits. `progress` is told the tokens seen so far.
    Raises TooFewTokensError under 2·d tokens at any hook, and StatisticsMismatchError where `state` belongs to
    something else. Under 10·d tokens the result carries a `warning`.
    """
    run = _start(handle, hook_names, state, autocast)
    since_save = 0
    with preserved(handle):
        for batch in _unseen(run, batches):
            if max_tokens is not None and min(s.n_tokens for s in run.sums.values()) >= max_tokens:
                break
            _add(handle, run, batch, autocast)
            since_save += 1
            if state is not None and since_save == save_every:
                run.save(state)
                since_save = 0
            if progress is not None:
                progress(min(s.n_tokens for s in run.sums.values()))
    if state is not None and since_save:
        run.save(state)
    return {name: _finish(name, run, corpus_note) for name in run.sums}


def _start(
    handle: ModelHandle, hook_names: Sequence[str], state: Path | None, autocast: torch.dtype | None
) -> _State:
    """A fresh state, or the one on disk if it belongs to this model, these hooks and this precision."""
    points = {name: hooks.HookPoint.parse(name, handle.n_layers) for name in hook_names}
    widths = {
        name: handle.d_in(point.layer) if point.point == "mlp.hook_post" else handle.d_model
        for name, point in points.items()
    }
    upstream = {name: handle.hook_digest(name) for name in hook_names}
    device = handle.device
    sums = {
        n: _Sums(torch.zeros(width, width, dtype=torch.float64, device=device)) for n, width in widths.items()
    }
    fresh = _State(sums, upstream, autocast=str(autocast))
    if state is None or not state.exists():
        return fresh
    found = _State.load(state)
    if (found.upstream, found.autocast) != (fresh.upstream, fresh.autocast):
        raise StatisticsMismatchError(
            f"{state} belongs to other weights, hooks or precision; delete it to start over"
        )
    for one in found.sums.values():
        one.outer = one.outer.to(device)
    return found


def _unseen(run: _State, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches that are not in `run` yet; checks that those before are the ones it was made of."""
    digest, done = "", run.n_batches
    for index, batch in enumerate(batches):
        if index >= done:
            yield batch
            continue
        digest = chain_digest(digest, batch)
        if index + 1 == done and digest != run.corpus_digest:
            raise StatisticsMismatchError(
                "the interrupted collection was made of another text; delete its state file"
            )


@torch.no_grad()
def _add(handle: ModelHandle, run: _State, batch: Batch, autocast: torch.dtype | None) -> None:
    input_ids, mask = (tensor.to(handle.device) for tensor in batch)
    precision: Any = torch.autocast(handle.device.type, autocast) if autocast is not None else nullcontext()
    with precision, hooks.record(handle, list(run.sums), stop=True) as seen:
        handle.hidden(input_ids, mask)
    for name, one in run.sums.items():
        one.add(seen[name], mask)
    run.n_batches += 1
    run.corpus_digest = chain_digest(run.corpus_digest, batch)


def _finish(name: str, run: _State, corpus_note: str) -> SecondMoment:
    one = run.sums[name]
    width = one.outer.shape[0]
    if one.n_tokens < REFUSE_BELOW * width:
        raise TooFewTokensError(
            f"{name}: {one.n_tokens} tokens for a width of {width}; at least {REFUSE_BELOW * width} are needed, "
            f"{WARN_BELOW * width} for a trustworthy inverse. Give more text."
        )
    matrix = one.outer / one.n_tokens
    return SecondMoment(
        hook_name=name,
        # A matrix product of X with itself is symmetric only up to rounding.
        matrix=(matrix + matrix.T) / 2,
        n_tokens=one.n_tokens,
        n_excluded=one.n_excluded,
        upstream_digest=run.upstream[name],
        corpus_digest=run.corpus_digest,
        corpus_note=corpus_note,
        mean_norm=one.norm / one.n_tokens,
        norm_limit=one.norm_limit,
    )


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically and durably (safetensors itself renames but never syncs)."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises IntegrityError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
