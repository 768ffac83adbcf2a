"""Whether edits are made alone, many in one go, or one after the other on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from guardedit.errors import BadRequestError
from guardedit.executors import split

T = TypeVar("T")


@dataclass(frozen=True)
class Protocol:
    """Cases are cut into groups of `sequence`, and those into steps of `batch`; a group starts on the unedited model.

    1 and 1: single edits. `batch` alone: that many facts solved as one. `sequence` alone: each edit on top of the one
    before. Both: batches on top of each other.
    """

    batch: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise BadRequestError(f"{name} {getattr(self, name)}: give 1 or more")
        if self.sequence > 1 and self.sequence % self.batch:
            raise BadRequestError(
                f"a sequence of {self.sequence} cannot be cut into batches of {self.batch}; give a multiple"
            )

    @property
    def steps(self) -> int:
        """Steps of a whole group."""
        return max(1, self.sequence // self.batch)

    @property
    def name(self) -> str:
        """Short, for file names."""
        return f"batch{self.batch}-sequence{self.sequence}"

    def groups(self, cases: Sequence[T]) -> list[list[list[T]]]:
        """Cases by group and step; the last ones may be smaller."""
        whole = split(cases, max(self.batch, self.sequence))
        return [[list(step) for step in split(group, self.batch)] for group in whole]

    def checkpoints(self, steps: int) -> tuple[int, ...]:
        """Numbers of steps after which every case so far is measured again: 1, 2, 5, 10, 20, 50, … and the last."""
        marks = [first * 10**power for power in range(len(str(steps))) for first in (1, 2, 5)]
        return (*(mark for mark in marks if mark < steps), steps)

    def sentence(self) -> str:
        """For the record."""
        if self.sequence > 1 and self.batch > 1:
            return f"{self.sequence} edits in batches of {self.batch}, each on top of those before, then all taken back"
        if self.sequence > 1:
            return f"{self.sequence} edits, each on top of those before, then all taken back"
        if self.batch > 1:
            return f"{self.batch} edits solved as one on the unedited model, taken back after each batch"
        return "one edit at a time on the unedited model, taken back after each"
