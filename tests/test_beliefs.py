"""How firmly an old answer is held, and what a policy may ask for instead of overwriting it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pipeline_helpers import Home, home, mlflow_home, policy_text, request_of, world
from pipeline_helpers import empty_mlflow as empty_mlflow
from risk_helpers import TOWER, context

from guardedit.cli.words import plan_document, plan_text
from guardedit.errors import PolicyError
from guardedit.gate.approvals import make_waiver
from guardedit.gate.policy import Policy, demanding, parse_policy
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.alternatives import CONTEXT, FILE
from guardedit.pipeline.reading import read_requests
from guardedit.records import canonical, digest_of
from guardedit.risk.beliefs import held_wordings, overwritten_belief
from guardedit.risk.key_view import KeyView

__all__ = ["home", "mlflow_home", "world"]

RULE = """
[[rule]]
id = "held"
metric = "preop/overwritten_belief"
op = "<="
limit = {limit}
level = "{level}"
{demands}
sentence = "The old answer is held with {{value}}; the limit is {{limit}}."
"""


def asking(level: str = "hard", limit: float = 0.0, demands: str = 'demands = "context"') -> str:
    return policy_text({}) + RULE.format(level=level, limit=limit, demands=demands)


def written(home: Home, text: str) -> Path:
    path = home.folder.parent / f"asking-{digest_of(text)[7:15]}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(text: str) -> Policy:
    return parse_policy(text, "t.toml")


def test_the_belief_is_the_geometric_mean_over_its_wordings(tiny: ModelHandle) -> None:
    prompts = held_wordings(TOWER)
    found = tiny.token_logprobs(prompts, ["Paris"] * len(prompts))
    mean = sum(float(row.double().sum()) for row in found) / len(prompts)
    measured = overwritten_belief(KeyView(context(tiny), TOWER, 4))
    assert measured.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert measured.n == len(prompts) > 3


def test_every_wording_is_another_and_names_the_subject() -> None:
    named = TOWER.model_copy(update={"paraphrases": (TOWER.filled, f"Look at {TOWER.subject}, in")})
    found = held_wordings(named)
    assert len(set(found)) == len(found) == len(held_wordings(TOWER)) + 1
    assert all(TOWER.subject in text and "{}" not in text for text in found)
    assert found[0] == TOWER.filled


def test_a_fact_that_is_held_to_a_context_overwrites_nothing(tiny: ModelHandle) -> None:
    within = TOWER.model_copy(update={"context": "fiction"})
    measured = overwritten_belief(KeyView(context(tiny), within, 4))
    assert measured.value == 0.0 and "fiction" in str(measured.reason)


def test_without_an_old_target_the_models_own_answer_counts(tiny: ModelHandle) -> None:
    unnamed = TOWER.model_copy(update={"target_true": None})
    assert "own answer" in str(overwritten_belief(KeyView(context(tiny), unnamed, 4)).reason)


def test_a_hard_demand_blocks_says_so_and_prepares_the_other_form(home: Home) -> None:
    guard = home.guard(policy=written(home, asking()))
    plan = guard.plan(request_of(0), editor="finetune")
    assert plan.judgement.outcome == "blocked"
    assert "asks for the form that holds in a context" in plan.judgement.reason
    (prepared,) = read_requests(home.folder / "plans" / plan.plan_id / FILE)
    assert prepared == plan.alternative[0]
    assert prepared.context == CONTEXT
    assert prepared.model_copy(update={"context": None}) == plan.requests[0]
    assert FILE in plan_text(plan) and plan_document(plan)["alternative"][0]["context"] == CONTEXT


def test_an_advisory_demand_suggests_and_stops_nothing(home: Home) -> None:
    plan = home.guard(policy=written(home, asking("advisory"))).plan(request_of(0), editor="finetune")
    free = home.guard(policy=written(home, policy_text({}))).plan(request_of(0), editor="finetune")
    assert plan.judgement.outcome == free.judgement.outcome
    assert plan.alternative and not free.alternative
    (finding,) = [one for one in plan.judgement.findings if one.rule == "held"]
    assert "suggests the form" in finding.sentence


def test_a_limit_that_is_kept_or_asks_for_nothing_prepares_nothing(home: Home) -> None:
    for text in (asking(limit=1.0), asking(demands="")):
        plan = home.guard(policy=written(home, text)).plan(request_of(0), editor="finetune")
        assert plan.alternative == ()
        assert not (home.folder / "plans" / plan.plan_id / FILE).exists()
        assert b"alternative" not in canonical(plan)


def test_a_waived_demand_asks_for_nothing(home: Home) -> None:
    guard = home.guard(policy=written(home, asking("soft")))
    waiver = make_waiver(
        "preop/overwritten_belief", "Ada", "the old answer is an error", "8h", datetime.now(UTC)
    )
    plan = guard.plan(request_of(0), editor="finetune", waivers=[waiver])
    assert plan.alternative == ()
    assert demanding(plan.judgement.findings, guard.kit.policy) == ()


def test_policies_without_a_demand_keep_their_digest() -> None:
    plain = parsed(asking(demands=""))
    assert b"demands" not in canonical(plain)
    assert plain.digest != parsed(asking()).digest


def test_a_demand_is_refused_after_the_write_and_when_unknown() -> None:
    with pytest.raises(PolicyError, match="demands"):
        parsed(asking(demands='demands = "silence"'))
    with pytest.raises(PolicyError, match="before the write"):
        parsed(asking().replace("preop/overwritten_belief", "postop/far_kl"))
