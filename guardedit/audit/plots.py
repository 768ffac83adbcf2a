"""The report's pictures as SVG: byte for byte the same for the same data, and drawn in a millisecond.

Written here and not by a plotting library, which takes a fifth of a second for each: `sync` draws thousands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guardedit.audit.sheet import Bars, Dumbbells, Intervals, Picture, Point, Volcano
from guardedit.audit.strokes import Ink, Pen, Theme, decades, text_width, ticks

__all__ = ["Theme", "draw"]

_WIDTH = 900.0
_RIGHT = 60.0
_AXIS = 52.0
"""Room below the rows for the scale and its name."""
_KINDS: dict[str, Ink] = {"intended": "meant", "spill": "spill", "collateral": "harm"}


@dataclass(frozen=True)
class _Panel:
    """Where the rows or points lie, and how a value becomes a place across."""

    left: float
    right: float
    top: float
    bottom: float
    low: float
    high: float
    log: bool = False

    def x(self, value: float) -> float:
        """The place of a value."""
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.left + (self.right - self.left) * (at - low) / (high - low)

    def y(self, share: float) -> float:
        """The place of a share of the height, from below."""
        return self.bottom - (self.bottom - self.top) * share


def draw(picture: Picture, theme: Theme = "page") -> str:
    """One picture as an `<svg role="img">` with title and description."""
    pen = Pen(theme)
    height = _PAINTERS[type(picture.data)](pen, picture.data)
    return pen.svg(picture.name, picture.title, picture.description, _WIDTH, height)


def _rows(names: list[str], row: float, size: float, top: float) -> tuple[float, float, list[float]]:
    """Left edge of the panel, its lower edge, and the middle of each row."""
    widest = max((text_width(name, size) for name in names), default=0)
    left = min(widest, 0.55 * _WIDTH) + 24
    return left, top + row * len(names), [top + row * (n + 0.5) for n in range(len(names))]


def _names(pen: Pen, panel: _Panel, names: list[str], places: list[float], size: float) -> None:
    for name, y in zip(names, places, strict=True):
        pen.text(panel.left - 14, y + size * 0.35, name, "end", size, room=panel.left - 20)


def _scale(pen: Pen, panel: _Panel, title: str, marks: list[float] | None = None) -> None:
    """Lines at round values, their numbers and what is counted."""
    found = marks if marks is not None else ticks(panel.low, panel.high)
    for value in found:
        x = panel.x(value)
        pen.line(x, panel.top, x, panel.bottom, "line")
        pen.text(x, panel.bottom + 18, _plain(value), "middle", 12, "muted")
    middle = (panel.left + panel.right) / 2
    pen.text(middle, panel.bottom + 42, title, "middle", 13, "muted", room=_WIDTH - 20)


def _plain(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _dumbbells(pen: Pen, data: Dumbbells) -> float:
    names = [name for name, _, _ in data.rows]
    left, bottom, places = _rows(names, 62, 15, 16)
    panel = _Panel(left, _WIDTH - _RIGHT, 16, bottom, 0, 100)
    _scale(pen, panel, "probability that the model gives this answer next, %")
    _names(pen, panel, names, places, 15)
    for place, ((_, before, after), y) in enumerate(zip(data.rows, places, strict=True)):
        ink: Ink = "meant" if place == len(data.rows) - 1 else "plain"
        start = panel.x(100 * before)
        if after is not None:
            end = panel.x(100 * after)
            _arrow(pen, start, end, y, ink)
            pen.circle(end, y, 6.5, ink, ink, 1)
            _beside(pen, end, y - 12, f"{_percent(after)} {data.after_word}")
        pen.circle(start, y, 6, "panel", ink, 2.5)
        near = after is not None and abs(panel.x(100 * after) - start) < 130
        _beside(pen, start, y + 22 if near else y - 12, f"{_percent(before)} before")
    return bottom + _AXIS


def _arrow(pen: Pen, start: float, end: float, y: float, ink: Ink) -> None:
    way = 1 if end > start else -1
    if abs(end - start) > 26:
        pen.line(start + 8 * way, y, end - 15 * way, y, ink, 3)
        tip, back = end - 7 * way, end - 17 * way
        pen.shape([(tip, y), (back, y - 5), (back, y + 5)], ink)


def _beside(pen: Pen, x: float, y: float, words: str) -> None:
    """A label at a dot, kept inside the picture."""
    half = text_width(words, 12) / 2
    pen.text(max(min(x, _WIDTH - half - 4), half + 4), y, words, "middle", 12, "muted")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 else "< 0.1 %"


def _bars(pen: Pen, data: Bars) -> float:
    names, values = [name for name, _ in data.rows], [100 * value for _, value in data.rows]
    left, bottom, places = _rows(names, 34, 13, 8)
    panel = _Panel(left, _WIDTH - _RIGHT, 8, bottom, 0, 1.05 * max([*values, 1e-9]))
    _scale(pen, panel, data.axis)
    _names(pen, panel, names, places, 13)
    for value, y in zip(values, places, strict=True):
        end = panel.x(value)
        pen.shape([(left, y - 10.5), (end, y - 10.5), (end, y + 10.5), (left, y + 10.5)], "plain")
        pen.text(end + 6, y + 4, f"{value:.3g} %", size=12)
    return bottom + _AXIS


def _intervals(pen: Pen, data: Intervals) -> float:
    names = [name for name, *_ in data.rows]
    left, bottom, places = _rows(names, 34, 13, 8)
    panel = _spanned(data, left, bottom)
    _scale(pen, panel, data.axis, decades(panel.low, panel.high) if panel.log else None)
    _names(pen, panel, names, places, 13)
    for (_, value, low, high), y in zip(data.rows, places, strict=True):
        pen.line(panel.x(low), y, panel.x(high), y, "plain", 3.2, 0.55)
        x, size = panel.x(value), 6
        pen.shape([(x - size, y), (x, y - size), (x + size, y), (x, y + size)], "plain")
        pen.text(panel.x(high) + 12, y + 4, f"{value:.2g}", size=12)
    return bottom + _AXIS


def _spanned(data: Intervals, left: float, bottom: float) -> _Panel:
    """A logarithmic scale where all values are positive and far apart."""
    lows, highs = [low for _, _, low, _ in data.rows], [high for *_, high in data.rows]
    low, high = min([*lows, *highs], default=0.0), max([*highs, 1e-12])
    if low > 0 and high / low > 20:
        return _Panel(left, _WIDTH - _RIGHT, 8, bottom, low / 1.3, high * 1.3, log=True)
    edge = 0.05 * ((high - low) or abs(high) or 1.0)
    return _Panel(left, _WIDTH - _RIGHT, 8, bottom, low - edge, high + edge)


def _volcano(pen: Pen, data: Volcano) -> float:
    effects = [p.effect for p in data.points] or [0.0]
    edge = 0.12 * ((max(effects) - min(effects)) or 1.0)
    panel = _Panel(84, _WIDTH - 20, 44, 410, min(*effects, 0.0) - edge, max(*effects, 0.0) + edge)
    top = 1.1 * max([p.evidence for p in data.points] + [1e-9])
    for value in ticks(0, top):
        y = panel.y(value / top)
        pen.line(panel.left, y, panel.right, y, "line")
        pen.text(panel.left - 8, y + 4, _plain(value), "end", 12)
    for value in ticks(panel.low, panel.high):
        pen.text(panel.x(value), panel.bottom + 18, _plain(value), "middle", 12, "muted")
    pen.line(panel.x(0), panel.top, panel.x(0), panel.bottom, "line", 1.4)
    pen.text((panel.left + panel.right) / 2, panel.bottom + 42, "change of firing rate, percentage points", "middle",
             13, "muted")  # fmt: skip
    pen.text(22, (panel.top + panel.bottom) / 2, "evidence, −log₁₀ p", "middle", 13, "muted", turned=True)
    _points(pen, panel, data.points, top)
    _legend(pen)
    return panel.bottom + _AXIS


def _points(pen: Pen, panel: _Panel, points: tuple[Point, ...], top: float) -> None:
    quiet = [(panel.x(p.effect), panel.y(p.evidence / top)) for p in points if not p.significant]
    pen.dots(quiet, "muted", 4, 0.45)
    loud = [(panel.x(p.effect), panel.y(p.evidence / top), p) for p in points if p.significant]
    for x, y, p in loud:
        _marker(pen, x, y, p.kind)
    _name_the_largest(pen, panel, loud)


def _marker(pen: Pen, x: float, y: float, kind: str) -> None:
    """A kind has its shape and its colour: triangle, square, circle."""
    ink = _KINDS.get(kind, "muted")
    if kind == "intended":
        pen.shape([(x, y - 6), (x + 5.5, y + 4), (x - 5.5, y + 4)], ink, "panel")
    elif kind == "spill":
        pen.shape(
            [(x - 4.5, y - 4.5), (x + 4.5, y - 4.5), (x + 4.5, y + 4.5), (x - 4.5, y + 4.5)], ink, "panel"
        )
    else:
        pen.circle(x, y, 5, ink, "panel", 1)


def _legend(pen: Pen) -> None:
    pen.dots([(190, 20)], "muted", 4, 0.45)
    pen.text(202, 24, "within chance", size=12)
    for x, kind in zip((340, 470, 570), _KINDS, strict=True):
        _marker(pen, x, 20, kind)
        pen.text(x + 12, 24, kind, size=12)


def _name_the_largest(pen: Pen, panel: _Panel, loud: list[tuple[float, float, Point]], most: int = 6) -> None:
    """Labels above the largest changes, where they would lie on no other label and on no other marker."""
    taken: list[tuple[float, float, float]] = []
    for x, y, p in sorted(loud, key=lambda row: -abs(row[2].effect)):
        reach = text_width(p.label, 11.5) / 2
        middle = max(min(x, panel.right - reach), panel.left + reach)
        near = any(abs(a - middle) < reach + other + 10 and abs(b - y) < 26 for a, b, other in taken)
        covers = any(abs(a - middle) < reach + 6 and 4 < y - b < 24 for a, b, _ in loud)
        if len(taken) == most or near or covers:
            continue
        taken.append((middle, y, reach))
        pen.text(middle, y - 10, p.label, "middle", 11.5)


_PAINTERS: dict[type, Callable[[Pen, Any], float]] = {
    Dumbbells: _dumbbells,
    Bars: _bars,
    Intervals: _intervals,
    Volcano: _volcano,
}
