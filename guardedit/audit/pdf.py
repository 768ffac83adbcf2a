"""A report's page as a PDF, by WeasyPrint (extra `pdf`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardedit.audit.files import make_folder, write_atomic
from guardedit.errors import GuardeditError

_EXTRA = "a PDF needs WeasyPrint: pip install 'guardedit[pdf]'"
_PANGO = (
    "WeasyPrint (extra guardedit[pdf]) is there, but not the Pango library that it draws text with; on Debian or Ubuntu: "
    "apt-get install libpango-1.0-0 libpangoft2-1.0-0"
)


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
    text = page.read_text(encoding="utf-8")
    made: bytes = printer.HTML(string=text, url_fetcher=_refuse).write_pdf(pdf_variant="pdf/ua-1")
    make_folder(target.parent)
    write_atomic(target, made)
    return target


def _refuse(url: str, *_: Any, **__: Any) -> Any:
    """A report holds all it needs; whatever names another place is not fetched."""
    raise ValueError(f"a report loads nothing, and not {url[:80]}")
