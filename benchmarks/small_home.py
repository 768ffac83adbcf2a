"""A home without a model: tensors of 96 bytes, and everything else real.

Real: gate (policy, judging, keys, signatures, approvals, states), ledger, versions, recovery, and the order of the
steps (`pipeline.sealing`, `deciding`, `publishing`, `recovery`). Not real: the bytes of an edit are drawn, not solved,
and the scores that the policy judges are given, not measured. No torch is loaded.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from guardedit.audit.versions import VersionStore
from guardedit.config import Settings
from guardedit.gate.keys import new_key
from guardedit.gate.policy import judge, parse_policy
from guardedit.gate.rules import Policy
from guardedit.gate.trust import Role
from guardedit.pipeline.history import History
from guardedit.pipeline.publishing import Today, carry_out, take_back
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.sealing import Replacing, plan_name, record_plan
from guardedit.pipeline.signing import trust_key
from guardedit.records import AuditReport, DriftReport, Plan, Score, digest_of, digest_of_bytes

PARAMETERS = ("layers.0.down.weight", "layers.1.down.weight")
PEOPLE: dict[str, tuple[Role, ...]] = {
    "ana": ("reviewer",), "eva": ("reviewer",), "ben": ("proposer", "reviewer"), "gus": ("break-glass",), "max": (),
}  # fmt: skip
AUTHOR = "ben"
POLICY = """
version = 1
name = "small"
[defaults]
profile = "team"
approvals = {approvals}
[[rule]]
id = "soft"
metric = "preop/delta_norm_ratio"
op = "<="
limit = 1.0
level = "soft"
sentence = "The update has {{value}} of the weight's size; the limit is {{limit}}."
[[rule]]
id = "hard"
metric = "preop/key_leakage"
op = "<="
limit = 1.0
level = "hard"
sentence = "Other text shares {{value}} of the key; the limit is {{limit}}."
[[rule]]
id = "harm"
metric = "postop/far_kl"
op = "<="
limit = 1.0
level = "hard"
sentence = "Other text moves by {{value}}; the limit is {{limit}}."
"""
BEFORE = {"pass": (0.5, 0.5), "ask": (2.0, 0.5), "block": (0.5, 2.0)}
"""What the gate is to say of a plan -> its two scores."""
AFTER: dict[str, float | None] = {"pass": 0.5, "fail": 2.0, "inconclusive": None}


@dataclass
class Clock:
    """Wall time that can be moved."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def forward(self, hours: float) -> None:
        """Move on."""
        self.now += timedelta(hours=hours)


class Session(History):
    """One process of one person, with the clock that all share."""

    clock: Clock
    name: str

    def now(self) -> datetime:
        """The shared time."""
        return self.clock.now

    @property
    def user(self) -> str:
        """Who is at the keyboard."""
        return self.name


