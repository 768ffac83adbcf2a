"""The report's pictures, drawn by matplotlib as SVG: byte for byte the same for the same data.

Two themes: "page" leaves the colours to the page's style sheet (so the picture follows light, dark and print), "light"
writes them out, for a file that stands alone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from guardedit.audit.sheet import Bars, Dumbbells, Intervals, Picture, Point, Volcano

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["page", "light"]

# Drawn with stand-in colours that occur nowhere else; each then becomes a CSS variable or, alone, the light value.
# The light values are Okabe and Ito's colour-blind-safe palette, darkened where text needs contrast.
_INK, _MUTED, _GRID, _PANEL = "#010203", "#010204", "#010205", "#010206"
_MEANT, _SPILL, _HARM, _PLAIN = "#010207", "#010208", "#010209", "#01020a"
_COLOURS = {
    _INK: ("--ink", "#1d2433"),
    _MUTED: ("--muted", "#566074"),
    _GRID: ("--line", "#d9dee8"),
    _PANEL: ("--panel", "#ffffff"),
    _MEANT: ("--meant", "#007a5a"),
    _SPILL: ("--spill", "#a86f00"),
    _HARM: ("--harm", "#d55e00"),
    _PLAIN: ("--plain", "#0072b2"),
}
_KIND = {"intended": (_MEANT, "^"), "spill": (_SPILL, "s"), "collateral": (_HARM, "o")}
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "guardedit",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
}
_WIDTH = 9.4
"""Inches; 72 units of the SVG each."""


def draw(picture: Picture, theme: Theme = "page") -> str:
    """One picture as an `<svg role="img">` with title and description; no global setting of matplotlib changes."""
    return _finish(_drawn(picture), picture, theme)


@lru_cache(maxsize=8)
def _drawn(picture: Picture) -> str:
    """In stand-in colours; kept for a moment, as a page and a file want the same few pictures."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = len(picture.data.rows) if not isinstance(picture.data, Volcano) else 0
    with matplotlib.rc_context(_settings(matplotlib.rcParamsDefault)), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # letters that the layout font lacks: the page's font has them
        figure = Figure(figsize=(_WIDTH, 4.9 if rows == 0 else 0.75 + 0.36 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        _PAINTERS[type(picture.data)](figure, figure.subplots(), picture.data)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue()


def _settings(default: Any) -> Any:
    """Ours over matplotlib's own defaults, so that a user's style file cannot change a report."""
    skip = {
        "backend",
        "backend_fallback",
        "interactive",
        "toolbar",
        "timezone",
        "webagg.port",
        "webagg.address",
    }
    return {
        **{k: v for k, v in default.items() if k not in skip and not k.startswith(("webagg", "keymap"))},
        **_SETTINGS,
    }


def _dumbbells(figure: Figure, axes: Axes, data: Dumbbells) -> None:
    last = len(data.rows) - 1
    for place, (_, before, after) in enumerate(data.rows):
        y = last - place
        colour = _MEANT if place == last else _PLAIN
        if after is not None:
            axes.annotate(
                "",
                (100 * after, y),
                (100 * before, y),
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.28,head_length=0.6",
                    "color": colour,
                    "lw": 2.2,
                    "shrinkA": 5,
                    "shrinkB": 5,
                },
            )
            axes.plot([100 * after], [y], "o", ms=10, mfc=colour, mec=colour, clip_on=False)
            _beside(axes, 100 * after, y, before <= after, f"{_pct(after)} {data.after_word}")
        axes.plot([100 * before], [y], "o", ms=10, mfc=_PANEL, mec=colour, mew=2, clip_on=False)
        _beside(axes, 100 * before, y, after is None or before > after, f"{_pct(before)} before")
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", pad=14)
    axes.set_ylim(-0.6, last + 0.6)
    axes.set_yticks(range(last, -1, -1), [name for name, _, _ in data.rows], fontsize=11)
    axes.set_xlabel("probability that the model gives this answer next, %")
    axes.grid(axis="x")
    figure.set_size_inches(_WIDTH, 1.0 + 0.62 * len(data.rows))


def _beside(axes: Axes, x: float, y: float, right: bool, text: str) -> None:
    """A label above a dot, kept inside the panel."""
    align = "left" if x < 15 else "right" if x > 85 else "center"
    shift = {"left": -5, "right": 5, "center": 0}[align]
    axes.annotate(text, (x, y), (shift, 9), textcoords="offset points", ha=align, fontsize=9, color=_MUTED)


def _pct(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 else "< 0.1 %"


def _bars(figure: Figure, axes: Axes, data: Bars) -> None:
    places = range(len(data.rows) - 1, -1, -1)
    values = [100 * value for _, value in data.rows]
    axes.barh(list(places), values, height=0.62, color=_PLAIN)
    for y, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.3g} %", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(list(places), [name for name, _ in data.rows])
    axes.set_xlim(0, 1.15 * max([*values, 1e-9]))
    axes.set_xlabel(data.axis)
    axes.grid(axis="x")


def _intervals(figure: Figure, axes: Axes, data: Intervals) -> None:
    places = range(len(data.rows) - 1, -1, -1)
    positive = [low for _, _, low, _ in data.rows if low > 0]
    top = max([high for *_, high in data.rows] + [1e-12])
    if len(positive) == len(data.rows) and top / min(positive) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    for y, (_, value, low, high) in zip(places, data.rows, strict=True):
        axes.plot([low, high], [y, y], "-", color=_PLAIN, lw=2.4, solid_capstyle="round", alpha=0.55)
        axes.plot([value], [y], "D", color=_PLAIN, ms=6.5)
        axes.annotate(f"{value:.2g}", (high, y), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(list(places), [name for name, *_ in data.rows])
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (1.6 if axes.get_xscale() == "log" else 1.1))
    axes.set_ylim(-0.6, len(data.rows) - 0.4)
    axes.set_xlabel(data.axis)
    axes.grid(axis="x")


def _volcano(figure: Figure, axes: Axes, data: Volcano) -> None:
    quiet = [p for p in data.points if not p.significant]
    axes.plot(
        [p.effect for p in quiet],
        [p.evidence for p in quiet],
        ".",
        ms=4,
        color=_MUTED,
        alpha=0.45,
        mew=0,
        label="within chance",
    )
    for kind, (colour, marker) in _KIND.items():
        loud = [p for p in data.points if p.significant and p.kind == kind]
        axes.plot(
            [p.effect for p in loud],
            [p.evidence for p in loud],
            marker,
            ms=7,
            mfc=colour,
            mec=_PANEL,
            mew=0.8,
            label=kind,
        )
    axes.axvline(0, color=_GRID, lw=1)
    axes.set_xlabel("change of firing rate, percentage points")
    axes.set_ylabel("evidence, −log₁₀ p")
    axes.grid(axis="y")
    axes.margins(0.12, 0.08)
    axes.set_ylim(bottom=0)
    _name_the_largest(axes, data.points)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 1.16),
        ncols=4,
        fontsize=9,
        labelcolor=_INK,
        handletextpad=0.3,
        columnspacing=1.6,
    )


