"""Three requests for one plan, and a policy that stops one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_helpers import Home, policy_text, request_of

from guardedit.records import EditRequest

THREE = [request_of(0), request_of(2), request_of(4)]


def key_policy(home: Home, limit: float, level: str = "hard", defaults: str = "") -> Path:
    """A policy that screens by key leakage; an edit keeps everything else."""
    path = home.folder.parent / f"key-{level}-{len(defaults)}.toml"
    rule = (
        '[[rule]]\nid = "key"\nmetric = "preop/key_leakage"\nop = "<="\nstage = "key"\n'
        f'limit = {limit}\nlevel = "{level}"\nsentence = "This key leaks {{value}}; the limit is {{limit}}."\n'
    )
    path.write_text(policy_text({}, defaults) + rule, encoding="utf-8")
    return path


def leaks(home: Home) -> list[float]:
    """Key leakage of the three requests, as a screening finds it."""
    plan = home.guard().plan(THREE, editor="finetune")
    return [row.scores["key_leakage"] or 0.0 for row in plan.screened]


@pytest.fixture
def split(home: Home) -> tuple[float, int]:
    """A limit that only the request with the widest key breaks, and its place."""
    found = leaks(home)
    *_, second, widest = sorted(found)
    return (second + widest) / 2, found.index(widest)


def others(place: int) -> list[EditRequest]:
    return [request for number, request in enumerate(THREE) if number != place]
