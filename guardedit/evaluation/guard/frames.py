"""Rows of the guard benchmark as a table: flat columns, one parquet file, read back the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from guardedit.errors import BadRequestError
from guardedit.records import digest_of_bytes

PRED, OUT = "pred.", "out."
_PLAIN = (
    "editor", "stratum", "case_id", "subject", "relation", "target_new", "target_true", "error", "p_new", "seconds",
    "seconds_solving", "far_text",
)  # fmt: skip


_NAMED = ("editor", "stratum", "case_id")
"""What a row is about."""


def to_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line a row; a score or an outcome is a column `pred.<name>` or `out.<group>/<metric>`. Sorted by what a row
    is about, so that the order of measuring does not show."""
    flat = [
        {name: row.get(name) for name in _PLAIN}
        | {f"{PRED}{name}": value for name, value in row.get("predictors", {}).items()}
        | {f"{OUT}{name}": value for name, value in row.get("outcomes", {}).items()}
        for row in rows
    ]
    if not flat:
        raise BadRequestError("no edit has been tried yet: there is nothing to put into a table")
    frame = pd.DataFrame(flat)
    numbers = [name for name in frame.columns if name.startswith((PRED, OUT))]
    frame[numbers] = frame[numbers].astype("float64")
    return _in_order(frame)


def joined(earlier: pd.DataFrame, later: pd.DataFrame) -> pd.DataFrame:
    """The rows of two tables; of an edit that is in both, the later one's.

    Raises BadRequestError where damage far from the edit was not measured on the same text.
    """
    both = pd.concat([earlier, later], ignore_index=True).drop_duplicates(list(_NAMED), keep="last")
    return _in_order(same_far_text(both))


def same_far_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The table, where rows that say which far text they were measured on name the same one. Raises BadRequestError."""
    named = frame.get("far_text", pd.Series(dtype=object)).dropna()
    if named.nunique() > 1:
        counts = ", ".join(f"{text[:19]}… {n} rows" for text, n in named.value_counts().items())
        raise BadRequestError(
            f"damage far from the edit was measured on different text ({counts}), so these rows cannot stand in one "
            "table; measure them with the same --far files"
        )
    return frame


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = [name for name in frame.columns if name.startswith((PRED, OUT))]
    return frame[[*_PLAIN, *sorted(numbers)]].sort_values(list(_NAMED), ignore_index=True)


def write_rows(frame: pd.DataFrame, path: Path) -> None:
    """Write the table, compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, compression="zstd", index=False)


def read_rows(path: Path) -> pd.DataFrame:
    """Read a table. Raises BadRequestError where there is none, or it is no table of edits."""
    if not path.is_file():
        raise BadRequestError(
            f"there is no table {path}; `guardedit evaluate guard --facts FILE --out FOLDER` writes one into FOLDER"
        )
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BadRequestError(f"{path} is no parquet table: {error}") from error
    missing = [name for name in _NAMED if name not in frame.columns]
    if missing:
        raise BadRequestError(f"{path} is no table of the guard benchmark: it has no column {missing[0]!r}")
    return frame


def rows_digest(frame: pd.DataFrame) -> str:
    """Of what was measured; seconds are left out, and scores that none of these rows has: later rows may bring them."""
    unknown = [name for name in frame.columns if name.startswith((PRED, OUT)) and frame[name].isna().all()]
    kept = frame.drop(columns=[*unknown, *(name for name in frame.columns if name.startswith("seconds"))])
    return digest_of_bytes(kept.to_csv(index=False, float_format="%.9g").encode())


def measured(frame: pd.DataFrame, editor: str, strata: Iterable[str]) -> pd.DataFrame:
    """The edits of one editor in some strata that could be solved and measured."""
    chosen = frame[(frame["editor"] == editor) & frame["stratum"].isin(list(strata)) & frame["error"].isna()]
    return chosen.reset_index(drop=True)
