"""Telling a server at once: a plan that was proposed, a word that was said. The ledger has it already.

Where MLflow is a file in the home, `serve` and `sync` tell it, and no command waits for that. Where a server was named,
a reviewer looks there: so it is told within seconds, or `sync` catches up.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.errors import GuardeditError, TrackingError
from guardedit.pipeline.history import History
from guardedit.pipeline.patience import is_server, within

SECONDS = 20.0
"""For all of one command's plans together; what takes longer goes on without anybody who waits for it."""
GLANCE_SECONDS = 3.0
"""For the first question, which needs no MLflow on our side: a server that is down costs no more than this."""


def tell_server(record: History, plan_ids: Sequence[str], seconds: float | None = None) -> str | None:
    """Show these plans on the MLflow server that the settings name, within SECONDS where no other time is given. None
    where that is done or no server is named; else why not: nothing is raised, and nothing but the view is late.
    """
    if not plan_ids or not is_server(record.settings.tracking_uri):
        return None
    try:
        notes = within(SECONDS if seconds is None else seconds, lambda: _told(record, tuple(plan_ids)))
    except (GuardeditError, TrackingError) as error:
        return str(error)
    return notes[0] if notes else None


def _told(record: History, plan_ids: Sequence[str]) -> tuple[str, ...]:
    from guardedit.audit.desk import server

    server.look(record.settings.tracking_uri or "", GLANCE_SECONDS)
    # The record's readers come with torch, the view with MLflow: neither is loaded for a server that is down.
    from guardedit.pipeline.reporting import tell

    return tell(record, plan_ids)