class SmallHome:
    """One home, its people's keys, and the verbs."""

    def __init__(self, folder: Path, template: AuditReport, approvals: int = 1) -> None:
        self.folder, self.template, self.clock = folder, template, Clock()
        self.home, self.keys = folder / "home", folder / "keys"
        self.policy: Policy = parse_policy(
            POLICY.format(approvals=approvals),
            frozenset({"preop/delta_norm_ratio", "preop/key_leakage", "postop/far_kl"}),
        )
        self.today = Today(self.policy, {})
        self._drawn = random.Random(0)

    def begin(self) -> None:
        """Base model, keys, and whose the home trusts."""
        import numpy as np

        base = self.folder / "base"
        base.mkdir(parents=True)
        tensors = {name: np.arange(24, dtype=np.float32) + i for i, name in enumerate(PARAMETERS)}
        save_file(tensors, base / "model.safetensors")
        (base / "config.json").write_text('{"model_type": "tiny"}')
        (base / "tokenizer.json").write_text('{"version": "1.0"}')
        manifest = {name: digest_of_bytes(tensor.tobytes()) for name, tensor in tensors.items()}
        VersionStore(self.home).import_base(manifest, base, "tiny")
        for name, roles in PEOPLE.items():
            new_key(self.keys, name)
            for role in roles:
                trust_key(self.session(), self.keys / f"{name}.pub", role)

    def copied(self, folder: Path, approvals: int) -> SmallHome:
        """The same home elsewhere, as it is now."""
        shutil.copytree(self.folder, folder)
        other = SmallHome(folder, self.template, approvals)
        other.session().store.import_base(self.session().store.manifest(), folder / "base", "tiny")
        return other

    def session(self, key: str | None = None, name: str | None = None) -> Session:
        """A fresh process, in which `key` signs."""
        made = Session(Settings(model="tiny", home=self.home, key=key, keys=self.keys))
        made.clock, made.name = self.clock, name or key or "somebody"
        return made

    def plan(self, says: str, parameter: str, replaces: str | None = None) -> Plan:
        """A plan of which the gate says `says`; real but for its bytes and scores."""
        record = self.session(AUTHOR)
        with editing(record):
            image, live = self._drawn.randbytes(96), record.store.manifest()
            plan = self._drafted(record, BEFORE[says], parameter, live[parameter], image)
            replacing = Replacing(replaces) if replaces else None
            record_plan(record, plan, image, self.policy, replacing)
        return plan

    def _drafted(
        self, record: Session, values: tuple[float, float], parameter: str, before: str, image: bytes
    ) -> Plan:
        given, now, live = self.template.plan, self.clock.now, record.store.digest()
        names = ("delta_norm_ratio", "key_leakage")
        scores = tuple(
            Score(name=n, value=v, unit="ratio", stage="delta", scope="model")
            for n, v in zip(names, values, strict=True)
        )
        digest = digest_of_bytes(image)
        change = given.delta.changes[0].model_copy(
            update={"parameter": parameter, "digest_before": before, "digest_after": digest}
        )
        delta = given.delta.model_copy(
            update={
                "changes": (change,),
                "file_digest": digest,
                "model_digest": live,
                "statistics_digests": {},
            }
        )
        judgement = judge(scores, self.policy, (), "preop", now)
        return given.model_copy(
            update={
                "plan_id": plan_name(record, given.requests),
                "created": now.isoformat(),
                "author": AUTHOR,
                "model_digest": live,
                "base_digest": record.store.base().digest,
                "delta": delta,
                "judgement": judgement,
                "policy_digest": self.policy.digest,
                "risk": given.risk.model_copy(update={"scores": scores}),
            }
        )

    def apply(self, plan_id: str, verdict: str, session: Session | None = None) -> None:
        """The real order of an apply; the monitor's score is the one that leads to `verdict`."""
        record = session or self.session()
        plan = record.read_plan(plan_id)
        with editing(record):
            carry_out(
                record,
                plan,
                self.today,
                lambda: self._images(record, plan),
                lambda: self._facts(record, plan, verdict),
            )

    def roll_back(self, plan_id: str, session: Session | None = None) -> None:
        """The real undo."""
        record = session or self.session()
        plan = record.read_plan(plan_id)
        with editing(record):
            take_back(record, plan, record.state(plan_id), "asked for")

    def _images(self, record: Session, plan: Plan) -> Mapping[str, bytes]:
        data = (record.plan_folder(plan.plan_id) / "delta.safetensors").read_bytes()
        return {plan.delta.changes[0].parameter: data}

    def _facts(self, record: Session, plan: Plan, verdict: str) -> dict[str, Any]:
        score = Score(
            name="far_kl", value=AFTER[verdict], unit="nats", stage="postop", scope="far", reason="given"
        )
        drift: DriftReport = (self.template.drift or DriftReport(reference="previous", scores=())).model_copy(
            update={"scores": (score,)}
        )
        judged = judge((score,), self.policy, (), "postop", self.clock.now)
        return {
            "plan_digest": plan.digest,
            "drift": drift.model_dump(mode="json"),
            "drift_digest": digest_of(drift),
            "drift_base": None,
            "postop": judged.model_dump(mode="json"),
            "digest_before": record.store.digest(),
            "digest_staged": record.store.staged(plan.plan_id).digest,
            "target_probabilities": dict(self.template.target_probabilities),
        }
