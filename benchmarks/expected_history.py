"""What ought to follow from what people, the clock and crashes do: plain ifs over plain values.

It knows neither the table of states nor any other code of the package; `histories` compares the two after each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

AUTHOR = "ben"
REVIEWERS = ("ana", "eva", AUTHOR)
WAITING = ("needs-approval", "auto-approved", "approved")
WORD_HOURS, EMERGENCY_HOURS = 72.0, 2.0


@dataclass
class Case:
    """What is known of one plan."""

    state: str
    made_on: dict[str, str]
    parameter: str
    after: str
    blocked: bool
    words: list[tuple[str, float]] = field(default_factory=list)
    """Who, and when; the policy's own word is nobody's."""
    held_words: list[tuple[str, float]] = field(default_factory=list)
    refused: bool = False
    """Somebody said no to the held edit; that stands."""
    staged_on: dict[str, str] = field(default_factory=dict)
    staged_at: int = 0
    before: str = ""
    commit: int = 0


class Expected:
    """What ought to be: plain ifs over plain values."""

    def __init__(self, live: dict[str, str], approvals: int) -> None:
        self.cases: dict[str, Case] = {}
        self.live, self.approvals, self.hour = dict(live), approvals, 0.0
        self.trusted = set(REVIEWERS) | {"gus"}
        self.versions = 0
        self.ever = [dict(live)]

    def settle(self) -> None:
        """What whoever has the lock puts right first: crashes, and plans that something overtook."""
        crashed = [c for c in self.cases.values() if c.state in ("applied", "monitored")]
        overtaken = [c for c in self.cases.values() if c.state in WAITING and c.made_on != self.live]
        for case in crashed:
            case.state = "rolled-back"
        for case in overtaken:
            case.state = "stale"
        if crashed or overtaken:
            for case in self.cases.values():
                if case.state == "held" and case.staged_at != self.versions:
                    case.state = "rolled-back"

    def age(self, case: Case) -> None:
        """The clock's part: an old yes is none."""
        if case.state in ("approved", "auto-approved"):
            limit = EMERGENCY_HOURS if case.blocked else WORD_HOURS
            if self.hour - case.words[-1][1] > limit:
                case.state = "expired"

    def enough(self, words: list[tuple[str, float]], case: Case, emergency: bool) -> bool:
        """Whether these words open the gate now."""
        if AUTHOR not in self.trusted:
            return False
        if words and words[0][0] == "policy" and len(words) == 1:
            return self.hour - words[0][1] <= WORD_HOURS
        if emergency:
            return any(who == "gus" and self.hour - at <= EMERGENCY_HOURS for who, at in words) and (
                "gus" in self.trusted
            )
        fresh = {who for who, at in words if self.hour - at <= WORD_HOURS}
        return len(fresh & self.trusted & {"ana", "eva"}) >= self.approvals

    def planned(self, name: str, says: str, parameter: str, after: str) -> None:
        """A plan was made."""
        state = {"pass": "auto-approved", "ask": "needs-approval", "block": "blocked"}[says]
        self.cases[name] = Case(state, dict(self.live), parameter, after, says == "block")
        if says == "pass":
            self.cases[name].words.append(("policy", self.hour))

    def approve(self, name: str, who: str) -> bool:
        """A yes; whether it ends up on record."""
        self.settle()
        case = self.cases[name]
        if AUTHOR not in self.trusted:
            return False
        self.age(case)
        if case.state not in ("needs-approval", "approved", "held"):
            return False
        blocked = case.blocked and case.state != "held"
        if who not in self.trusted or who not in ("ana", "eva") or blocked:
            return False
        if case.state == "held":
            if not case.refused:
                case.held_words.append((who, self.hour))
            return not case.refused
        case.words.append((who, self.hour))
        if case.state == "needs-approval" and self.enough(case.words, case, False):
            case.state = "approved"
        return True

    def reject(self, name: str, who: str | None) -> bool:
        """A no."""
        self.settle()
        case = self.cases[name]
        self.age(case)
        if case.state not in (*WAITING, "held"):
            return False
        if who is not None and (who not in self.trusted or who not in REVIEWERS):
            return False
        if case.state == "held":
            case.refused = True
        else:
            case.state = "rejected"
        return True

    def break_glass(self, name: str, who: str) -> bool:
        """An emergency word."""
        self.settle()
        case = self.cases[name]
        if AUTHOR in self.trusted:
            self.age(case)
        if case.state != "blocked" or who != "gus" or not {who, AUTHOR} <= self.trusted:
            return False
        case.words.append((who, self.hour))
        case.state = "approved"
        return True

    def may_apply(self, name: str) -> bool:
        """Whether a plan gets as far as a staged copy."""
        self.settle()
        case = self.cases[name]
        if case.state not in ("approved", "auto-approved"):
            return False
        if case.made_on != self.live:
            case.state = "stale"
            return False
        self.age(case)
        return case.state != "expired" and self.enough(case.words, case, case.blocked)

    def apply(self, name: str, verdict: str) -> None:
        """Stage, monitor, and what follows."""
        self.settle()
        case = self.cases[name]
        if case.state == "held":
            self._settle_held(case)
        elif self.may_apply(name):
            case.staged_on, case.staged_at = dict(self.live), self.versions
            if verdict == "pass":
                self._commit(case)
            else:
                case.state = "held" if verdict == "inconclusive" else "rolled-back"

    def _settle_held(self, case: Case) -> None:
        if case.refused:
            case.state = "rolled-back"
        elif self.enough(case.held_words, case, False):
            if case.staged_at == self.versions:
                self._commit(case)
            else:
                case.state = "rolled-back"

    def _commit(self, case: Case) -> None:
        case.before, case.state = self.live[case.parameter], "committed"
        self.live[case.parameter] = case.after
        self._moved()
        case.commit = self.versions

    def _moved(self) -> None:
        self.versions += 1
        self.ever.append(dict(self.live))
        for other in self.cases.values():
            if other.state in WAITING and other.made_on != self.live:
                other.state = "stale"

    def roll_back(self, name: str) -> None:
        """An undo, last in first out for each tensor."""
        self.settle()
        case = self.cases[name]
        if case.state == "held":
            case.state = "rolled-back"
        elif case.state == "committed":
            later = [
                c
                for c in self.cases.values()
                if c.state == "committed" and c.commit > case.commit and c.parameter == case.parameter
            ]
            if not later:
                self.live[case.parameter], case.state = case.before, "rolled-back"
                self._moved()
