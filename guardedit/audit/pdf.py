"""A report's page as a PDF, by WeasyPrint (extra `pdf`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from guardedit.audit.files import make_folder, write_atomic
from guardedit.errors import GuardeditError

_EXTRA = "a PDF needs WeasyPrint: pip install 'guardedit[pdf]'"
_PANGO = (
    "WeasyPrint (extra guardedit[pdf]) is there, but not the Pango library that it draws text with; on Debian or "
    "Ubuntu: apt-get install libpango-1.0-0 libpangoft2-1.0-0"
)
_PAPER = """
@page {
  size: A4 landscape; margin: 12mm;
  @bottom-right { content: counter(page) " / " counter(pages); font-size: 8pt; }
}
body { font-size: 8.5pt; } h1 { font-size: 20pt; } h2 { font-size: 13pt; }
header, main, footer { max-width: none; padding: 0; } p { max-width: none; }
table { font-size: 7.5pt; } th, td { padding: 2pt 5pt 2pt 0; } th { font-size: 7pt; }
.number, .sign { white-space: normal; } .number { padding-left: 5pt; } code { overflow-wrap: anywhere; }
details { border: 0; } summary { display: none; } .bar { display: block; min-width: 0; } .bar i { display: none; }
svg { width: 165mm; }
"""
"""On paper nothing scrolls and nothing unfolds: wide tables need the long side and may break words."""
_THEME = re.compile(r"--([\w-]+): (#[0-9a-f]{6})")


def load_printer() -> Any:
    """WeasyPrint. GuardeditError names the extra, or the system's library, that is missing."""
    try:
        import weasyprint
    except ImportError as error:
        raise GuardeditError(_EXTRA) from error
    except OSError as error:
        raise GuardeditError(_PANGO) from error
    return weasyprint


def write_pdf(page: Path, target: Path, printer: Any) -> Path:
    """Print a self-contained page as an accessible PDF. StorageError where it cannot be written."""
    text = for_paper(page.read_text(encoding="utf-8"))
    made: bytes = printer.HTML(string=text, url_fetcher=_refuse).write_pdf(pdf_variant="pdf/ua-1")
    make_folder(target.parent)
    write_atomic(target, made)
    return target


def for_paper(text: str) -> str:
    """The page with the colours of paper written out, for a printer does not look them up inside pictures."""
    colours = dict(_THEME.findall(text[text.find("@media print") :]))
    plain = re.sub(r"var\(--([\w-]+)\)", lambda found: colours.get(found[1], found[0]), text)
    return plain.replace("</style>", _PAPER + "</style>", 1)


def _refuse(url: str, *_: Any, **__: Any) -> Any:
    """A report holds all it needs; whatever names another place is not fetched."""
    raise ValueError(f"a report loads nothing, and not {url[:80]}")
