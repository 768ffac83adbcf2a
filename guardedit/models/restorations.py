"""Which states causal tracing sets back, where a pass for each has to start, and which of them begin alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from guardedit.models.corrupting import TraceSettings

WINDOWED = {"mlp": "hook_mlp_out", "attention": "hook_attn_out"}
"""Kinds that are restored in a window of layers, and the point inside a block that they are restored at."""
PUBLISHED_WINDOW, PUBLISHED_DEPTH = 10, 28
"""The published window of layers, and the depth (GPT-J's) from which on it is taken as it is."""


@dataclass(frozen=True)
class Restoration:
    """One cell of the table, whatever the token."""

    kind: str
    column: int
    start: int
    """The first block that has to be run."""
    fixes: Mapping[str, str]
    """Hook name -> which state is put there: the clean run's at that hook, or one that `entry` names."""
    forks: int | None = None
    """Column of the restoration of its kind whose stream it goes on with; None: the corrupted run's."""


def window_of(n_layers: int) -> int:
    """Ten layers, as published, for 28 layers and more; for a shallower model in proportion fewer, at least one."""
    return max(1, min(PUBLISHED_WINDOW, round(PUBLISHED_WINDOW * n_layers / PUBLISHED_DEPTH)))


def window_at(layer: int, window: int, n_layers: int) -> range:
    """Layers restored together around `layer`: as many below as from it on (one more from it on if odd), clipped."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


def resid_pre(layer: int) -> str:
    """Hook name of a block's input."""
    return f"blocks.{layer}.hook_resid_pre"


def restorations(n_layers: int, layers: Sequence[int], settings: TraceSettings) -> tuple[Restoration, ...]:
    """Every kind and layer, by the block they start at."""
    window = settings.window or window_of(n_layers)
    found = []
    for kind in settings.kinds:
        for column, layer in enumerate(layers):
            span = window_at(layer, window, n_layers) if kind in WINDOWED else range(layer, layer + 1)
            start, fixes = _steps(kind, span, n_layers)
            found.append(Restoration(kind, column, start, fixes))
    return tuple(sorted(found, key=lambda restoration: restoration.start))


def _steps(kind: str, span: range, n_layers: int) -> tuple[int, dict[str, str]]:
    """The first block to run, and what to set where, for the layers of `span` restored."""
    point = WINDOWED.get(kind, "hook_resid_post")
    if span[0] == n_layers - 1:
        only = f"blocks.{span[0]}.{point}"
        return span[0], {only: only}
    # What the first block gives is known for every token: the pass starts behind it.
    behind = resid_pre(span[0] + 1)
    first = entry(kind, span[0]) if kind in WINDOWED else behind
    rest = [f"blocks.{layer}.{point}" for layer in span[1:]]
    return span[0] + 1, {behind: first, **{name: name for name in rest}}


def entry(kind: str, layer: int) -> str:
    """Name of the stream behind block `layer` where that block's MLP or attention output is restored."""
    return f"{kind} of block {layer}"


def forked(work: Sequence[Restoration]) -> list[Restoration]:
    """The same in the order of their starts, those that begin alike run once.

    Windows that are clipped at the first block do: where a shorter one ends, it goes on from the longest's stream.
    """
    found = [one for one in work if one.kind not in WINDOWED or one.start != 1]
    for kind in WINDOWED:
        clipped = [one for one in work if one.kind == kind and one.start == 1]
        clipped.sort(key=lambda one: len(one.fixes))
        for one in clipped:
            # A window of n layers has n fixes, the first of them the entry: it ends before block n.
            end = len(one.fixes)
            shorter = 1 < end < len(clipped[-1].fixes)
            found.append(replace(one, start=end, fixes={}, forks=clipped[-1].column) if shorter else one)
    return sorted(found, key=lambda one: one.start)