def _name_the_largest(axes: Axes, points: tuple[Point, ...], most: int = 6) -> None:
    """Labels above the largest changes, where they would lie on no other label and on no other marker."""
    low, high = axes.get_xlim()
    height = axes.get_ylim()[1]
    loud = [((p.effect - low) / (high - low), p.evidence / height, p) for p in points if p.significant]
    taken: list[tuple[float, float]] = []
    for x, y, p in sorted(loud, key=lambda row: -abs(row[2].effect)):
        reach = 0.0055 * len(p.label)
        near = any(abs(a - x) < reach + 0.09 and abs(b - y) < 0.08 for a, b in taken)
        covers = any(abs(a - x) < reach and 0.015 < b - y < 0.07 for a, b, _ in loud)
        if len(taken) == most or near or covers:
            continue
        taken.append((x, y))
        align = "right" if x > 0.82 else "left" if x < 0.18 else "center"
        axes.annotate(
            p.label, (p.effect, p.evidence), (0, 7), textcoords="offset points", ha=align, fontsize=8.5
        )


_PAINTERS: dict[type, Callable[[Any, Any, Any], None]] = {
    Dumbbells: _dumbbells,
    Bars: _bars,
    Intervals: _intervals,
    Volcano: _volcano,
}


def _finish(svg: str, picture: Picture, theme: Theme) -> str:
    """Named, described, with its own ids, without fixed size, in the theme's colours; checked to be well-formed."""
    root = ElementTree.fromstring(svg)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        for key in list(node.attrib):
            value = node.attrib.pop(key)
            node.attrib[key.rpartition("}")[2]] = _own_ids(value, key.rpartition("}")[2], picture.name)
    for extra in root.findall("metadata"):
        root.remove(extra)
    width = root.attrib["width"].removesuffix("pt")
    root.attrib.pop("version", None)
    root.attrib.update(
        {
            "role": "img",
            "aria-labelledby": f"{picture.name}-title {picture.name}-desc",
            "xmlns": "http://www.w3.org/2000/svg",
        }
    )
    if theme == "page":  # there the style sheet sets the size
        del root.attrib["width"], root.attrib["height"]
        root.attrib["style"] = f"max-width: {math.ceil(float(width) * 4 / 3)}px"
    else:  # a viewer in dark mode must not put dark on dark
        root.attrib["style"] = "background: #ffffff"
    for place, (tag, text) in enumerate((("title", picture.title), ("desc", picture.description))):
        node = ElementTree.Element(tag, {"id": f"{picture.name}-{tag}"})
        node.text = text
        root.insert(place, node)
    return _coloured(ElementTree.tostring(root, encoding="unicode"), theme)


def _own_ids(value: str, key: str, prefix: str) -> str:
    """Ids made unique in a page that holds several pictures."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)


def _coloured(svg: str, theme: Theme) -> str:
    for stand_in, (variable, light) in _COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})" if theme == "page" else light)
    family = "inherit" if theme == "page" else "sans-serif"
    return re.sub(r"'DejaVu Sans'(, [^;\"]*)?", family, svg)
