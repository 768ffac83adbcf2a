"""A policy as data: parsed once from TOML, closed, digested. The format is described in docs/policy.md."""

from __future__ import annotations

import difflib
import math
import string
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from guardedit.errors import PolicyError
from guardedit.records import Grown, Level, Record, Scope, Stage, digest_of

Op = Literal["<=", ">=", "==", "<", ">"]
JudgedStage = Literal["preop", "postop"]

OP_WORDS: dict[str, str] = {
    "<=": "at most",
    ">=": "at least",
    "==": "exactly",
    "<": "below",
    ">": "above",
}
PLACEHOLDERS = frozenset({"value", "limit", "op"})


class Rule(Grown):
    """One limit on one metric."""

    later: ClassVar[frozenset[str]] = frozenset({"demands", "editors"})

    id: StrictStr = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Unique within the policy; findings name it."""
    metric: StrictStr = Field(pattern=r"^(preop|postop)/[a-z0-9][a-z0-9_.-]*$")
    """`preop/<score name>` or `postop/<score name>`."""
    op: Op
    limit: StrictFloat | StrictInt
    level: Level
    """advisory: printed only; soft: a person may lift it; hard: nobody may."""
    sentence: StrictStr = Field(min_length=10)
    """In plain words; may hold {value}, {limit} and {op}."""
    why: StrictStr = ""
    """Why this limit protects somebody."""
    source: StrictStr = ""
    """Where the limit's number comes from, e.g. "p95 of n=120 real edits, seed 0"."""
    stage: Stage | None = None
    """"key" lets the rule screen single requests before anything is solved."""
    scope: Scope | None = None
    """Only a score of this scope counts."""
    plans: Literal["one", "many"] | None = None
    """Only plans of one request, or only joint ones: what many edits do adds up, so their limits may differ."""
    min_n: StrictInt | None = Field(default=None, ge=1)
    """A score from fewer independent units is inconclusive."""
    demands: Literal["context"] | None = None
    """What is asked for where the limit is broken: the same fact held to a context, which the plan then prepares."""
    editors: tuple[StrictStr, ...] | None = Field(default=None, min_length=1)
    """Only plans of these editors: a limit that was found on one editor's edits says nothing of another's."""

    @field_validator("limit")
    @classmethod
    def _as_float(cls, limit: float) -> float:
        """One spelling per number, so that `limit = 1` and `limit = 1.0` digest alike."""
        return float(limit)

    @field_validator("sentence")
    @classmethod
    def _known_placeholders(cls, sentence: str) -> str:
        for _, name, spec, conversion in string.Formatter().parse(sentence):
            if name is not None and (name not in PLACEHOLDERS or spec or conversion):
                raise ValueError(f"only {{value}}, {{limit}} and {{op}} may stand in braces, not {name!r}")
        return sentence

    @model_validator(mode="after")
    def _stages_agree(self) -> Rule:
        if self.stage is not None and (self.stage == "postop") != (self.judged_stage == "postop"):
            raise ValueError(f"stage {self.stage!r} does not go with metric {self.metric!r}")
        if self.demands is not None and self.judged_stage == "postop":
            raise ValueError("another form can only be asked for before the write, of a preop metric")
        if self.editors is not None and self.stage == "key":
            raise ValueError("a rule that screens single requests binds every editor: leave `editors` out")
        return self

    def binds(self, plans: str, editor: str | None) -> bool:
        """Whether such plans are held to it; an editor that is not named is held to every rule."""
        return self.plans in (None, plans) and (
            self.editors is None or editor is None or editor in self.editors
        )

    @property
    def judged_stage(self) -> JudgedStage:
        """Which of the two judgements the rule belongs to."""
        return "postop" if self.metric.startswith("postop/") else "preop"

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the limit. A value that is not finite keeps none."""
        if not math.isfinite(value):
            return False
        return {
            "<=": value <= self.limit,
            ">=": value >= self.limit,
            "==": value == self.limit,
            "<": value < self.limit,
            ">": value > self.limit,
        }[self.op]

    def say(self, value: float | None) -> str:
        """The sentence with its numbers, four significant digits."""
        shown = "an unknown amount" if value is None else f"{value:.4g}"
        return self.sentence.format(value=shown, limit=f"{self.limit:.4g}", op=OP_WORDS[self.op])

    def say_broken(self, value: float) -> str:
        """The sentence, and the form that is asked for instead."""
        if self.demands is None:
            return self.say(value)
        verb = "suggests" if self.level == "advisory" else "asks for"
        return f"{self.say(value)} The policy {verb} the form that holds in a context only (`--editor contextual`)."


_LATER = {"approvals": 1, "signed": False, "profile": "solo", "policy_owners": 1}


class Policy(Record):
    """All limits, and what follows when they are not kept."""

    version: Literal[1]
    name: StrictStr = Field(min_length=1)
    on_soft_fail: Literal["needs-approval", "blocked"] = "needs-approval"
    """What a soft finding that nobody waived does to a plan."""
    on_stopped: Literal["exclude", "refuse"] = "exclude"
    """Many requests, one stopped: leave it out of the joint solve, or stop the plan."""
    approval_hours: StrictFloat | StrictInt = Field(default=72.0, gt=0)
    """How long an approval may be used."""
    separate_approver: StrictBool = False
    """Whether the plan's author is barred from approving it."""
    approvals: StrictInt = Field(default=1, ge=1)
    """How many people have to approve: distinct keys, or distinct names where words need no signature."""
    signed: StrictBool = False
    """Whether an approval counts only with the signature of a trusted key."""
    profile: Literal["solo", "team"] = "solo"
    """"team" asks for signed words of somebody else; "solo" is one person alone, whose own approvals are marked."""
    policy_owners: StrictInt = Field(default=1, ge=1)
    """How many policy owners have to sign the next policy, and to name a key."""
    rules: tuple[Rule, ...] = Field(min_length=1)

    @field_validator("approval_hours")
    @classmethod
    def _as_float(cls, hours: float) -> float:
        return float(hours)

    @model_validator(mode="after")
    def _unique_ids(self) -> Policy:
        seen: set[str] = set()
        for rule in self.rules:
            if rule.id in seen:
                raise ValueError(f"rule id {rule.id!r} occurs twice")
            seen.add(rule.id)
        return self

    @model_validator(mode="after")
    def _team_is_strict(self) -> Policy:
        if self.profile == "team" and not (self.signed and self.separate_approver):
            raise ValueError("profile 'team' needs signed = true and separate_approver = true")
        return self

    @property
    def digest(self) -> str:
        """`sha256:…` of the parsed content: comments and layout of the file do not count."""
        # Settings that came later count where they are set, so that policies without them keep their digest.
        same = {name for name, usual in _LATER.items() if getattr(self, name) == usual}
        return digest_of(self.model_dump(mode="json", exclude=same))

    def rules_for(
        self,
        stage: Literal["key", "preop", "postop"],
        plans: Literal["one", "many"] = "one",
        editor: str | None = None,
    ) -> tuple[Rule, ...]:
        """The rules of one judgement; "key" are the pre-op rules that screen single requests."""
        binding = tuple(rule for rule in self.rules if rule.binds(plans, editor))
        if stage == "key":
            return tuple(rule for rule in binding if rule.stage == "key")
        return tuple(rule for rule in binding if rule.judged_stage == stage)


