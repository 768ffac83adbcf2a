"""Judging: scores against a policy's limits. Pure, deterministic, without a clock.

Fail closed: a score that is missing, not finite, ambiguous or from too few units is *inconclusive*, never a pass, and a
policy without a binding rule for a stage decides nothing. Advisory findings never change the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from guardedit.gate.approvals import waiver_problem
from guardedit.gate.rules import JudgedStage, Policy, Rule, load_policy, parse_policy
from guardedit.records import Finding, Judgement, Outcome, Score, Verdict, Waiver, canonical

__all__ = [
    "Policy",
    "Rule",
    "demanding",
    "judge",
    "lineage_scores",
    "load_policy",
    "metric_of",
    "parse_policy",
]

MANY = 3
"""Sentences that a reason spells out."""


def metric_of(score: Score) -> str:
    """The name that policies and MLflow use: "preop/<name>", or "postop/<name>" for the monitor's scores."""
    return f"{'postop' if score.stage == 'postop' else 'preop'}/{score.name}"


def lineage_scores(scores: Iterable[Score]) -> tuple[Score, ...]:
    """The monitor's scores against the lineage's base, renamed `lineage_<name>` so that a policy can limit the sum."""
    return tuple(score.model_copy(update={"name": f"lineage_{score.name}"}) for score in scores)


def judge(
    scores: Iterable[Score],
    policy: Policy,
    waivers: Iterable[Waiver],
    stage: Literal["key", "preop", "postop"],
    now: datetime,
    plans: Literal["one", "many"] = "one",
    editor: str | None = None,
) -> Judgement:
    """Compare every rule of `stage` with its score; `now` (aware) only decides whether a waiver has expired.

    `plans` says whether the plan is one of many requests, and `editor` whose it is: a rule may be for some only, and
    without an editor every rule binds. "key" screens one request before anything is solved, by the rules that say
    `stage = "key"`; its outcome is a pre-op outcome. Waivers lift soft *failures*; what could not be measured still
    goes to a person.
    """
    rules = policy.rules_for(stage, plans, editor)
    by_metric = _by_metric(scores)
    # A waiver carries no signature: where words must be signed it lifts nothing.
    usable = () if policy.signed else waivers
    valid = [w for w in sorted(usable, key=canonical) if waiver_problem(w, now) is None]
    findings = tuple(_finding(rule, by_metric.get(rule.metric, []), valid) for rule in rules)
    judged: JudgedStage = "postop" if stage == "postop" else "preop"
    unguarded = stage != "key" and all(finding.level == "advisory" for finding in findings)
    verdict = _verdict(findings, unguarded)
    outcome = _outcome(findings, verdict, judged, policy)
    return Judgement(
        findings=findings,
        outcome=outcome,
        verdict=verdict,
        reason=_reason(findings, verdict, outcome, unguarded, judged),
        policy_digest=policy.digest,
    )


def demanding(findings: Iterable[Finding], policy: Policy) -> tuple[Finding, ...]:
    """Broken limits whose rule asks for another form of the edit, advisory ones among them; waived ones are not."""
    asking = {rule.id for rule in policy.rules if rule.demands is not None}
    return tuple(f for f in findings if f.rule in asking and f.verdict == "fail" and f.waiver is None)


def _by_metric(scores: Iterable[Score]) -> dict[str, list[Score]]:
    table: dict[str, list[Score]] = {}
    for score in scores:
        table.setdefault(metric_of(score), []).append(score)
    return table


