"""guardedit: plan, measure, judge, apply, monitor and undo edits of what a language model knows.

    open(model, home)     a workspace: plan, apply, monitor, commit, roll back
    load(home)            the live model of a workspace

Importing the package loads neither torch nor any room; the names above fetch the pipeline when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardedit.pipeline import load, open

__version__ = "0.1.0"
__all__ = ["__version__", "load", "open"]


def __getattr__(name: str) -> Any:
    if name in ("load", "open"):
        from guardedit import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'guardedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
