"""How a long job is spread: a function over shards, answers in the shards' order. No torch here.

Whatever runs the shards, the answers must not depend on it: a shard carries its own seed, nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

S = TypeVar("S")
A = TypeVar("A")
Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


class Executor(Protocol):
    """Anything that can map a function over shards."""

    def map(
        self, function: Callable[[S], A], shards: Sequence[S], progress: Progress | None = None
    ) -> Iterator[A]:
        """Answers in the order of `shards`, each as soon as it and those before it are there."""
        ...


class LocalExecutor:
    """One shard after the other in this process: the default, and the reference for any other executor."""

    def map(
        self, function: Callable[[S], A], shards: Sequence[S], progress: Progress | None = None
    ) -> Iterator[A]:
        """Answers in the order of `shards`. A shard that raises ends the job."""
        for done, shard in enumerate(shards, start=1):
            yield function(shard)
            if progress is not None:
                progress(done, len(shards))


def split(items: Sequence[S], size: int) -> list[Sequence[S]]:
    """Consecutive shards of `size` items, the last one shorter; the same cut on every machine.

    Raises ValueError for a size below one.
    """
    if size < 1:
        raise ValueError(f"a shard of {size} items cannot be cut; give a size of 1 or more")
    return [items[start : start + size] for start in range(0, len(items), size)]