def load_policy(path: Path, known_metrics: Collection[str] | None = None) -> Policy:
    """Read a policy file. PolicyError names the file, the key and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy {path} cannot be read: {error}") from error
    return parse_policy(text, str(path), known_metrics)


def parse_policy(text: str, where: str, known_metrics: Collection[str] | None = None) -> Policy:
    """Parse TOML. With `known_metrics` ("preop/…", "postop/…"), a rule on any other metric is refused:
    it could never be measured, so every plan would end inconclusive."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PolicyError(f"policy {where} is not TOML: {error}") from error
    try:
        policy = Policy.model_validate(_flatten(raw, where))
    except ValidationError as error:
        raise PolicyError(f"policy {where}: {_first_problem(error, raw)}") from error
    if known_metrics is not None:
        _refuse_unknown_metrics(policy, known_metrics, where)
    return policy


def _flatten(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """TOML's `[defaults]` and `[[rule]]` to the record's fields; anything else stays and is refused there."""
    allowed = {"version", "name", "defaults", "rule"}
    for key in raw:
        if key not in allowed:
            raise PolicyError(
                f"policy {where}: unknown key {key!r}; allowed are {', '.join(sorted(allowed))}"
            )
    defaults = raw.get("defaults", {})
    known = {"on_soft_fail", "on_stopped", "approval_hours", "separate_approver", *_LATER}
    if not isinstance(defaults, dict):
        raise PolicyError(f"policy {where}: `defaults` is a table, written [defaults]")
    for key in defaults:
        if key not in known:
            raise PolicyError(
                f"policy {where}: unknown key 'defaults.{key}'; allowed are {', '.join(sorted(known))}"
            )
    top = {key: raw[key] for key in ("version", "name") if key in raw}
    if "version" in top and type(top["version"]) is not int:
        raise PolicyError(f"policy {where}: version is {top['version']!r}; this guardedit reads version 1")
    implied = {"signed": True, "separate_approver": True} if defaults.get("profile") == "team" else {}
    return {**top, **implied, **defaults, "rules": raw.get("rule", ())}


def _first_problem(error: ValidationError, raw: dict[str, Any]) -> str:
    first = error.errors()[0]
    place = list(first["loc"])
    rules = raw.get("rule")
    if len(place) > 1 and place[0] == "rules" and isinstance(place[1], int) and isinstance(rules, list):
        rule = rules[place[1]]
        name = rule.get("id") if isinstance(rule, dict) else None
        head = f"rule {name!r}" if name else f"rule number {place[1] + 1}"
        place = [head, *(part for part in place[2:] if part not in ("float", "int"))]
    key = ".".join(str(part) for part in place if part != "rules") or "[[rule]]"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; allowed are {', '.join(Rule.model_fields)}"
    return f"{key}: {first['msg']}, got {first.get('input')!r}"[:500]


def _refuse_unknown_metrics(policy: Policy, known: Collection[str], where: str) -> None:
    for rule in policy.rules:
        if rule.metric not in known:
            near = difflib.get_close_matches(rule.metric, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PolicyError(
                f"policy {where}: rule {rule.id!r} names the unknown metric {rule.metric!r}{hint}"
            )
