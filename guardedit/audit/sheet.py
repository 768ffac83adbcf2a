"""What a report says, before anybody decides how it looks: sections of paragraphs, pictures and tables.

The Markdown and the HTML report are two prints of one `Sheet`, so they cannot disagree. No formatting library here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guardedit.audit.words import Sign


@dataclass(frozen=True)
class Bar:
    """A number with a bar beside it; `share` is the bar's length, 0 to 1."""

    text: str
    share: float


@dataclass(frozen=True)
class Code:
    """A name, digest or command, shown in fixed width."""

    text: str


@dataclass(frozen=True)
class Quote:
    """A piece of text in which one part, at the end, is marked."""

    before: str
    marked: str


@dataclass(frozen=True)
class Link:
    """The title of another section of the same report."""

    anchor: str
    text: str


Cell = str | Sign | Bar | Code | Quote | Link


@dataclass(frozen=True)
class Table:
    """Rows under a caption. `numeric` names the columns (by place) that are set to the right."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    note: str = ""
    folded: bool = False
    """Closed until asked for: the data under a picture, long lists."""
    under: frozenset[int] = frozenset()
    """Columns that a page prints as a line of their own below each row, so that a wide table fits."""


@dataclass(frozen=True)
class Dumbbells:
    """Pairs on one scale of probability: from hollow (before) to filled (after). `after` is None when unknown."""

    rows: tuple[tuple[str, float, float | None], ...]
    after_word: str = "after"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, longest first; values are shares, 0 to 1."""

    rows: tuple[tuple[str, float], ...]
    axis: str


@dataclass(frozen=True)
class Point:
    """One latent in the volcano: change of its firing rate in percentage points against −log10 p."""

    effect: float
    evidence: float
    kind: str
    significant: bool
    label: str


@dataclass(frozen=True)
class Volcano:
    """Effect against significance."""

    points: tuple[Point, ...]


@dataclass(frozen=True)
class Intervals:
    """Values with 95 % intervals, on a logarithmic scale where they span it; `quiet` rows are those not meant."""

    rows: tuple[tuple[str, float, float, float], ...]
    axis: str


@dataclass(frozen=True)
class Picture:
    """A drawing, described in words for those who do not see it, with its data as a table."""

    name: str
    title: str
    description: str
    data: Dumbbells | Bars | Volcano | Intervals
    table: Table


@dataclass(frozen=True)
class Section:
    """One part of the report."""

    anchor: str
    title: str
    paragraphs: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    commands: tuple[str, ...] = ()
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Story:
    """The report in plain words: for somebody who reads nothing else."""

    title: str
    sign: Sign
    headline: str
    asked: tuple[str, ...]
    others_title: str
    others: tuple[str, ...]
    decided: tuple[str, ...]
    action: str
    warnings: tuple[str, ...] = ()
    asked_title: str = "What was asked"
    decided_title: str = "What was decided, and why"

    @property
    def parts(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Titles and sentences, in order."""
        return (
            (self.asked_title, self.asked),
            (self.others_title, self.others),
            (self.decided_title, self.decided),
        )


@dataclass(frozen=True)
class Sheet:
    """The whole report."""

    kicker: tuple[str, ...]
    """The small print above the title."""
    story: Story
    sections: tuple[Section, ...] = field(default=())

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in order."""
        return tuple(p for s in self.sections for p in s.pictures)
