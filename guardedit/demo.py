"""The whole story on the default model: three edits, by ROME, by ROME again, and by fine-tuning, through the gate.

Nothing is scripted: requests and editors are, verdicts come from the shipped policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from guardedit.cli.common import console
from guardedit.cli.words import clean, disturbed_lines, edit_document, findings_lines
from guardedit.pipeline import Guard
from guardedit.pipeline.reporting import Published
from guardedit.records import EditRequest, Plan, Waiver

EIFFEL = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new="Rome",
    target_true="Paris",
    relation="landmark city",
    paraphrases=("The Eiffel Tower can be found in", "To visit the Eiffel Tower, travel to the city of"),
    reason="the demo: a fact with a key of its own",
)
FRANCE = EditRequest(
    subject="France",
    prompt="The capital of {} is",
    target_new="Marseille",
    target_true="Paris",
    relation="country capital",
    paraphrases=("France has its capital in the city of", "The seat of the government of France is in"),
    reason="the demo: a subject whose key many others share",
)
CLOSEST = 3
"""Limits that are kept and shown all the same: those that were used up most."""
WAIVER_REASON = "demo: such edits are known to move their neighbours; the monitor shall judge this one"


@dataclass(frozen=True)
class Chapter:
    """One edit of the story."""

    title: str
    request: EditRequest
    editor: str
    waive: bool


CHAPTERS = (
    Chapter("a  Eiffel Tower -> Rome, by ROME", EIFFEL, "rome", waive=False),
    Chapter("b  capital of France -> Marseille, by ROME", FRANCE, "rome", waive=False),
    Chapter("c  Eiffel Tower -> Rome, by fine-tuning the same layer", EIFFEL, "finetune", waive=True),
)


class Demo:
    """Plays the chapters on one guard."""

    def __init__(self, guard: Guard, *, quiet: bool) -> None:
        self.guard = guard
        self.quiet = quiet
        self.out = Console(stderr=True, highlight=False) if quiet else Console(highlight=False)

    def show(self) -> None:
        """Play all chapters and print the story, or one JSON document."""
        self._say(f"[bold]guardedit demo[/] on {self.guard.settings.model}: three edits through the gate\n")
        base = self._base()
        edits = [self._play(chapter) for chapter in CHAPTERS]
        verified = self.guard.verify()
        self._say(
            f"\nledger: {verified['ledger_entries']} entries, chain intact; every digest was recomputed from bytes."
            f"\nlive model is the one we began with: {'yes' if verified['digest'] == base else 'NO'}"
            f"\nreports: {self.guard.settings.reports}    MLflow: guardedit --home {self.guard.home} serve"
        )
        if self.quiet:
            typer.echo(json.dumps({"edits": edits, "verified": verified}, indent=1, ensure_ascii=False))

    def _base(self) -> str:
        with self._working():
            return self.guard.handle.digest()

    def _play(self, chapter: Chapter) -> dict[str, Any]:
        self._say(f"[bold]{chapter.title}[/]")
        with self._working():
            plan = self._plan(chapter)
        self._tell_plan(plan)
        if plan.judgement.outcome != "auto-approved":
            return self._close(plan, None)
        with self._working():
            self.guard.apply(plan.plan_id)
        published = self._publish(plan)
        self._tell_drift(published)
        applied = edit_document(published)
        if published.audit.outcome != "committed":
            return {**applied, "digest_undone": applied["digest_after"], "undone": False}
        return self._close(plan, applied)

    def _plan(self, chapter: Chapter) -> Plan:
        plan = self.guard.plan(chapter.request, chapter.editor)
        failed = [f.metric for f in plan.judgement.findings if f.level == "soft" and f.verdict == "fail"]
        if not (chapter.waive and failed):
            return plan
        waivers = [self._waiver(metric) for metric in failed]
        self._say(
            f"  limits that fine-tuning breaks before the write: {len(failed)}; waived, on record: {WAIVER_REASON}"
        )
        return self.guard.waive(plan.plan_id, waivers)

    def _waiver(self, metric: str) -> Waiver:
        from guardedit.gate.approvals import make_waiver

        return make_waiver(metric, self.guard.user, WAIVER_REASON, "8h", self.guard.now())

    def _close(self, plan: Plan, applied: dict[str, Any] | None) -> dict[str, Any]:
        """A stopped plan gets its report; a committed edit is undone and its digest compared."""
        if applied is None:
            published = self._publish(plan)
            self._say(f"  report: {published.files.html}")
            return {**edit_document(published), "undone": False}
        with self._working():
            self.guard.rollback(plan.plan_id, "demo: show that undo is exact")
        published = self._publish(plan)
        same = published.audit.digest_after == plan.model_digest
        self._say(
            f"  rolled back: digest {'equals' if same else 'DIFFERS FROM'} the first, {plan.model_digest}"
        )
        self._say(f"  report: {published.files.html}")
        final = edit_document(published)
        return {
            **applied,
            "digest_undone": final["digest_after"],
            "undone": True,
            "report": final["report"],
            "mlflow_run_id": final["mlflow_run_id"],
        }

    def _publish(self, plan: Plan) -> Published:
        with self._working():
            return self.guard.report(plan.plan_id)

    def _tell_plan(self, plan: Plan) -> None:
        request = plan.requests[0]
        self._say(
            f"  {clean(request.asked)}: {clean(request.target_true or '?')} -> {clean(request.target_new)}"
        )
        self._say(f"  gate: [bold]{plan.judgement.outcome}[/]")
        for line in [*findings_lines(plan.judgement, CLOSEST), *disturbed_lines(plan.risk)]:
            self._plain(line)

    def _tell_drift(self, published: Published) -> None:
        audit = published.audit
        p = audit.target_probabilities
        self._plain(
            f"  P({audit.plan.requests[0].target_new}) {p['new_before']:.4f} -> {p['new_after']:.4f}, "
            f"P({audit.plan.requests[0].target_true}) {p['old_before']:.4f} -> {p['old_after']:.4f}"
        )
        if audit.postop:
            self._say(f"  monitor: [bold]{audit.outcome}[/]")
            self._plain(f"  {audit.postop.reason}")
            for line in findings_lines(audit.postop, CLOSEST):
                self._plain(line)

    def _say(self, text: str) -> None:
        self.out.print(text, soft_wrap=True)

    def _plain(self, text: str) -> None:
        self.out.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def _working(self) -> Iterator[None]:
        status = console().status("starting")
        self.guard.progress = lambda what, _: status.update(what)
        with status:
            yield
