"""What is live and where every plan stands, at a glance. Standard library only, so that `status` and `log` are quick.

The ledger's whole chain is checked, unless its file is the one that was checked before (`audit.index`). Of the
versions, CURRENT, the live version's record and the base's are compared with their digests; `verify`, and whatever
changes something, follows the chain down to the base and hashes the bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guardedit.audit.index import Slip, identity, read_index, write_index
from guardedit.errors import IntegrityError
from guardedit.gate.states import State, standing


def slips_of(home: Path) -> tuple[Slip, ...]:
    """What is shown of every entry, oldest first. IntegrityError where the chain is not as it was recorded."""
    path = home / "ledger.sqlite"
    known = read_index(path)
    if known is not None:
        return known
    if not path.exists() and not path.with_suffix(".head").exists():
        return ()
    from guardedit.audit.ledger import Ledger

    checked = identity(path)
    return write_index(path, Ledger(path).entries(), checked)


def overview(home: Path, model: str) -> dict[str, Any]:
    """Live version, plans with their states, and open reviews; `model` is named where the home guards none yet."""
    slips = slips_of(home)
    states = states_of(slips)
    live = _live(home / "model")
    return {
        "home": str(home),
        "model": live.get("name", model),
        "digest": live.get("digest"),
        "base_digest": live.get("base_digest"),
        "version": live.get("version"),
        "plans": [_line(slip, states) for slip in slips if slip.kind == "planned"],
        "reviews": reviews_of(slips, _closed(home, slips), datetime.now(UTC)),
    }


def _closed(home: Path, slips: Iterable[Slip]) -> Collection[int]:
    """Emergency words whose review counts: its signature is checked, which takes longer, so only where there is one."""
    if not any(slip.kind == "reviewed" for slip in slips):
        return ()
    from guardedit.audit.ledger import Ledger
    from guardedit.gate.replaying import reviews
    from guardedit.gate.trust import Trust

    entries = Ledger(home / "ledger.sqlite").entries()
    return reviews(entries, Trust(entries))


def states_of(slips: Iterable[Slip]) -> dict[str, State]:
    """Where every plan stands, in the order in which they were made."""
    return standing((slip.plan_id, slip.event) for slip in slips)


def reviews_of(slips: Iterable[Slip], done: Collection[int], now: datetime) -> list[dict[str, Any]]:
    """Emergency words that nobody has looked at again (`done`: numbers of those that somebody has), oldest first."""
    return [
        {"plan_id": slip.plan_id, "seq": slip.seq, **slip.more, "overdue": slip.more["due"] < now.isoformat()}
        for slip in slips
        if slip.kind == "decided" and slip.more.get("ticket") and slip.seq not in done
    ]


def _line(slip: Slip, states: dict[str, State]) -> dict[str, Any]:
    plan_id = str(slip.plan_id)
    return {"plan_id": plan_id, "state": states[plan_id], "at": slip.at, **slip.more}


def _live(model: Path) -> dict[str, str]:
    """Name, digests and version; nothing where no model is guarded yet."""
    if not (model / "base.json").exists() and not (model / "CURRENT").exists():
        return {}
    try:
        base = json.loads((model / "base.json").read_bytes())
        pointer = json.loads((model / "CURRENT").read_bytes())
        named = {"name": base["name"], "base_digest": base["digest"], "version": pointer["version"]}
        if _digest({**base, "seal": ""}) != base["seal"]:
            raise IntegrityError("base.json was changed: it does not hash to its own seal")
        record = {**base, "folder": "", "seal": ""}
        if pointer["version"] != "base":
            record = _version(model, pointer["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the record of what is live cannot be read: {error}") from error
    if _digest(record) != pointer["record"]:
        raise IntegrityError(f"version {pointer['version']} is not the one that CURRENT names")
    return {**named, "digest": record["digest"]}


def _version(model: Path, name: str) -> dict[str, Any]:
    if not re.fullmatch(r"\d{6}-[a-z0-9][a-z0-9._-]{0,79}", name):
        raise IntegrityError(f"{name!r} is not the name of a version")
    found: dict[str, Any] = json.loads((model / "versions" / name / "version.json").read_bytes())
    return found


def _digest(plain: dict[str, Any]) -> str:
    """As `records.digest_of`, whose module takes longer to import than all this takes to run."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
