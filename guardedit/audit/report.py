"""One edit's record as three files: report.json (the record), report.md (diffable), report.html (for people)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from guardedit.audit import acting, after, before, closing, story, supports
from guardedit.audit.files import make_folder, write_atomic
from guardedit.audit.sheet import Bar, Cell, Code, Link, Quote, Sheet
from guardedit.audit.words import GLOSSARY, Sign, visible, when
from guardedit.errors import GuardeditError
from guardedit.records import AuditReport, Record, digest_of_bytes, parse_record

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

SOURCE = "report.json"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")


@dataclass(frozen=True)
class RenderedReport:
    """Where the three files lie."""

    json: Path
    md: Path
    html: Path


@dataclass(frozen=True)
class IndexEntry:
    """One line of the list of reports."""

    edit_id: str
    title: str
    sign: Sign
    created: str
    href: str


def sheet_of(audit: AuditReport) -> Sheet:
    """Everything the report says, in order."""
    sections = (
        before.fact(audit),
        *acting.sections(audit),
        before.disturbance(audit),
        before.limits(audit),
        *after.limits(audit),
        *after.drift(audit),
        closing.versions(audit),
        closing.unmeasured(audit),
        closing.people(audit),
        closing.provenance(audit),
    )
    return Sheet(
        kicker=(
            "Audit report of one edit",
            f"model {visible(audit.plan.model_name)}",
            f"editor {visible(audit.plan.editor)}",
            when(audit.created),
            visible(audit.edit_id),
        ),
        story=story.tell(audit),
        sections=(*sections, supports.of_an_edit({s.anchor: s.title for s in sections})),
    )


def render(audit: AuditReport, out_dir: Path) -> RenderedReport:
    """Write the three files into `out_dir`; the same record gives the same bytes.

    Raises StorageError when the folder cannot be written.
    """
    record = record_json(audit)
    sheet = sheet_of(audit)
    digest = digest_of_bytes(record)
    texts = {"json": record, "md": markdown(sheet, digest).encode(), "html": html(sheet, digest).encode()}
    paths = {kind: out_dir / f"report.{kind}" for kind in texts}
    for kind, data in texts.items():
        _write(paths[kind], data)
    return RenderedReport(**paths)


def record_json(audit: AuditReport) -> bytes:
    """The record, sealed, as JSON with sorted keys, readable in a diff; `AuditReport.model_validate_json` reads it."""
    return pretty(audit.sealed())


def pretty(record: Record) -> bytes:
    """The form in which records stand in report files: sorted keys, two blanks a level, one line break at the end."""
    plain = record.model_dump(mode="json")
    return (json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def markdown(sheet: Sheet, digest: str, source: str = SOURCE) -> str:
    """The report as Markdown: one row a line."""
    template = environment(html=False).get_template("report.md.j2")
    text: str = template.render(sheet=sheet, digest=digest, source=source, glossary=GLOSSARY)
    return text


def html(sheet: Sheet, digest: str, source: str = SOURCE) -> str:
    """The report as one self-contained page: no scripts, no other files."""
    from markupsafe import Markup

    from guardedit.audit.plots import draw

    # `draw` returns well-formed SVG that it serialised itself, with all text escaped.
    pictures = {p.name: Markup(draw(p)) for p in sheet.pictures}
    template = environment(html=True).get_template("report.html.j2")
    text: str = template.render(
        sheet=sheet, digest=digest, source=source, pictures=pictures, glossary=GLOSSARY
    )
    return text


def index_entry(audit: AuditReport, href: str) -> IndexEntry:
    """A report's line in the list; `href` is relative to the list's folder."""
    title = f"{story.title_of(audit)} ({visible(audit.plan.editor)})"
    return IndexEntry(visible(audit.edit_id), title, story.sign_of(audit), audit.created, href)


def find_reports(folder: Path) -> list[IndexEntry]:
    """The reports below a folder, newest first. One that cannot be read is listed as such, never left out."""
    found = []
    for path in sorted(folder.glob("*/report.json")):
        href = f"{path.parent.name}/report.html"
        try:
            audit = parse_record(AuditReport, path.read_bytes(), expected=None, what=str(path.name))
        except (GuardeditError, OSError):
            found.append(
                IndexEntry(path.parent.name, path.parent.name, Sign("✗", "Cannot be read", "bad"), "", href)
            )
        else:
            found.append(index_entry(audit, href))
    return sorted(found, key=lambda e: (e.created, e.edit_id), reverse=True)


def render_index(reports: Sequence[IndexEntry], out_dir: Path) -> Path:
    """Write index.html: one line an edit, in the order given."""
    template = environment(html=True).get_template("index.html.j2")
    path = out_dir / "index.html"
    _write(path, template.render(reports=reports).encode())
    return path


@lru_cache(maxsize=2)
def environment(*, html: bool) -> Environment:
    """The templates, with the filters they use, compiled once; HTML escapes by default."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("guardedit.audit", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        {
            "md": markdown_text,
            "cell": markdown_cell,
            "when": when,
            "kind": _kind,
            "safe_href": _safe_href,
            "oneline": _one_line,
            "breakable": _breakable,
        }
    )
    return made


def _kind(cell: Cell) -> str:
    return type(cell).__name__


def markdown_text(text: Any) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).splitlines())) if text else ""


def markdown_cell(cell: Cell) -> str:
    """A table's cell as Markdown."""
    if isinstance(cell, Sign):
        return f"{cell.icon} {markdown_text(cell.word)}"
    if isinstance(cell, Bar):
        return markdown_text(cell.text)
    if isinstance(cell, Code):
        return "`" + cell.text.replace("`", "'").replace("|", "¦") + "`"
    if isinstance(cell, Link):
        return markdown_text(cell.text)
    if isinstance(cell, Quote):
        return f"{markdown_text(cell.before)}**{markdown_text(cell.marked)}**"
    return markdown_text(cell)


def _write(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    write_atomic(path, data)


def _safe_href(href: str) -> str:
    """A path relative to the list, never a scheme of its own."""
    return "./" + quote(href.lstrip("/"), safe="/")


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _breakable(text: str) -> Markup:
    """A name that may be broken after its separators; copied out, it is the name alone."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_./])", r"\1<wbr>", str(escape(text))))
