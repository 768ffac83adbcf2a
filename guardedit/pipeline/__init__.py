"""The only place that knows the order: plan, apply, monitor, commit, roll back.

workspace = guardedit.open("smollm2-135m", home=".guardedit")
plan = workspace.plan(request)                    # solved, measured, judged, on record; nothing is written
audit = workspace.apply(plan.plan_id)             # staged, monitored, then committed or dropped
workspace.rollback(plan.plan_id)                  # bit for bit
model = guardedit.load(".guardedit").model        # what is live

Importing the package loads no torch: the names above fetch it when first used, and what only reads the record does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardedit.pipeline.guard import Guard, load, open

__all__ = ["Guard", "load", "open"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from guardedit.pipeline import guard

        return getattr(guard, name)
    raise AttributeError(f"module 'guardedit.pipeline' has no attribute {name!r}")
