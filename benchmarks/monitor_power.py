"""The monitor's size and power: harmless edits that it should let through, and planted leaks that it should find.

    python -m benchmarks.monitor_power run OUT --facts FILE [--edits 30] [--carriers 3]
    python -m benchmarks.monitor_power table OUT

OUT is a folder of `evaluate guard --editor rome`, whose stored deltas are taken up. *Size*: known facts whose edit did
next to nothing on text and prompts that the monitor does not read, judged by the shipped post-op limits; none of them
is in the monitor's reference bank. *Power*: a leak is planted in a carrier edit: a rank-one update whose key is what
sets one domain's tokens apart and whose direction is drawn by seed, grown until it changes a given share of that
domain's top-1 predictions, measured on text that the monitor does not read. Resumable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.reference_bank import read_delta
from guardedit.drift.measure import drift_cache, measure_drift
from guardedit.drift.probes import FAR_TOKENS, ProbeSet, build_probes
from guardedit.drift.sides import base_side
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.far_sample import FarSample
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.gate.policy import judge
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.hooks import key_hook
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.measuring import risk_context
from guardedit.pipeline.monitoring import MONITOR_SIZES
from guardedit.records import DriftReport, EditRequest
from guardedit.risk.neighbours import generated_probes

SEED = 0
SIZES = (0.005, 0.01, 0.02, 0.05)
"""Shares of a domain's top-1 predictions that a leak changes."""
PLANTED = ("python", "arithmetic", "chat")
HARMLESS = {"near/lost_top1": 0.0, "far/kl_nats": 0.002, "subject/lost_top1": 0.25}
"""By behaviour on prompts and text that the monitor does not read, at most."""
STEPS = 7


@dataclass(frozen=True)
class Lab:
    """Model, statistics and the text that leaks are sized on."""

    guard: Guard
    facts: dict[str, EvalCase]
    out: Path

    @cached_property
    def sizing(self) -> FarSample:
        """Control text's calibration half: the monitor reads the other."""
        texts = {n: control_texts(self.guard.handle, n, 4096, SEED, half="calibrate") for n in DOMAINS}
        renamed = {f"{name} calibrate": found for name, found in texts.items()}
        return FarSample.of(self.guard.handle, self.guard.kit.layer, SEED, renamed, n_tokens=1024)

    def probes(self, request: EditRequest) -> ProbeSet:
        """What the monitor reads around one edit."""
        prompts = generated_probes(self.guard.handle, request, MONITOR_SIZES, SEED)
        return build_probes(self.guard.handle, [request], [prompts], far_tokens=FAR_TOKENS, seed=SEED)

    def monitored(self, probes: ProbeSet, delta: EditDelta) -> DriftReport:
        """The monitor's report."""
        kit, handle = self.guard.kit, self.guard.handle
        side = base_side(handle, probes, kit.layer, tuple(kit.monitors), cache=drift_cache())
        return measure_drift(
            handle, side, probes, kit.monitors, change=delta, bank=kit.drift_bank,
            bank_model_digest=handle.digest(), seed=SEED,
        )  # fmt: skip

    def leak(self, domain: str, size: float) -> EditDelta:
        """A rank-one leak into a domain, of a size in units of the module's own output on it."""
        context = risk_context(self.guard)
        keys = {name: context.bank.of_domain(name).double() for name in DOMAINS}
        others = torch.cat([found for name, found in keys.items() if name != domain])
        key = keys[domain].mean(0) - others.mean(0)
        return _rank_one(self.guard, key, size)

    def sized_leak(self, domain: str, share: float) -> tuple[EditDelta, float]:
        """The leak that changes this share of the domain's top-1 predictions, by bisection, and what it came to."""
        low, high, found, came = 0.0, 64.0, self.leak(domain, 0.0), 0.0
        for _ in range(STEPS):
            middle = (low * high) ** 0.5 if low else high / 8
            made = self.leak(domain, middle)
            lost = self.sizing.moves(made)[f"lost_top1/{domain} calibrate"]
            found, came = (made, lost) if abs(lost - share) < abs(came - share) else (found, came)
            low, high = (middle, high) if lost < share else (low, middle)
        return found, came


def _rank_one(guard: Guard, key: Float[Tensor, " d_in"], size: float) -> EditDelta:
    handle, layer = guard.handle, guard.kit.layer
    whitened = guard.kit.second_moments[key_hook(layer)].solve(key).cpu()
    noise = torch.Generator().manual_seed(SEED)
    weight = handle.weight(layer).detach().double().cpu()
    direction = torch.randn(weight.shape[0], generator=noise, dtype=torch.float64)
    left = size * (weight @ key).norm() * direction / direction.norm()
    right = whitened / (key @ whitened)
    change = WeightChange(handle.rewrite_parameter(layer), layer, LowRank(left[:, None], right[None, :]))
    return EditDelta((change,), "planted", {"size": size}, {})


