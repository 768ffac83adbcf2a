"""What the tests of attacks share."""

from __future__ import annotations

from pipeline_helpers import Home, request_of


def planned(home: Home) -> str:
    return home.guard().plan(request_of()).plan_id
