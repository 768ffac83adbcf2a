"""Shapes as SVG text: what the report's pictures are put together from. Nothing about edits here.

Two themes: "page" leaves the colours to the page's style sheet (so a picture follows light, dark and print), "light"
writes them out, for a file that stands alone.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

Theme = Literal["page", "light"]
Ink = Literal["ink", "muted", "line", "panel", "meant", "spill", "harm", "plain"]
Anchor = Literal["start", "middle", "end"]

# Okabe and Ito's colour-blind-safe palette, darkened where text needs contrast.
_LIGHT: dict[Ink, str] = {
    "ink": "#1d2433",
    "muted": "#566074",
    "line": "#d9dee8",
    "panel": "#ffffff",
    "meant": "#007a5a",
    "spill": "#a86f00",
    "harm": "#d55e00",
    "plain": "#0072b2",
}
_UNFIT = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold."""


def text_width(words: str, size: float) -> float:
    """How wide a line will be, about: the reader's font is not known. Broad letters count for a whole em."""
    broad = sum(unicodedata.east_asian_width(letter) in "WF" for letter in words)
    return size * (0.55 * (len(words) - broad) + broad)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Marks of a logarithmic scale: powers of ten, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) < 4 else (1,)
    found = [step * 10.0**power for power in powers for step in steps]
    return [value for value in found if low <= value <= high]


@dataclass
class Pen:
    """Collects shapes of one picture; places are in pixels from the top left."""

    theme: Theme
    parts: list[str] = field(default_factory=list)

    def colour(self, ink: Ink) -> str:
        """The colour as CSS has it."""
        return f"var(--{ink})" if self.theme == "page" else _LIGHT[ink]

    def line(
        self, x1: float, y1: float, x2: float, y2: float, ink: Ink, width: float = 1, dim: float = 1
    ) -> None:
        """A straight line with round ends."""
        faint = "" if dim == 1 else f"; stroke-opacity: {dim:g}"
        style = f"stroke: {self.colour(ink)}; stroke-width: {width:g}; stroke-linecap: round{faint}"
        self.parts.append(f'<path d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}" style="{style}"/>')

    def dots(self, places: list[tuple[float, float]], ink: Ink, size: float, dim: float) -> None:
        """Many small round points as one path: short, however many there are."""
        if places:
            shape = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in places)
            style = f"stroke: {self.colour(ink)}; stroke-width: {size:g}; stroke-linecap: round"
            self.parts.append(f'<path d="{shape}" style="{style}; stroke-opacity: {dim:g}"/>')

    def circle(self, x: float, y: float, radius: float, fill: Ink, edge: Ink, width: float) -> None:
        """A round marker."""
        style = f"fill: {self.colour(fill)}; stroke: {self.colour(edge)}; stroke-width: {width:g}"
        self.parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{radius:g}" style="{style}"/>')

    def shape(self, corners: list[tuple[float, float]], fill: Ink, edge: Ink | None = None) -> None:
        """A filled polygon."""
        outline = f"; stroke: {self.colour(edge)}" if edge else ""
        places = "L".join(f"{_n(x)} {_n(y)}" for x, y in corners)
        self.parts.append(f'<path d="M{places}Z" style="fill: {self.colour(fill)}{outline}"/>')

    def text(
        self, x: float, y: float, words: str, anchor: Anchor = "start", size: float = 13, ink: Ink = "ink",
        room: float | None = None, turned: bool = False,
    ) -> None:  # fmt: skip
        """One line; squeezed where it would be wider than `room`."""
        squeezed = room is not None and text_width(words, size) > room
        fit = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if squeezed else ""
        turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
        style = f"font-size: {size:g}px; text-anchor: {anchor}; fill: {self.colour(ink)}; stroke: none"
        shown = escape(_UNFIT.sub("\ufffd", words))
        self.parts.append(f'<text x="{_n(x)}" y="{_n(y)}"{fit}{turn} style="{style}">{shown}</text>')

    def svg(self, name: str, title: str, description: str, width: float, height: float) -> str:
        """The whole picture, named and described; its ids are its own in a page that holds several."""
        # A viewer in dark mode must not put dark on dark; in a page the style sheet sets the size.
        look = f"max-width: {width:g}px" if self.theme == "page" else "background: #ffffff"
        size = "" if self.theme == "page" else f' width="{width:g}" height="{height:g}"'
        font = "inherit" if self.theme == "page" else "sans-serif"
        said = "".join(
            f'<{tag} id="{name}-{tag}">{escape(_UNFIT.sub(chr(0xFFFD), words))}</{tag}>'
            for tag, words in (("title", title), ("desc", description))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}"{size} role="img" '
            f'aria-labelledby="{name}-title {name}-desc" style="{look}; font-family: {font}; fill: none">'
            f"{said}{''.join(self.parts)}</svg>"
        )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
