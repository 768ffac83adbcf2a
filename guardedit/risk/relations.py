"""Which relation a request is about, and which other subjects stand in it: docs/probes.md states the rules."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from guardedit.models.control import relations
from guardedit.records import EditRequest

# Words that stand in almost every stem and say nothing about the relation.
_COMMON_WORDS = "a an the of is in was are to by that and it its has with for on can be which where what who"
_SIMILAR = 0.5  # share of content words that two stems must have in common


@dataclass(frozen=True)
class Relation:
    """A row of the shipped table."""

    name: str
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    pairs: dict[str, str]
    """Subject -> object."""

    @property
    def objects(self) -> frozenset[str]:
        """Every object, case folded."""
        return frozenset(value.casefold() for value in self.pairs.values())


@dataclass(frozen=True)
class Match:
    """A relation found for a request, and by which rule."""

    relation: Relation
    rule: str


def table() -> tuple[Relation, ...]:
    """The shipped relations."""
    return tuple(
        Relation(row["name"], tuple(row["ids"]), tuple(row["prompts"]), dict(row["pairs"]))
        for row in relations()
    )


def stems() -> dict[str, Any]:
    """The shipped stems: `subject`, `prefixes`, `contexts` (lists), `entailed` (relation -> list)."""
    loaded: dict[str, Any] = json.loads(
        (files("guardedit") / "assets" / "probes" / "stems.json").read_text("utf-8")
    )
    return loaded


def match(request: EditRequest) -> Match | None:
    """The relation of a request: by its name, by the fact itself, by the stem's wording, or by its objects."""
    rows = table()
    for rule, find in (
        ("name", _by_name),
        ("fact", _by_fact),
        ("wording", _by_wording),
        ("objects", _by_objects),
    ):
        found = find(request, rows)
        if found is not None:
            return Match(found, rule)
    return None


def similarity(first: str, second: str) -> float:
    """Share of content words that two stems have in common (Jaccard), 0 where one has none."""
    a, b = _content(first), _content(second)
    return len(a & b) / len(a | b) if a and b else 0.0


def _content(stem: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", stem.lower())) - set(_COMMON_WORDS.split(" "))


def _by_name(request: EditRequest, rows: tuple[Relation, ...]) -> Relation | None:
    if request.relation is None:
        return None
    wanted = request.relation.casefold().replace(" ", "_").replace("-", "_")
    named = (row for row in rows if wanted in {row.name, *(name.casefold() for name in row.ids)})
    return next(named, None)


def _by_fact(request: EditRequest, rows: tuple[Relation, ...]) -> Relation | None:
    if request.target_true is None:
        return None
    old = request.target_true.strip().casefold()
    holds = [row for row in rows if row.pairs.get(request.subject, "").casefold() == old]
    return max(holds, key=lambda row: _best_wording(request, row), default=None)


def _by_wording(request: EditRequest, rows: tuple[Relation, ...]) -> Relation | None:
    best = max(rows, key=lambda row: _best_wording(request, row))
    return best if _best_wording(request, best) >= _SIMILAR else None


def _best_wording(request: EditRequest, row: Relation) -> float:
    return max(similarity(request.prompt, stem) for stem in row.prompts)


def _by_objects(request: EditRequest, rows: tuple[Relation, ...]) -> Relation | None:
    """The relation that has the old object; the new one and the wording decide between several."""
    if request.target_true is None:
        return None
    old, new = request.target_true.strip().casefold(), request.target_new.strip().casefold()
    having = [row for row in rows if old in row.objects]
    return max(having, key=lambda row: (new in row.objects, _best_wording(request, row)), default=None)
