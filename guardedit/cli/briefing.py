"""The reviewers' desk in a terminal: what waits, one after the other, and a word on each."""

from __future__ import annotations

from rich.console import Console

from guardedit.cli.differences import difference_text
from guardedit.cli.words import clean, decisions_text, disturbed_lines, findings_lines, request_lines
from guardedit.errors import GuardeditError, IntegrityError
from guardedit.pipeline.deciding import decide_plan
from guardedit.pipeline.history import History
from guardedit.pipeline.reviewing import Waiting, queue, waiting

_CHOICES = {
    "a": "approve", "approve": "approve", "r": "reject", "reject": "reject",
    "s": "skip", "skip": "skip", "": "skip", "q": "quit", "quit": "quit",
}  # fmt: skip
_ASKED = "  [a]pprove  [r]eject  [s]kip  [q]uit > "
CLOSEST = 3
"""Limits that are kept and shown all the same: those that were used up most."""


class Desk:
    """One walk through the queue, in a terminal."""

    def __init__(self, record: History) -> None:
        self.record = record
        self.out: Console = Console(markup=False, highlight=False)
        self.told: list[str] = []
        self.decided: list[str] = []
        """Plans that got a word."""

    def walk(self, plan_ids: list[str]) -> None:
        """Each plan in turn, until the end or `quit`; what was decided is said once more."""
        for number, plan_id in enumerate(plan_ids, start=1):
            self.out.rule(f"{number} of {len(plan_ids)}", characters="-", style="none")
            if not self._one(plan_id):
                break
        left = len(plan_ids) - len(self.told)
        self.out.print("\n".join([*self.told, f"{left} left" if plan_ids else "nothing waits for a person"]))

    def _one(self, plan_id: str) -> bool:
        """Show and ask until there is a word, a skip, or `quit` (False)."""
        if plan_id not in queue(self.record):
            self.out.print(f"plan {plan_id} does not wait any more: {self.record.state(plan_id)}")
            return True
        self.out.print(brief(waiting(self.record, plan_id)), soft_wrap=True)
        while True:
            choice = self._ask(_ASKED)
            choice = _CHOICES.get(choice.lower()) if choice is not None else "quit"
            if choice in ("skip", "quit"):
                return choice == "skip"
            if choice is not None and self._decide(plan_id, choice):
                return True

    def _decide(self, plan_id: str, choice: str) -> bool:
        """Put the word on record, as `approve` and `reject` do; False where it is no word or is refused."""
        reason = self._ask(f"  reason to {choice} > ")
        if not reason:
            self.out.print("  no reason, no word")
            return False
        outcome = "approved" if choice == "approve" else "rejected"
        try:
            word = decide_plan(self.record, plan_id, outcome, reason)
        except IntegrityError:
            raise
        except GuardeditError as error:
            self.out.print(f"  refused: {clean(str(error))}", soft_wrap=True)
            return False
        self.told.append(f"{plan_id}: {word.outcome} by {word.approver}; now {self.record.state(plan_id)}")
        self.decided.append(plan_id)
        self.out.print(f"  {word.outcome} by {word.approver}")
        return True

    def _ask(self, prompt: str) -> str | None:
        """What was typed, without blanks around it; None at the end of the input."""
        try:
            return self.out.input(prompt, markup=False).strip()
        except EOFError:
            return None


def brief(one: Waiting) -> str:
    """What a reviewer needs: of a plan made anew that is not worse the difference alone, else what `show` shows."""
    plan = one.plan
    lines = [f"plan {plan.plan_id} by {clean(plan.author)}, {one.state}   {plan.digest[:19]}…"]
    lines += request_lines(plan)
    if one.difference is not None:
        lines.append(difference_text(one.difference))
    if one.postop is not None:
        lines.append(f"  HELD: {clean(one.postop.reason)}   report {str(one.drift_digest)[:19]}…")
        lines += findings_lines(one.postop, CLOSEST)
    elif one.difference is None or not one.difference["not_worse"]:
        lines.append(f"  {plan.judgement.outcome.upper()}: {clean(plan.judgement.reason)}")
        lines += [*findings_lines(plan.judgement, CLOSEST), *disturbed_lines(plan.risk)]
    lines.append(f"  more: guardedit show {plan.plan_id}   guardedit try {plan.plan_id} PROMPT")
    return "\n".join(lines) + decisions_text(list(one.words))
