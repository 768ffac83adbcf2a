"""The report over a period as files: audit.json (the record), audit.md, audit.html and model_card.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guardedit.audit.card import model_card
from guardedit.audit.files import make_folder, write_atomic
from guardedit.audit.period import PeriodAudit
from guardedit.audit.period_sheet import sheet_of
from guardedit.audit.report import html, markdown
from guardedit.records import canonical

SOURCE = "audit.json"


@dataclass(frozen=True)
class RenderedAudit:
    """Where the files lie."""

    json: Path
    md: Path
    html: Path
    card: Path


def render(audit: PeriodAudit, out_dir: Path) -> RenderedAudit:
    """Write the four files. All but audit.json name the evidence's digest and nothing of the run that drew it, so equal
    evidence gives equal bytes.

    Raises StorageError when the folder cannot be written.
    """
    sheet, digest = sheet_of(audit), audit.evidence_digest
    made = RenderedAudit(*(out_dir / name for name in (SOURCE, "audit.md", "audit.html", "model_card.md")))
    source = f"the evidence in {SOURCE}"
    make_folder(out_dir)
    write_atomic(made.json, canonical(audit))
    write_atomic(made.md, markdown(sheet, digest, source).encode())
    write_atomic(made.html, html(sheet, digest, source).encode())
    write_atomic(made.card, model_card(audit.evidence, digest).encode())
    return made
