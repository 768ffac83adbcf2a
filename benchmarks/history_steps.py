"""One home and what is expected of it, with a step for everything that people, the clock and crashes do.

After each step `check` compares the two; who chooses the steps is `histories` (at random) and tests/test_histories.py.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable

from benchmarks.expected_history import EMERGENCY_HOURS, WAITING, Expected
from benchmarks.small_home import AUTHOR, SmallHome
from guardedit.audit.ledger import Ledger
from guardedit.errors import GuardeditError, IntegrityError
from guardedit.pipeline.deciding import Emergency, decide_plan
from guardedit.pipeline.history import states_in
from guardedit.pipeline.overview import slips_of, states_of
from guardedit.pipeline.signing import revoke_key
from guardedit.records import digest_of

REASON = "looked at it: the histories want it"


class Crashed(BaseException):
    """The process ended here."""


class History:
    """One home and what is expected of it, with a step for everything that people, the clock and crashes do."""

    def __init__(self, world: SmallHome, approvals: int, seed: int = 0) -> None:
        self.world, self.draw = world, random.Random(seed)
        self.want = Expected(world.session().store.manifest(), approvals)
        self.base = world.session().store.digest()
        self.done: Counter[str] = Counter()

    # -- steps

    def plan(self, says: str, parameter: str, replaces: str | None = None) -> None:
        """A plan is proposed and checked, and may replace another."""
        self.want.settle()
        old = self.want.cases.get(replaces or "")
        possible = AUTHOR in self.want.trusted and (
            old is None or old.state in (*WAITING, "stale", "expired")
        )
        with _refused_unless(possible, self.done, "replan" if old else "plan"):
            made = self.world.plan(says, parameter, replaces)
            self.want.planned(made.plan_id, says, parameter, made.delta.changes[0].digest_after)
            if old is not None:
                old.state = "superseded"

    def approve(self, name: str, who: str) -> None:
        """Somebody approves, with a key that may or may not."""
        with _refused_unless(self.want.approve(name, who), self.done, "approve"):
            decide_plan(self.world.session(who), name, "approved", REASON)

    def reject(self, name: str, who: str | None) -> None:
        """Somebody rejects, with or without a key."""
        with _refused_unless(self.want.reject(name, who), self.done, "reject"):
            decide_plan(self.world.session(who), name, "rejected", REASON)

    def break_glass(self, name: str, who: str) -> None:
        """An emergency."""
        with _refused_unless(self.want.break_glass(name, who), self.done, "break-glass"):
            emergency = Emergency("INC-1", EMERGENCY_HOURS)
            decide_plan(self.world.session(who), name, "approved", REASON, emergency=emergency)

    def apply(self, name: str, verdict: str) -> None:
        """Apply, whatever it is."""
        self.want.apply(name, verdict)
        self._try("apply", lambda: self.world.apply(name, verdict))

    def roll_back(self, name: str) -> None:
        """Undo, whatever it is."""
        self.want.roll_back(name)
        self._try("roll-back", lambda: self.world.roll_back(name))

    def wait(self, hours: float) -> None:
        """Time passes."""
        self.want.hour += hours
        self.world.clock.forward(hours)
        self.done["wait"] += 1

    def revoke(self, who: str) -> None:
        """A key is trusted no more."""
        if who in self.want.trusted:
            self.want.settle()
            self.want.trusted.discard(who)
            revoke_key(self.world.session(), who, "lost")
            self.done["revoke"] += 1

    def tamper(self, name: str, what: str) -> None:
        """A byte of the plan, the update or the ledger is changed: nothing opens; then it is put back."""
        record = self.world.session()
        files = {
            "plan": record.plan_folder(name) / "plan.json",
            "delta": record.plan_folder(name) / "delta.safetensors",
            "ledger": record.ledger.path,
            "head": record.ledger.path.with_suffix(".head"),
        }
        self._touch(name)
        path = files[what]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[self.draw.randrange(len(whole))] ^= 1 << self.draw.randrange(8)
        live, states = record.store.digest(), record.states()
        path.write_bytes(bytes(changed))
        try:
            self._must_not_open(name, what)
        finally:
            path.write_bytes(whole)
        after = self.world.session()
        _require(after.store.digest() == live, f"a changed {what} changed what is live")
        _require(after.states() == states or what != "plan", f"a changed {what} changed a state")
        self.done[f"tamper {what}"] += 1

    def _touch(self, name: str) -> None:
        """Whoever comes first puts the home right: here somebody whose word is then refused."""
        self.want.approve(name, "max")
        session = self.world.session("max")
        self._try("settle", lambda: decide_plan(session, name, "approved", REASON))

    def _must_not_open(self, name: str, what: str) -> None:
        if what in ("ledger", "head"):
            try:
                found = self.world.session().states()
            except IntegrityError:
                return
            # Bytes of the file that no reader reads: then the answer is the same.
            _require(found == self._states(), "a changed ledger told another story")
            return
        if what == "plan" or self.want.cases[name].state not in ("held", "committed"):
            try:
                self.world.apply(name, "pass")
            except GuardeditError as error:
                opened = what == "plan" and not isinstance(error, IntegrityError)
                _require(not opened, f"a changed {what} was met with {error!r}")
                self._follow_refusal(name)
                return
            _require(False, f"a changed {what} was applied")

    def _follow_refusal(self, name: str) -> None:
        """What an apply puts on record before it looks at the update."""
        if self.world.session().states()[name] == "expired":
            self.want.age(self.want.cases[name])

    def forge(self, name: str) -> None:
        """An entry that says "approved" without anybody's signature: the state believes it, the gate does not."""
        case = self.want.cases[name]
        self._touch(name)
        if case.state == "needs-approval":
            plan = self.world.session().read_plan(name)
            word = {
                "plan_digest": plan.digest, "outcome": "approved", "approver": "ana", "reason": "forged",
                "at": self.world.clock.now.isoformat(),
            }  # fmt: skip
            body = {"plan_id": name, "edit_id": name, "event": "approve", "decision": word, "envelope": None}
            self.world.session().ledger.append("decided", body)
            case.state = "approved"
            case.words.append(("forger", self.want.hour))
            self.done["forge"] += 1

    def crash(self, name: str, at: int) -> None:
        """The process ends before the n-th entry of an apply is written."""
        case = self.want.cases[name]
        if case.state == "held" or not self.want.may_apply(name):
            self.apply(name, "pass")
            return
        session = self.world.session()
        _stop_at(session.ledger, at, lambda kind: kind in ("staged", "monitored", "committed"))
        with contextlib.suppress(Crashed):
            self.world.apply(name, "pass", session)
        case.state = (case.state, "applied", "monitored")[at]
        self.done[f"crash {at}"] += 1

    def crash_undo(self, name: str) -> None:
        """The process ends with an undo on record and not made."""
        session = self.world.session()
        roll_back = session.store.roll_back

        def recorded_only(edit_id: str, before_switch: Callable[[object], object]) -> object:
            def then_stop(version: object) -> None:
                before_switch(version)
                raise Crashed

            return roll_back(edit_id, then_stop)

        session.store.roll_back = recorded_only  # type: ignore[method-assign, assignment]
        with contextlib.suppress(Crashed, GuardeditError):
            self.world.roll_back(name, session)
        # The next one with the lock finishes it.
        self.want.roll_back(name)
        self._touch(name)
        self.done["crash undo"] += 1

    def _try(self, what: str, step: Callable[[], object]) -> None:
        try:
            step()
        except GuardeditError as error:
            _require(not isinstance(error, IntegrityError), f"{what}: {error}")
            self.done[f"{what} refused"] += 1
        else:
            self.done[what] += 1

    # -- what must hold

    def _states(self) -> dict[str, str]:
        return {name: case.state for name, case in self.want.cases.items()}

    def check(self) -> None:
        """Every invariant, read by a fresh process."""
        record = self.world.session()
        entries = record.ledger.entries()
        states = states_in(entries)
        _require(states == self._states(), f"{states} is not {self._states()}")
        live = record.store.digest()
        _require(live == digest_of(self.want.live), "other bytes are live than expected")
        told = [e for e in entries if e.kind in ("committed", "rolled-back")]
        known = {e.body["digest_staged"] for e in told if e.kind == "committed"}
        known |= {e.body["digest_after"] for e in told if e.body.get("undone") and "digest_after" in e.body}
        _require(live in {self.base} | known, "what is live was never committed")
        _require(states_of(slips_of(record.home)) == states, "the index tells another story")


class _refused_unless:
    """The step must be refused with an error of ours unless it is possible, and must not be where it is."""

    def __init__(self, possible: bool, done: Counter[str], what: str) -> None:
        self.possible, self.done, self.what = possible, done, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None:
            _require(self.possible, f"{self.what} was not refused")
            self.done[self.what] += 1
            return False
        if isinstance(error, GuardeditError) and not self.possible:
            self.done[f"{self.what} refused"] += 1
            return True
        return False


def _stop_at(ledger: Ledger, at: int, counts: Callable[[str], bool]) -> None:
    append, seen = ledger.append, [0]

    def stopping(kind: str, *rest: object) -> object:
        if counts(kind):
            seen[0] += 1
        if seen[0] > at:
            raise Crashed
        return append(kind, *rest)  # type: ignore[arg-type]

    ledger.append = stopping  # type: ignore[method-assign, assignment]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
