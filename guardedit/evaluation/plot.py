"""Quality against the number of edits as SVG: byte for byte the same for the same figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from guardedit.errors import BadRequestError
from guardedit.evaluation.summary import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = (
    "efficacy", "paraphrase", "neighborhood", "distractor_neighborhood", "portability", "locality",
    "efficacy_generated", "ability_arithmetic", "ability_syllogisms", "ability_minimal_pairs",
)  # fmt: skip
"""Drawn on one scale, 0 to 1: higher is better."""
HARMS = ("same_subject_kl_nats", "far_kl_nats", "neighborhood_lost_top1", "same_subject_lost_top1")
"""Drawn below: lower is better."""
_COLOURS = (
    "#007a5a",
    "#0072b2",
    "#a86f00",
    "#d55e00",
    "#7b3294",
    "#566074",
    "#1d2433",
    "#b2182b",
    "#4d9221",
    "#999999",
)
"""Okabe and Ito's colour-blind-safe palette, darkened where lines need contrast, and greys; dashes differ as well."""
_DASHES = ("-", "--", "-.", ":")
_SETTINGS: dict[str, Any] = {"svg.hashsalt": "guardedit", "svg.fonttype": "none", "font.size": 10}


def curve_svg(points: Sequence[Point], title: str) -> str:
    """A panel of shares and, where any was measured, one of harms, with 95 % bands; BadRequestError for no points."""
    if not points:
        raise BadRequestError("there is nothing to draw: no case was measured")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = [names for names in (_drawn(points, SHARES), _drawn(points, HARMS)) if names]
    with matplotlib.rc_context(_settings(matplotlib.rcParamsDefault)):
        figure = Figure(figsize=(8.0, 3.4 * max(1, len(panels))), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
        for place, names in zip(axes, panels, strict=False):
            _paint(place, points, names, shares=names[0] in SHARES)
        axes[0].set_title(title, fontsize=10)
        axes[-1].set_xlabel("edits in the model")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _drawn(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(point.metrics.get(name) for point in points)]


def _settings(default: Any) -> Any:
    """Ours over matplotlib's own defaults, so that a user's style file cannot change a figure."""
    skip = ("backend", "interactive", "toolbar", "timezone", "webagg", "keymap")
    return {**{key: value for key, value in default.items() if not key.startswith(skip)}, **_SETTINGS}


def _paint(axes: Axes, points: Sequence[Point], names: Sequence[str], *, shares: bool) -> None:
    for (name, colour), dash in zip(_coloured(names), _endless(_DASHES), strict=False):
        known = [(point.edits, point.metrics[name]) for point in points if point.metrics.get(name)]
        x = [edits for edits, _ in known]
        figures = [figure for _, figure in known if figure is not None]
        axes.plot(x, [f.value for f in figures], dash, color=colour, marker="o", markersize=3, label=name)
        axes.fill_between(
            x, [f.low for f in figures], [f.high for f in figures], color=colour, alpha=0.12, linewidth=0
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.set_ylabel("share" if shares else "nats, or share of prompts")
    if shares:
        axes.set_ylim(0, 1.02)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _coloured(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(names, _endless(_COLOURS), strict=False)


def _endless(values: Sequence[str]) -> Iterator[str]:
    while True:
        yield from values
