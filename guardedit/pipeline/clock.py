"""The clock beside the ledger: time on record is information, but a clock that went back brings dead words to life."""

from __future__ import annotations

from datetime import timedelta

from guardedit.errors import StaleError
from guardedit.gate.approvals import parse_time
from guardedit.pipeline.history import History

SLACK = timedelta(minutes=5)
"""Machines that share a home need not agree to the second."""


def require_clock(workspace: History) -> None:
    """Refuse to count approvals by a clock that stands before the ledger's newest entry: StaleError."""
    entries = workspace.ledger.entries()
    newest = max((parse_time(entry.at) for entry in entries), default=None)
    now = workspace.now()
    if newest is not None and now < newest - SLACK:
        raise StaleError(
            f"this machine's clock says {now.isoformat()}, the ledger has an entry of {newest.isoformat()}; no "
            "approval is counted by a clock that went back"
        )
