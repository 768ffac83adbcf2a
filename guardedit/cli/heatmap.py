"""A heat map of a causal trace for the terminal: readable by its shades alone, in colour where there is any."""

from __future__ import annotations

import io
import sys

from guardedit.cli.words import clean
from guardedit.evaluation.traces import TracedFact

_SHADES = " ░▒▓█"
_WIDTH = 18
"""Characters of a token's label."""


def heatmap(fact: TracedFact, colour: bool | None = None) -> str:
    """One block a kind: tokens down, layers across, shade by the share of the largest indirect effect of all.

    Effects below zero are shown as "-". Tokens that were corrupted carry a star.
    """
    from rich.console import Console
    from rich.text import Text

    colour = sys.stdout.isatty() if colour is None else colour
    console = Console(file=io.StringIO(), force_terminal=colour, width=200, highlight=False)
    largest = max(value for table in fact.indirect_effect.values() for row in table for value in row)
    for kind, table in fact.indirect_effect.items():
        console.print(Text(f"{kind}: a full block is {largest:.3f}", style="bold"))
        for token, role, row in zip(fact.tokens, fact.roles, table, strict=True):
            line = Text(_label(token, role))
            for value in row:
                shade, style = _shade(value, largest)
                line.append(shade, style=style)
            console.print(line)
        console.print(Text(" " * _WIDTH + _ruler(fact.layers)))
    output = console.file
    return output.getvalue().rstrip() if isinstance(output, io.StringIO) else ""


def _label(token: str, role: str | None) -> str:
    star = "*" if role is not None and "subject " in role else " "
    return f"{clean(repr(token)[1:-1])[: _WIDTH - 2]:>{_WIDTH - 2}}{star} "


def _shade(value: float, largest: float) -> tuple[str, str]:
    """Two characters and a colour."""
    share = value / largest if largest > 0 else 0.0
    if share < -0.125:
        return "--", "blue"
    step = min(len(_SHADES) - 1, max(0, round(share * (len(_SHADES) - 1))))
    return _SHADES[step] * 2, ("", "yellow", "yellow", "dark_orange", "red")[step]


def _ruler(layers: tuple[int, ...]) -> str:
    """Numbers under every fifth column, of few under every other one."""
    step = 5 if len(layers) > 12 else 2
    return "".join(f"{layer:<{2 * step}}" for layer in layers[::step])
