"""Collect uncentred second moments C = E[x xᵀ]: what every edit and every risk score is measured in.

Position 0 and tokens of outlying norm are left out and counted: at SmolLM2's layer 9, one token in a hundred
would carry a third of the variance. How far C⁻¹ can be trusted depends on tokens per dimension: two limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from guardedit.errors import BadModelError, StatisticsMismatchError, TooFewTokensError
from guardedit.models import hooks
from guardedit.models.corpus import Batch, chain_digest
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.second_moment import WARN_BELOW, SecondMoment
from guardedit.models.tensorfiles import read_tensors, write_tensors

__all__ = ["OUTLIER", "REFUSE_BELOW", "WARN_BELOW", "SecondMoment", "collect"]

REFUSE_BELOW = 2
"""Tokens per dimension under which C⁻¹ is noise: refused."""
OUTLIER = 5.0
"""Tokens whose norm exceeds this many medians (of the first batch) are left out."""


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

    `state` is a file that makes the collection resumable: a later call with the same arguments skips the batches
    that are in it (comparing their digest) and arrives at the same bits. `progress` is told the tokens so far.
    `autocast` runs the forward passes in a smaller type; sums stay float64.

    Raises TooFewTokensError under 2·d tokens at any hook, BadModelError where an activation is not finite, and
    StatisticsMismatchError where `state` belongs to something else. Under 10·d tokens the result carries a
    `warning`.
    """
    run = _start(handle, hook_names, state, autocast)
    unsaved = 0
    with preserved(handle):
        for batch in _unseen(run, batches):
            if max_tokens is not None and run.n_tokens >= max_tokens:
                break
            _add(handle, run, batch, autocast)
            unsaved += 1
            if state is not None and unsaved >= save_every:
                run.save(state)
                unsaved = 0
            if progress is not None:
                progress(run.n_tokens)
    if state is not None and unsaved:
        run.save(state)
    return {name: _finish(name, run, corpus_note) for name in run.sums}


@dataclass
class _Sums:
    """Running sums at one hook."""

    outer: Float64[Tensor, "d d"]
    norm: float = 0.0
    n_tokens: int = 0
    n_excluded: int = 0
    norm_limit: float | None = None

    def add(self, activations: Float[Tensor, "batch seq d"], mask: Int[Tensor, "batch seq"]) -> None:
        """Add a batch; the first one that has tokens sets the norm limit."""
        real = mask.bool()
        first = real & (real.cumsum(-1) == 1)
        candidates = activations[real & ~first].double()
        norms = candidates.norm(dim=-1)
        if not bool(torch.isfinite(norms).all()):
            raise BadModelError("the model computes activations that are not finite on this text")
        if self.norm_limit is None and len(norms):
            self.norm_limit = OUTLIER * float(norms.median())
        inlier = norms <= (self.norm_limit or 0.0)
        kept = candidates[inlier]
        # Not addmm_: its rounding depends on where in memory the sum lies, so a resumed run would differ.
        self.outer += kept.T @ kept
        self.norm += float(norms[inlier].sum())
        self.n_tokens += len(kept)
        self.n_excluded += int(real.sum()) - len(kept)


@dataclass
class _Run:
    """Everything an interrupted collection needs to go on to the same bits."""

    sums: dict[str, _Sums]
    upstream: dict[str, str]
    autocast: str
    n_batches: int = 0
    corpus_digest: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens in the sums of the hook that has fewest."""
        return min(one.n_tokens for one in self.sums.values())

    def save(self, path: Path) -> None:
        """Write atomically."""
        plain = {name: {k: v for k, v in vars(s).items() if k != "outer"} for name, s in self.sums.items()}
        header = {**{k: v for k, v in vars(self).items() if k != "sums"}, "sums": plain}
        write_tensors(path, {name: s.outer for name, s in self.sums.items()}, {"run": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> _Run:
        """Read what `save` wrote."""
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata["run"])
            plain = header.pop("sums")
            sums = {name: _Sums(outer=tensors[name].to(device), **plain[name]) for name in header["upstream"]}
            return cls(sums=sums, **header)
        except (KeyError, TypeError, ValueError) as error:
            raise StatisticsMismatchError(f"{path} is no state of a collection; delete it") from error


def _start(
    handle: ModelHandle, hook_names: Sequence[str], state: Path | None, autocast: torch.dtype | None
) -> _Run:
    """A fresh run, or the one on disk if it belongs to this model, these hooks and this precision."""
    upstream = {name: handle.hook_digest(name) for name in hook_names}
    if state is not None and state.exists():
        found = _Run.load(state, handle.device)
        if (found.upstream, found.autocast) != (upstream, str(autocast)):
            raise StatisticsMismatchError(
                f"{state} belongs to other weights, hooks or precision; delete it to start over"
            )
        return found
    return _Run({name: _Sums(_zeros(handle, name)) for name in hook_names}, upstream, str(autocast))


def _zeros(handle: ModelHandle, hook_name: str) -> Float64[Tensor, "d d"]:
    point = hooks.HookPoint.parse(hook_name, handle.n_layers)
    width = handle.d_in(point.layer) if point.point == "mlp.hook_post" else handle.d_model
    return torch.zeros(width, width, dtype=torch.float64, device=handle.device)


def _unseen(run: _Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches that are not in `run` yet, after checking that those before are the ones it was made of."""
    digest, done, count = "", run.n_batches, 0
    for batch in batches:
        if count >= done:
            yield batch
            continue
        digest, count = chain_digest(digest, batch), count + 1
        if count == done and digest != run.corpus_digest:
            raise StatisticsMismatchError(
                "the interrupted collection was of another text; delete its state file"
            )
    if count < done:
        raise StatisticsMismatchError(
            "the interrupted collection was of a longer text; delete its state file"
        )


@torch.no_grad()
def _add(handle: ModelHandle, run: _Run, batch: Batch, autocast: torch.dtype | None) -> None:
    input_ids, mask = (tensor.to(handle.device) for tensor in batch)
    precision: Any = torch.autocast(handle.device.type, autocast) if autocast is not None else nullcontext()
    with precision, hooks.record(handle, list(run.sums), stop=True) as seen:
        handle.hidden(input_ids, mask)
    for name, one in run.sums.items():
        one.add(seen[name], mask)
    run.n_batches += 1
    run.corpus_digest = chain_digest(run.corpus_digest, batch)


def _finish(name: str, run: _Run, corpus_note: str) -> SecondMoment:
    one = run.sums[name]
    width = one.outer.shape[0]
    if one.n_tokens < REFUSE_BELOW * width or one.norm_limit is None:
        raise TooFewTokensError(
            f"{name}: {one.n_tokens} tokens for a width of {width}; at least {REFUSE_BELOW * width} are "
            f"needed, {WARN_BELOW * width} for a trustworthy inverse. Give more text."
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