def _finding(rule: Rule, candidates: list[Score], waivers: list[Waiver]) -> Finding:
    matching = [s for s in candidates if rule.scope is None or s.scope == rule.scope]
    problem = _unusable(rule, matching)
    value = None if problem is not None else matching[0].value
    if value is None:
        verdict: Verdict = "inconclusive"
        sentence = f"Could not be checked: {problem}. The rule: {rule.say(None)}"
    else:
        verdict = "pass" if rule.holds(value) else "fail"
        sentence = rule.say(value) if verdict == "pass" else rule.say_broken(value)
    lifted = verdict == "fail" and rule.level == "soft"
    return Finding(
        rule=rule.id,
        metric=rule.metric,
        stage=rule.judged_stage,
        value=value,
        op=rule.op,
        limit=rule.limit,
        level=rule.level,
        verdict=verdict,
        sentence=sentence,
        waiver=next((w for w in waivers if w.metric == rule.metric), None) if lifted else None,
    )


def _unusable(rule: Rule, matching: list[Score]) -> str | None:
    """Why no verdict can rest on these scores, or None when exactly one usable value is there."""
    name = rule.metric.split("/", 1)[1]
    if not matching:
        return f"{name} was not measured"
    if len(matching) > 1:
        return f"{name} was measured {len(matching)} times, and which one counts is not said"
    score = matching[0]
    if score.value is None:
        return f"{name} has no value ({score.reason or 'no reason given'})"
    if not math.isfinite(score.value):
        return f"{name} is not a finite number"
    if rule.min_n is not None and (score.n is None or score.n < rule.min_n):
        units = "an unknown number of" if score.n is None else score.n
        return f"{name} rests on {units} units, {rule.min_n} are needed"
    return None


def _binding(findings: tuple[Finding, ...], verdict: Verdict) -> list[Finding]:
    return [f for f in findings if f.level != "advisory" and f.verdict == verdict and f.waiver is None]


def _verdict(findings: tuple[Finding, ...], unguarded: bool) -> Verdict:
    if _binding(findings, "fail"):
        return "fail"
    return "inconclusive" if unguarded or _binding(findings, "inconclusive") else "pass"


def _outcome(findings: tuple[Finding, ...], verdict: Verdict, stage: JudgedStage, policy: Policy) -> Outcome:
    if stage == "postop":
        after: dict[Verdict, Outcome] = {"fail": "rolled-back", "inconclusive": "held", "pass": "committed"}
        return after[verdict]
    if any(f.level == "hard" for f in _binding(findings, "fail")):
        return "blocked"
    if verdict == "fail":
        return policy.on_soft_fail
    return "needs-approval" if verdict == "inconclusive" else "auto-approved"


def _reason(
    findings: tuple[Finding, ...], verdict: Verdict, outcome: Outcome, unguarded: bool, stage: JudgedStage
) -> str:
    """One line for a person: what decided, and what was lifted."""
    deciding = _binding(findings, verdict) if verdict != "pass" else []
    if outcome == "blocked":
        # A soft finding that stands beside a hard one is not what blocks.
        deciding = [f for f in deciding if f.level == "hard"] or deciding
    parts = _told(deciding, verdict)
    if verdict == "inconclusive" and unguarded and not parts:
        parts = [f"The policy has no binding rule for {stage}, so nothing was checked."]
    if verdict == "pass":
        n = sum(1 for f in findings if f.level != "advisory")
        parts = [_kept(n) if not _lifted(findings) else "No limit is broken that was not waived."]
    parts += [
        f"Waived by {f.waiver.author}: {f.metric} ({f.waiver.reason})." for f in _lifted(findings) if f.waiver
    ]
    return " ".join(parts)


def _told(deciding: list[Finding], verdict: Verdict) -> list[str]:
    """The sentences that decide; many that could not be checked are named instead: each is in its own finding."""
    if verdict != "inconclusive" or len(deciding) <= MANY:
        return [f.sentence for f in deciding]
    names = list(dict.fromkeys(f.metric.split("/", 1)[1] for f in deciding))
    return [f"{len(deciding)} limits could not be checked, each finding says why: {', '.join(names)}."]


def _kept(n: int) -> str:
    return "The one limit that binds is kept." if n == 1 else f"All {n} limits that bind are kept."


def _lifted(findings: tuple[Finding, ...]) -> list[Finding]:
    return [f for f in findings if f.waiver is not None]
