"""What is measured before the write."""

from __future__ import annotations

from typing import ClassVar

from guardedit.records.base import Grown, Record, Scope, Stage


class Score(Record):
    """One measured number. `value` is None where it could not be measured, and then `reason` says why."""

    name: str
    """Slash-free metric name, e.g. "leakage"; policies and MLflow use "preop/leakage"."""
    value: float | None
    unit: str
    """"nats", "ratio", "share", "count", "log10", …"""
    stage: Stage
    scope: Scope
    n: int | None = None
    """Number of independent units behind the value (tokens, prompts, sequences)."""
    low: float | None = None
    high: float | None = None
    """95 % interval where one is known."""
    seed: int | None = None
    reason: str | None = None
    """Why there is no value, or a remark on its validity."""
    percentile: float | None = None
    """Where the value lies within the reference bank of real edits, 0 to 100."""


class LatentLeak(Record):
    """One concept that the write picks up: `leak` = E[a_f²]·‖ΔW d_f‖²."""

    hook_name: str
    latent: int
    leak: float
    share: float
    """Of the leakage explained by all latents."""
    label: str
    examples: tuple[str, ...] = ()
    firing_rate: float | None = None


class TokenMove(Record):
    """A token in context that the write would move: ‖ΔW x‖ relative to ‖W x‖."""

    context: str
    token: str
    move: float
    domain: str


class ProbeChange(Record):
    """One prompt before and after: what a person can check with their own eyes."""

    scope: Scope
    prompt: str
    before: str
    """Top next token before."""
    after: str
    p_before: float
    """Probability of the old top token, before."""
    p_after: float
    """Probability of the same token, after."""
    kl_nats: float


class ProbePrompts(Grown):
    """Prompts that ask what an edit did, by scope. Each is complete: its subject is filled in."""

    later: ClassVar[frozenset[str]] = frozenset({"namesake"})

    target: tuple[str, ...] = ()
    """The request's own prompt and its paraphrases: must change."""
    entailed: tuple[str, ...] = ()
    """May rightly change."""
    subject: tuple[str, ...] = ()
    """Same subject, other relations: must not change."""
    near: tuple[str, ...] = ()
    """Other subjects, same relation: must not change."""
    namesake: tuple[str, ...] = ()
    """Made-up subjects whose names end as the subject's does: must not change."""
    note: str = ""
    """How the prompts came about, and what is missing."""


class RiskReport(Grown):
    """What an edit would do to everything else, measured before anything is written."""

    later: ClassVar[frozenset[str]] = frozenset({"evidence"})

    scores: tuple[Score, ...]
    latents: tuple[LatentLeak, ...] = ()
    tokens: tuple[TokenMove, ...] = ()
    probes: tuple[ProbeChange, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, str] = {}
    """Digests of everything the scores were computed from: SAE, second moment, banks, prompts."""
    seconds: dict[str, float] = {}
    evidence: dict[str, str] = {}
    """Score -> what it has been worth on edits whose damage was measured, in words."""

    def score(self, name: str) -> Score | None:
        """The score of that name, or None."""
        return next((s for s in self.scores if s.name == name), None)
