"""What is measured on the staged copy, and everything about one edit."""

from __future__ import annotations

from typing import ClassVar, Literal

from guardedit.records.base import Digest, Grown, Outcome, Record, Scope, digest_of
from guardedit.records.measured import ProbeChange, Score
from guardedit.records.plans import Decision, Judgement, Plan, RequestOutcome


class LatentDrift(Record):
    """How one latent's firing changed, on the same tokens through both models."""

    hook_name: str
    latent: int
    scope: Scope
    rate_before: float
    rate_after: float
    turnover: float
    """Share of the firing set that changed, 1 − Jaccard."""
    magnitude_ratio: float | None
    p_value: float
    significant: bool
    kind: Literal["intended", "spill", "collateral"]
    label: str


class DomainDrift(Record):
    """Behaviour on one control domain."""

    domain: str
    scope: Scope
    kl_nats: float
    kl_low: float
    kl_high: float
    perplexity_ratio: float | None
    lost_top1: float
    """Share of positions whose most likely token changed."""
    n_sequences: int
    n_tokens: int


class DriftReport(Record):
    """What changed in the staged copy against a reference version, on the same tokens."""

    reference: Literal["previous", "base"]
    scores: tuple[Score, ...]
    latents: tuple[LatentDrift, ...] = ()
    domains: tuple[DomainDrift, ...] = ()
    probes: tuple[ProbeChange, ...] = ()
    integrity: dict[str, bool] = {}
    """Named yes/no facts, e.g. "layers below the edit are bit-identical"."""
    resolution: dict[str, float] = {}
    """Smallest firing rate and effect that the probe size could have shown."""
    not_measured: tuple[str, ...] = ()
    inputs: dict[str, str] = {}
    seconds: float = 0.0

    def score(self, name: str) -> Score | None:
        """The score of that name, or None."""
        return next((s for s in self.scores if s.name == name), None)


class AuditReport(Grown):
    """Everything about one edit, for the record: the source of report.md and report.html."""

    later: ClassVar[frozenset[str]] = frozenset({"seal"})

    schema_version: int = 1
    edit_id: str
    plan: Plan
    plan_digest: Digest
    decision: Decision | None
    outcome: Outcome
    drift: DriftReport | None = None
    drift_base: DriftReport | None = None
    """The same against the lineage's base, when that is not the previous version."""
    postop: Judgement | None = None
    target_probabilities: dict[str, float] = {}
    """"old_before", "new_before", "old_after", "new_after"; of a joint plan the means, with the lowest P(new) as
    "new_after_worst" and the highest P(old) as "old_after_worst"."""
    outcomes: tuple[RequestOutcome, ...] = ()
    """Of a joint plan, one for each of its requests."""
    digest_before: Digest
    digest_staged: Digest | None = None
    digest_after: Digest
    """Digest of the version that is live when the report is written."""
    mlflow_run_id: str | None = None
    mlflow_note: str | None = None
    not_measured: tuple[str, ...] = ()
    created: str
    seal: Digest | None = None
    """Digest of the record without its seal; in files, so that one can be checked by itself."""

    def sealed(self) -> AuditReport:
        """The same with a fresh seal."""
        return self.model_copy(update={"seal": digest_of(self.model_copy(update={"seal": None}))})