def both(carrier: EditDelta, leak: EditDelta) -> EditDelta:
    """The carrier's update and the leak's as one."""
    (one,), (two,) = carrier.changes, leak.changes
    if not (isinstance(one, WeightChange) and isinstance(two, WeightChange)):
        raise SystemExit("a carrier is a change of one rewrite module")
    if not (isinstance(one.update, LowRank) and isinstance(two.update, LowRank)):
        raise SystemExit("a carrier is of low rank")
    left = torch.cat([one.update.left.double(), two.update.left], 1)
    right = torch.cat([one.update.right.double(), two.update.right], 0)
    return replace(carrier, changes=(replace(one, update=LowRank(left, right)),))


def harmless(lab: Lab) -> Iterator[tuple[EditRequest, EditDelta, str]]:
    """Edits of known facts that did next to nothing where the monitor does not look."""
    path = lab.out / "rome-known.jsonl"
    for line in path.read_text("utf-8").splitlines()[1:]:
        row = json.loads(line)
        stored_at = lab.out / "rome-deltas" / f"known-{row['case_id']}.safetensors"
        if row["error"] is None and all(row["outcomes"].get(n, 1) <= most for n, most in HARMLESS.items()):
            yield lab.facts[row["case_id"]].request, read_delta(stored_at, "rome"), row["case_id"]


def run(lab: Lab, edits: int, carriers: int) -> None:
    """Monitor harmless edits, then carriers with leaks."""
    rows = RowFile(lab.out / "monitor" / "power.jsonl", {"model": lab.guard.handle.digest(), "seed": SEED})
    done = {(row["case_id"], row["domain"], row["share"]) for row in rows.load()}
    for number, (request, delta, case_id) in enumerate(harmless(lab)):
        if number >= max(edits, carriers):
            break
        wanted = [("", 0.0)] if number < edits else []
        wanted += [(d, s) for d in PLANTED for s in SIZES] if number < carriers else []
        todo = [one for one in wanted if (case_id, *one) not in done]
        probes = lab.probes(request) if todo else None
        for domain, share in todo:
            leak, came = lab.sized_leak(domain, share) if domain else (None, 0.0)
            report = lab.monitored(probes, both(delta, leak) if leak else delta)  # type: ignore[arg-type]
            rows.append(
                {
                    "case_id": case_id,
                    "domain": domain,
                    "share": share,
                    "came_to": came,
                    **_verdict(lab, report),
                }
            )


def _verdict(lab: Lab, report: DriftReport) -> dict[str, Any]:
    from datetime import UTC, datetime

    judged = judge(report.scores, lab.guard.kit.policy, (), "postop", datetime.now(UTC), "one")
    domains = {d: report.score(f"far_kl_{d}") for d in DOMAINS}
    return {
        "outcome": judged.outcome,
        "broken": [f.rule for f in judged.findings if f.verdict == "fail" and f.level != "advisory"],
        "far": {d: s.value for d, s in domains.items() if s is not None},
    }


def table(out: Path) -> str:
    """False alarms and detections."""
    lines = [
        json.loads(line) for line in (out / "monitor" / "power.jsonl").read_text("utf-8").splitlines()[1:]
    ]
    calm = [float(row["outcome"] != "committed") for row in lines if not row["domain"]]
    found = [
        "| planted in | share of top-1 changed | n | fired by a far limit | its domain named first |",
        "|---|---|---|---|---|",
    ]
    for domain in PLANTED:
        for share in SIZES:
            rows = [r for r in lines if r["domain"] == domain and r["share"] == share]
            if rows:
                fired = sum(any(rule.startswith(("far", "perplexity")) for rule in r["broken"]) for r in rows)
                first = sum(max(r["far"], key=lambda d: r["far"][d]) == domain for r in rows)
                found.append(
                    f"| {domain} | {share:.3f} | {len(rows)} | {fired / len(rows):.2f} | {first / len(rows):.2f} |"
                )
    alarm = estimate(calm, SEED)
    told = (
        f"False alarms: {alarm.value:.3f} ({alarm.low:.3f} to {alarm.high:.3f}), n {alarm.n}"
        if alarm
        else "none monitored"
    )
    return told + "\n\n" + "\n".join(found)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("--facts", type=Path, required=True)
    running.add_argument("--edits", type=int, default=30)
    running.add_argument("--carriers", type=int, default=3)
    steps.add_parser("table").add_argument("out", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.out))
        return
    cases = {case.case_id: case for case in read_cases(args.facts, "train").cases}
    run(Lab(open_guard(home=args.out / "home-monitor"), cases, args.out), args.edits, args.carriers)


if __name__ == "__main__":
    main()
