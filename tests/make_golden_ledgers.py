"""Writes the exported ledgers in tests/data that later versions have to go on verifying. Run once a release:

python tests/make_golden_ledgers.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from audit_helpers import Story
from pipeline_helpers import HARD, SOFT, Home, build_world, request_of, smaller
from stores import NAMES
from test_policy_words import Owned
from test_signed_pipeline import REASON, TEAM

import guardedit
from guardedit.pipeline.anchoring import checkpoint, review
from guardedit.pipeline.deciding import Emergency
from guardedit.pipeline.exchanging import export_ledger
from guardedit.pipeline.policies import sign_policy, withdraw_policy
from guardedit.pipeline.signing import revoke_key

DATA = Path(__file__).parent / "data"
SIGNED = DATA / f"ledger-signed-{guardedit.__version__}.jsonl"
STORY = DATA / f"ledger-story-{guardedit.__version__}.jsonl"


def make_signed(home: Home) -> None:
    """Every kind of entry that carries a signature, and an edit committed and undone."""
    team = Owned(home, HARD)
    hard = sign_policy(team.by("olga"), team.policy)
    blocked = team.by("ben").plan(request_of())
    team.by("gus").approve(blocked.plan_id, REASON, emergency=Emergency("INC-7"))
    team.by("run").apply(blocked.plan_id)
    review(team.by("ana"), blocked.plan_id, "was right; the limit is looked at")
    team.policy = home.policy(SOFT, TEAM)
    sign_policy(team.by("olga"), team.policy)
    withdraw_policy(team.by("olga"), hard["policy_digest"], "its limit was wrong")
    other = team.by("ben").plan(request_of(1))
    team.by("ana").approve(other.plan_id, REASON)
    team.by("run").apply(other.plan_id)
    team.by(None).rollback(other.plan_id)
    rejected = team.by("ben").plan(request_of(2))
    team.by("eva").reject(rejected.plan_id, "not this one")
    revoke_key(team.by("olga"), "eva", "the laptop is gone")
    checkpoint(team.by("run"))
    export_ledger(team.by(None), SIGNED, blobs=False)


def make_story(story: Story) -> None:
    """Unsigned words as from before there were keys, with the plans' files."""
    story.commit(story.plan("0001-good", "auto-approved"), NAMES[1])
    waits = story.plan("0002-waits", "needs-approval", verdict="fail")
    story.approve(waits, "somebody")
    export_ledger(story.workspace, STORY, blobs=True)


def main() -> None:
    """Make both."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        root = Path(name)
        world = build_world(root / "world")
        patch.setenv("GUARDEDIT_CACHE", str(world.cache))
        patch.setenv("LOGNAME", "somebody")
        smaller(patch)
        make_signed(Home(world, root / "home"))
        make_story(Story(root / "story"))


if __name__ == "__main__":
    main()
