"""One home as it is on record: ledger, versions, plans and where they stand. No model, and no torch.

What only reads the record or puts words on it (status, show, approve, review, keys) works on this, and is quick.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from guardedit.audit.ledger import Entry, Ledger
from guardedit.audit.versions import VersionStore
from guardedit.config import Settings, current_user, key_passphrase
from guardedit.errors import IntegrityError, NotFoundError
from guardedit.gate.states import State, replay, standing
from guardedit.records import Decision, Plan, parse_record

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


def _silent(_: str, __: float) -> None:
    """No progress display."""


def _nobody(_: str) -> str | None:
    """Nobody is there to be asked for a passphrase: it is in the environment, or not known."""
    return key_passphrase()


class History:
    """The record of one home. Making one reads nothing."""

    def __init__(self, settings: Settings | None = None, progress: Progress | None = None) -> None:
        self.settings = settings or Settings()
        self.progress: Progress = progress or _silent
        self.home = self.settings.home
        self.ledger = Ledger(self.home / "ledger.sqlite")
        self.store = VersionStore(self.home)
        self.ask: Callable[[str], str | None] = _nobody
        """What asks for the passphrase of an encrypted key, by the key's name."""

    def refresh(self) -> None:
        """Follow what is live on disk now; without a model there is nothing to follow."""

    # -- plans and their history

    def plan_folder(self, plan_id: str) -> Path:
        """Where a plan lies; raises NotFoundError for a name that cannot be one."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", plan_id):
            raise NotFoundError(f"{plan_id[:80]!r} is not a plan's name; `guardedit status` lists them")
        return self.home / "plans" / plan_id

    def plan_entry(self, plan_id: str) -> Entry:
        """The ledger's entry of a plan; raises NotFoundError."""
        self.plan_folder(plan_id)
        found = self.ledger.entries("planned", plan_id=plan_id)
        if not found:
            known = [e.body["plan_id"] for e in self.ledger.entries("planned")]
            hint = (
                f"there are {', '.join(known[-5:])}"
                if known
                else "there is none yet; make one with `guardedit plan`"
            )
            raise NotFoundError(f"no plan {plan_id!r} in {self.home}; {hint}")
        return found[-1]

    def read_plan(self, plan_id: str) -> Plan:
        """A plan, its bytes compared with the digest in the ledger."""
        expected = str(self.plan_entry(plan_id).body["plan_digest"])
        path = self.plan_folder(plan_id) / "plan.json"
        return parse_record(Plan, self._bytes(path), expected=expected, what=f"plan {plan_id}")

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path.name} of {path.parent.name} is gone: {error.strerror}") from error

    def history(self, plan_id: str) -> tuple[Entry, ...]:
        """Everything on record about one plan, in order."""
        return self.ledger.entries(plan_id=plan_id)

    def state(self, plan_id: str) -> State:
        """Where the plan stands: its recorded events, replayed through the transition table."""
        return replay(e.body["event"] for e in self.history(plan_id) if e.body.get("event"))

    def states(self) -> dict[str, State]:
        """Where every plan stands, in the order in which they were made; the ledger is read once."""
        return states_in(self.ledger.entries())

    def decision(self, plan_id: str) -> Decision | None:
        """The last word on a plan, or None; the policy's own stands in the plan's first entry."""
        words = [e.body["decision"] for e in self.history(plan_id) if e.body.get("decision")]
        return Decision.model_validate(words[-1]) if words else None

    # -- facts on record

    def now(self) -> datetime:
        """Wall time, UTC: information, never order."""
        return datetime.now(UTC)

    @property
    def user(self) -> str:
        """Who is at the keyboard."""
        return current_user()


def states_in(entries: Iterable[Entry]) -> dict[str, State]:
    """Where every plan stands after these entries, in the order in which the plans were made."""
    return standing((entry.body.get("plan_id"), entry.body.get("event")) for entry in entries)
