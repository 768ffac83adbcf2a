"""JSON Schemas of the report files, for programs that read them without guardedit."""

from __future__ import annotations

import json
from typing import Any

from guardedit.audit.period import PeriodAudit
from guardedit.records import AuditReport, Record

KINDS: dict[str, type[Record]] = {"report": AuditReport, "audit": PeriodAudit}
"""Name of a report file without its ending -> its record."""
_TITLES = {"report": "guardedit: audit report of one edit", "audit": "guardedit: audit report over a period"}


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of "report" (report.json) or "audit" (audit.json), in JSON Schema 2020-12."""
    made = KINDS[kind].model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": _TITLES[kind],
    }


def schema_text(kind: str) -> str:
    """The schema as it is published."""
    return json.dumps(schema_of(kind), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
