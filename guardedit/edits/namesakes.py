"""Made-up subjects whose names end as the edited one's does ("Victoria Glacier" for "Hood Glacier").

The key at a name's last token is mostly that word's own, so what is written for one bearer of the name is read out at
the others (docs/evidence.md: real namesakes move by nats, other neighbours hardly). Nobody has to know a made-up one
for its key to be alike.
"""

from __future__ import annotations

from collections.abc import Sequence

WATCHED = (
    "Victoria", "Green", "Hudson", "Miller", "Northern", "Saint Anna", "Golden", "Harper", "Silver", "Oak Hill",
    "Marlow", "Upper",
)  # fmt: skip
"""What stands before the last word of the namesakes that rehearsal and monitor read. Drawn from no data."""

SPARED = (
    "Bradford", "Red", "Queen Mary", "Thompson", "Little", "Western", "Carlos", "Stone", "North Park", "Felix",
    "Great", "Adele",
)  # fmt: skip
"""The same of those that an editor spares: others, so that what it spared is not what it is judged by."""


def namesakes(subject: str, first: Sequence[str] = WATCHED) -> tuple[str, ...]:
    """Subjects that end in the same word; none for a subject of one word. First words of the subject's own are left
    out."""
    words = subject.split()
    if len(words) < 2:
        return ()
    own = {word.casefold() for word in words[:-1]}
    return tuple(f"{one} {words[-1]}" for one in first if not own & {w.casefold() for w in one.split()})
