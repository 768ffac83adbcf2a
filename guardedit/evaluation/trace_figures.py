"""Figures of causal traces as SVG, drawn by matplotlib; the same data give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from guardedit.evaluation.traces import TracedFact, TraceTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "guardedit", "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False,
    "font.family": ["DejaVu Sans"], "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_PANELS = {
    "residual": "residual stream",
    "mlp": "MLP outputs, window of {window}",
    "attention": "attention outputs, window of {window}",
}
# Okabe and Ito's colour-blind-safe palette.
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#999999", "#1d2433")


def draw_fact(fact: TracedFact, window: int) -> str:
    """One fact: a heat map of indirect effects, tokens by layers, a panel a kind."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, len(fact.indirect_effect), sharey=True, squeeze=False)[0]
        limit = (
            max(abs(value) for table in fact.indirect_effect.values() for row in table for value in row)
            or 1.0
        )
        images = []
        for axis, (kind, table) in zip(axes, fact.indirect_effect.items(), strict=True):
            images.append(axis.imshow(table, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit))
            axis.set_title(_PANELS[kind].format(window=window), fontsize=9)
            step = _step(fact.layers)
            axis.set_xticks(range(0, len(fact.layers), step), [str(layer) for layer in fact.layers[::step]])
            axis.set_xlabel("layer")
        axes[0].set_yticks(range(len(fact.tokens)), [_label(fact, at) for at in range(len(fact.tokens))])
        figure.colorbar(images[0], ax=list(axes), label=f"indirect effect on P({fact.answer.strip()})")

    return _svg(fill, (10.0, 1.1 + 0.26 * len(fact.tokens)))


def draw_table(table: TraceTable) -> str:
    """Many facts: average indirect effect by layer, a line a role with its 95 % interval, a panel a kind."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, len(table.indirect_effect), sharey=True, squeeze=False)[0]
        for axis, (kind, roles) in zip(axes, table.indirect_effect.items(), strict=True):
            for colour, (role, columns) in zip(_COLOURS, roles.items(), strict=False):
                axis.plot(table.layers, [c.value for c in columns], color=colour, label=role, linewidth=1.4)
                low, high = [c.low for c in columns], [c.high for c in columns]
                axis.fill_between(table.layers, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(_PANELS[kind].format(window=table.about["window"]), fontsize=9)
            axis.set_xlabel("layer")
            axis.set_xticks(table.layers[:: _step(table.layers)])
        axes[0].set_ylabel(f"average indirect effect, {table.n} facts")
        axes[0].legend(frameon=False, fontsize=7)

    return _svg(fill, (10.0, 3.6))


def _step(layers: tuple[int, ...]) -> int:
    """From one numbered layer on the axis to the next."""
    return 1 if len(layers) <= 12 else 5


def _label(fact: TracedFact, at: int) -> str:
    """A token with a star if it was corrupted."""
    role = fact.roles[at]
    return repr(fact.tokens[at])[1:-1] + ("*" if role is not None and "subject " in role else "")


def _svg(fill: Callable[[Figure], None], size: tuple[float, float]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _drawing():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    """Our settings over matplotlib's own defaults, also where the user has a style file."""
    import matplotlib

    kept = {"backend", "backend_fallback", "interactive", "toolbar", "timezone"}
    defaults: Any = matplotlib.rcParamsDefault
    plain = {k: v for k, v in defaults.items() if k not in kept and not k.startswith(("webagg", "keymap"))}
    settings: Any = {**plain, **_SETTINGS}
    with matplotlib.rc_context(settings):
        yield
