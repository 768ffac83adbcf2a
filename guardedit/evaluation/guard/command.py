"""The benchmark as a job: which edits, by which editors, resumable, into one table."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from guardedit.editors import EDITORS
from guardedit.errors import BadRequestError
from guardedit.evaluation.guard.frames import same_far_text, to_frame, write_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench, Progress, run_rows
from guardedit.evaluation.guard.strata import KNOWN, STRATA, chosen_edits
from guardedit.evaluation.guard.together import Together, run_together
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.pipeline.workspace import Workspace

TABLE = "guard_rows.parquet"
VALUES = "values"


@dataclass(frozen=True)
class GuardJob:
    """What to try."""

    facts: Path
    """CounterFact, in any form that names no neighbours of its own."""
    out: Path
    """Folder of the rows, the deltas and the table."""
    editors: Sequence[str] = ("rome",)
    strata: Sequence[str] = STRATA
    limit: int = 100
    """Edits a stratum."""
    split: str | None = "train"
    seed: int = 0
    hparams: Mapping[str, Any] | None = None
    """Settings over the kit's own."""
    far: Mapping[str, Path] | None = None
    """Further far text by domain: .txt, or .jsonl(.xz) with a field "text"."""
    together: Sequence[Protocol] = ()
    """Batches and sequences of the known facts, in place of single edits."""


def evaluate_guard(workspace: Workspace, job: GuardJob, progress: Progress | None = None) -> pd.DataFrame:
    """Try every edit that is not in the folder yet, and write the table of all that are.

    Raises BadRequestError for an unknown editor or stratum or a file that cannot be read, StaleError where the folder
    holds rows of another model, kit or seed.
    """
    _check(job)
    case_set = read_cases(job.facts, job.split)
    pool, far = Neighbours.of(case_set.cases), far_texts(job.far or {})
    # Which facts the model knows takes minutes to ask, so it is asked once for all editors.
    strata = (KNOWN,) if job.together else job.strata
    chosen = {s: list(chosen_edits(workspace.handle, case_set, s, job.limit, job.seed)) for s in strata}
    for editor in job.editors:
        bench = Bench(
            workspace=workspace,
            editor=editor,
            pool=pool,
            seed=job.seed,
            more_far=far,
            deltas=job.out / f"{editor}-deltas",
            hparams=job.hparams or {},
            values=job.out / VALUES,
        )
        if job.together:
            for protocol in job.together:
                run_together(bench, chosen[KNOWN], Together(editor, protocol), job.out, progress)
            continue
        for stratum, edits in chosen.items():
            rows = RowFile(job.out / f"{editor}-{stratum}.jsonl", bench.header())
            run_rows(bench, edits, rows, progress)
    frame = gathered(job.out)
    write_rows(frame, job.out / TABLE)
    return frame


def gathered(folder: Path) -> pd.DataFrame:
    """The table of every row in a folder. Raises BadRequestError where they were not measured on the same far text."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows += [row | {"far_text": lines[0].get("far")} for row in lines[1:]]
    return same_far_text(to_frame(rows))


def far_texts(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Texts by domain. Raises BadRequestError where a file has none."""
    return {name: _texts(path) for name, path in files.items()}


def _texts(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        if ".jsonl" not in path.suffixes:
            return [text]
        found = [str(json.loads(line)["text"]) for line in text.split("\n") if line.strip()]
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise BadRequestError(f"{path} cannot be read as far text: {error!r}; give .txt or .jsonl") from error
    # Spread over the file, as neighbouring records are alike.
    return found[:: max(1, len(found) // 40)][:40]


def _check(job: GuardJob) -> None:
    for name, known in ((job.editors, EDITORS), (job.strata, STRATA)):
        unknown = [one for one in name if one not in known]
        if unknown:
            raise BadRequestError(f"{unknown[0]!r} is unknown; choose from {', '.join(known)}")
    for editor in job.editors:
        for protocol in job.together:
            Together(editor, protocol)
    if job.together and KNOWN not in job.strata:
        raise BadRequestError(
            "batches and sequences are made of known facts: leave --stratum out, or name known"
        )
    if job.limit < 1:
        raise BadRequestError(f"limit is {job.limit}; at least one edit is tried")
