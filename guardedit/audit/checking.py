"""A report file by itself: is it what guardedit wrote? And where do two records differ?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guardedit.audit.period import PeriodAudit
from guardedit.audit.report import pretty
from guardedit.errors import IntegrityError, NotFoundError
from guardedit.records import AuditReport, canonical, digest_of, parse_record

ReportRecord = PeriodAudit | AuditReport
_MISSING = object()


def read_report(path: Path) -> ReportRecord:
    """The record in a report file, whose every byte is as guardedit writes that record.

    NotFoundError where there is no such file; IntegrityError names what cannot be read, or where the form differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    record: ReportRecord
    if _is_period(data, path.name):
        record = parse_record(PeriodAudit, data, expected=None, what=path.name)
    else:
        record = parse_record(AuditReport, data, expected=None, what=path.name)
    _check_form(record, data, path.name)
    return record


def _is_period(data: bytes, name: str) -> bool:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} cannot be read: it is not JSON ({error})") from error
    return isinstance(raw, dict) and "evidence" in raw


def _check_form(record: ReportRecord, data: bytes, name: str) -> None:
    """Two files that say the same are the same bytes: nothing can be written twice, or hidden in white space."""
    written = canonical(record) if isinstance(record, PeriodAudit) else pretty(record)
    if data == written:
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(data, written, strict=False)) if a != b),
        min(len(data), len(written)),
    )
    raise IntegrityError(
        f"{name} is not in the form that guardedit writes, from byte {place + 1}, line {data[:place].count(10) + 1}: "
        f"it has {_around(data, place)}, written would be {_around(written, place)}"
    )


def _around(data: bytes, place: int) -> str:
    return (
        repr(data[max(0, place - 20) : place + 20].decode(errors="replace"))
        if data[place:]
        else "its end there"
    )


def check_digests(record: ReportRecord, name: str) -> tuple[str, ...]:
    """What the record says of itself: its digests and its seal. Returns what was compared.

    IntegrityError names the digest that does not fit, or says that there is no seal.
    """
    checked = _check_period(record, name) if isinstance(record, PeriodAudit) else _check_edit(record, name)
    if record.seal is None:
        raise IntegrityError(
            f"seal: {name} carries none, as reports did before guardedit sealed them; write it again with "
            "`guardedit report`, or check it with its --home"
        )
    if record.sealed().seal != record.seal:
        part = "envelope: it was changed" if isinstance(record, PeriodAudit) else "seal: a field was changed"
        raise IntegrityError(f"{part}; {name} hashes to {record.sealed().seal}, its seal is {record.seal}")
    return (*checked, "seal")


def _check_period(record: PeriodAudit, name: str) -> tuple[str, ...]:
    found = digest_of(record.evidence)
    if found != record.evidence_digest:
        raise IntegrityError(
            f"evidence: {name} was changed; it hashes to {found}, evidence_digest is {record.evidence_digest}"
        )
    return ("evidence_digest",)


def _check_edit(record: AuditReport, name: str) -> tuple[str, ...]:
    _equal("plan", record.plan.digest, record.plan_digest, f"plan_digest in {name}")
    if record.decision is not None and record.decision.drift_digest is not None and record.drift is not None:
        _equal("drift", digest_of(record.drift), record.decision.drift_digest, "decision.drift_digest")
    return ("plan_digest",)


def _equal(what: str, found: str, named: str, where: str) -> None:
    if found != named:
        raise IntegrityError(f"{what}: it was changed; it hashes to {found}, {where} is {named}")


def require_same(found: Any, expected: Any, name: str, ledger: str) -> None:
    """IntegrityError that names the first field in which a report differs from what its ledger gives."""
    different = difference(found, expected)
    if different is not None:
        path, has, gives = different
        raise IntegrityError(f"{path}: {name} says {_shown(has)}, {ledger} gives {_shown(gives)}")


def difference(found: Any, expected: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Where two plain values differ first: path, one, other; None where they are the same."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [
            (f"{path}.{key}".lstrip("."), found.get(key, _MISSING), expected.get(key, _MISSING))
            for key in sorted(found.keys() | expected.keys())
        ]
    elif isinstance(found, list) and isinstance(expected, list):
        size = max(len(found), len(expected))
        one, other = ([*x, *[_MISSING] * (size - len(x))] for x in (found, expected))
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        same = type(found) is type(expected) and found == expected
        return None if same else (path or "the record", found, expected)
    return next((d for where, a, b in pairs if (d := difference(a, b, where))), None)


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 120 else text[:119] + "…"
