"""Every editor on the same hundred facts: alone, in batches of 10 and 100, in a sequence of 100 (docs/editors.md).

    python -m benchmarks.editors_table run   --data ../shared/data --out OUT [--shape single ...] [--row rome ...]
    python -m benchmarks.editors_table run   --data ../shared/data --out OUT --fluency
    python -m benchmarks.editors_table write --out OUT --to docs/data/editors_100.json
    python -m benchmarks.editors_table table docs/data/editors_100.json

The protocol is docs/editors.md's and was fixed before the first run. Resumable case by case: what lies in OUT is not
computed again, and values that several editors share are found once. `write` keeps figures only, no text of the data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.own_words import by_case, figures, nearer
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.datasets import Asking, method
from guardedit.evaluation.extras import filled
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.readers import choose, read_cases, with_neighbours
from guardedit.evaluation.run import Job, Selection, evaluate, select
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import canonical, digest_of

SEED, N, NEIGHBOURS, FLUENT = 0, 100, 10, 20
EXTRAS = ("distractors", "subject", "far")
SHAPES = {
    "single": Protocol(),
    "batch of 10": Protocol(10),
    "batch of 100": Protocol(100),
    "sequence of 100": Protocol(1, 100),
}
FAR_TOKENS = {"single": 256, "batch of 10": 512, "batch of 100": 2_048, "sequence of 100": 2_048}
"""Of control text, each time that it is read: a hundred times for single edits, once for a sequence."""
JOINT = ("batch of 10", "batch of 100")
VALUES = (
    "contexts", "steps", "learning_rate", "stop_loss", "clamp_norm_factor", "warm_contexts", "reword", "keep_openings",
    "keep_turns", "keep_weight", "keep_contrast", "hold_loss", "margin",
)  # fmt: skip
"""Settings that make guarded values what they are."""


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    editor: str
    shapes: tuple[str, ...] = tuple(SHAPES)
    values_of: str | None = None
    """Another editor whose values this one solves for."""
    named: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = True
    """Whether a sequence keeps its edits on disk."""


ALONE = ("single", "sequence of 100")
EARLY = {"stop_loss": 0.2}
"""A value that is done sooner, chosen on `train` facts for these two (docs/peers.md)."""
ROWS = {
    "emmet": Row("emmet"),
    "rome": Row("rome", ALONE),
    "memit": Row("memit"),
    "alphaedit": Row("alphaedit"),
    "in-context": Row("in-context", ("single",)),
    "guarded": Row("guarded", ALONE),
    "emmet, guarded values": Row("emmet", JOINT, values_of="guarded"),
    "memit, guarded values": Row("memit", JOINT, values_of="guarded"),
    "alphaedit, guarded values": Row("alphaedit", JOINT, values_of="guarded"),
    "emmet, stopped at 0.2": Row("emmet", ("batch of 100",), named=EARLY),
    "memit, stopped at 0.2": Row("memit", ("single", "batch of 100"), named=EARLY),
    "finetune": Row("finetune"),
    "finetune-l": Row("finetune-l"),
    "lora": Row("lora"),
    # Half a gigabyte an edit: its sequence goes through in one run, or begins again.
    "finetune-full": Row("finetune-full", resumable=False),
}
"""The first one to run fills the shelf of values in large batches."""


def cases_of(guard: Guard, data: Path, out: Path) -> Selection:
    """The hundred facts, chosen once and kept in a file outside the tree."""
    path = out / "cases.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        chosen = _chosen(guard.handle, data / "counterfact")
        kept = [json.loads(canonical(case)) for case in chosen.cases]
        path.write_text(json.dumps({"n_seen": chosen.n_seen, "cases": kept}))
    found = json.loads(path.read_text())
    return Selection(tuple(map(EvalCase.model_validate, found["cases"])), found["n_seen"])


def _chosen(handle: ModelHandle, folder: Path) -> Selection:
    """Known facts of the full form whose case is in the `edit` split, then of the short form's `edit` split."""
    short = read_cases(folder / "counterfact_edit_format.jsonl.xz", "edit").cases
    allowed = {case.case_id for case in short}
    full = [
        c for c in read_cases(folder / "counterfact_rome_format_plus.jsonl.xz").cases if c.case_id in allowed
    ]
    first = select(handle, choose(full, SEED), limit=N, known_only=True)
    taken = {case.request.subject for case in full}
    others = [case for case in choose(short, SEED) if case.request.subject not in taken]
    rest = select(handle, others, limit=N - len(first.cases), known_only=True)
    cases = with_neighbours((*first.cases, *rest.cases), NEIGHBOURS, short, SEED)
    return Selection(tuple(_trimmed(case) for case in cases), first.n_seen + rest.n_seen)


def _trimmed(case: EvalCase) -> EvalCase:
    """Without prompts that the table does not report."""
    return case.model_copy(update={"attributes": (), "references": ()})


def state_of(out: Path, name: str, shape: str, extras: Sequence[str]) -> Path:
    """Results of one cell, case by case."""
    kind = "fluency" if "fluency" in extras else "main"
    return out / kind / f"{name} - {shape}.jsonl".replace(", ", "-").replace(" ", "_")


def jobs(guard: Guard, name: str, out: Path) -> Job:
    """The method with its settings: the kit's, and for a row with other values those of their editor."""
    row = ROWS[name]
    named = dict(row.named)
    if row.values_of is not None:
        other = guard.kit.settings(row.values_of)
        named |= {key: getattr(other, key) for key in VALUES if hasattr(other, key)}
    return method(guard, row.editor, SEED, named, out / "values")


def run(
    guard: Guard, chosen: Selection, out: Path, cells: Iterable[tuple[str, str]], extras: Sequence[str]
) -> None:
    """Measure the cells that are not measured yet; their unedited sides are computed once."""
    handle = guard.handle
    cases = filled(handle, chosen.cases[:FLUENT] if "fluency" in extras else chosen.cases, extras)
    whole = {
        shape: Asking(extras=tuple(extras), far_tokens=tokens).whole(handle, extras, SEED)
        for shape, tokens in FAR_TOKENS.items()
    }
    shared: dict[str, Any] = {}
    for name, shape in cells:
        path = state_of(out, name, shape, extras)
        if path.with_suffix(".json").is_file():
            continue
        started = time.process_time()
        job = replace(
            jobs(guard, name, out), dataset="counterfact, edit", extras=tuple(extras), whole=whole[shape],
            protocol=SHAPES[shape], remembered=shared, dataset_digest=digest_of([c.case_id for c in cases]),
        )  # fmt: skip
        state = path if ROWS[name].resumable or SHAPES[shape].sequence == 1 else None
        found = evaluate(handle, Selection(tuple(cases), chosen.n_seen), job, state=state)
        spent = time.process_time() - started
        document = {**found.as_json(), "row": name, "shape": shape}
        if "fluency" in extras:
            document["own_words"] = by_case(handle, cases, path)
            document["metrics"] |= figures(document["own_words"], SEED)
        path.with_suffix(".json").write_text(json.dumps(document))
        print(f"{name}, {shape}: {spent:.0f} CPU s", file=sys.stderr, flush=True)


# -- figures

COLUMNS = {
    "efficacy": "efficacy", "paraphrase": "paraphrase", "neighborhood loss": "neighborhood_loss",
    "distractor neighborhood": "distractor_neighborhood", "same-subject KL": "same_subject_kl_nats",
    "same-subject lost top-1": "same_subject_lost_top1", "far KL": "far_kl_nats",
    "perplexity ratio": "perplexity_ratio",
    "P(new) − P(true)": "efficacy_magnitude", "one hop": "one_hop", "alias": "subject_aliasing",
    "unrelated relation lost": "unrelated_relation_lost_top1", "retention": "retention", "fluency": "fluency",
    "its texts, nats under the unedited model": "own_words_nats",
}  # fmt: skip


FROM_TEXTS = ["fluency", "own_words_nats"]
"""Of the first facts only: texts are slow."""
TEXTS_OF = "rome"
"""Whose texts the others' are held against."""


def write(out: Path, to: Path) -> None:
    """Collect every finished cell: figures with intervals, settings, digests. Cells of earlier runs stay, unless they
    were run again."""
    cells: dict[str, dict[str, Any]] = json.loads(to.read_text()) if to.is_file() else {}
    for path in sorted((out / "main").glob("*.json")) + sorted((out / "fluency").glob("*.json")):
        found = json.loads(path.read_text())
        cell = cells.setdefault(f"{found['row']} / {found['shape']}", {"metrics": {}})
        main = path.parent.name == "main"
        columns = list(COLUMNS.values()) if main else FROM_TEXTS
        names = [*columns, *(f"{name}_base" for name in columns), *(["neighborhood"] if main else [])]
        cell["metrics"] |= {name: found["metrics"][name] for name in names if found["metrics"].get(name)}
        kept = ("n", "failed", "seconds_per_edit", "curve") if main else ("own_words",)
        cell |= {key: found[key] for key in ("row", "shape", "hparams", "model_digest", *kept)}
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")


def table(path: Path) -> str:
    """A table a shape: value and 95 % interval of every column that any row of it has."""
    cells: list[dict[str, Any]] = list(json.loads(path.read_text()).values())
    return "\n".join([*(part for shape in SHAPES if (part := _of_shape(shape, cells))), texts(cells)])


def texts(cells: Sequence[dict[str, Any]]) -> str:
    """Free text about the first facts' subjects under single edits: its entropy, its likelihood under the unedited
    model, and that against ROME's on the same facts."""
    rows = {cell["row"]: cell for cell in cells if "own_words" in cell}
    if TEXTS_OF not in rows:
        return ""
    head = ("method", "fluency", "its texts, nats under the unedited model", "less ROME's, paired")
    lines = [f"**Texts of {FLUENT} facts**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = rows[TEXTS_OF]
    lines.append(_line("*unedited*", [*(first["metrics"].get(f"{name}_base") for name in FROM_TEXTS), None]))
    for name in (name for name in ROWS if name in rows):
        own, metrics = rows[name]["own_words"], rows[name]["metrics"]
        gap = None if name == TEXTS_OF else nearer(own, first["own_words"], SEED)
        found = [*(metrics.get(one) for one in FROM_TEXTS), gap.model_dump() if gap else None]
        lines.append(_line(name, found))
    return "\n".join(lines) + "\n"


def _of_shape(shape: str, cells: Sequence[dict[str, Any]]) -> str:
    rows = {cell["row"]: cell for cell in cells if cell["shape"] == shape and "n" in cell}
    if not rows:
        return ""
    of_all = {n: key for n, key in COLUMNS.items() if key not in FROM_TEXTS}
    shown = [n for n, key in of_all.items() if any(key in cell["metrics"] for cell in rows.values())]
    lines = [f"**{shape.capitalize()}**", "", "| method | " + " | ".join(shown) + " |"]
    lines.append("|" + "---|" * (len(shown) + 1))
    some = next(iter(rows.values()))["metrics"]
    lines.append(_line("*unedited*", [some.get(f"{COLUMNS[name]}_base") for name in shown]))
    for name in ROWS:
        if name in rows:
            lines.append(_line(name, [rows[name]["metrics"].get(COLUMNS[column]) for column in shown]))
    return "\n".join(lines) + "\n"


def _line(name: str, figures: Sequence[dict[str, float] | None]) -> str:
    cells = ["–" if f is None else f"{f['value']:.3g} ({_end(f['low'])}–{_end(f['high'])})" for f in figures]
    return f"| {name} | " + " | ".join(cells) + " |"


def _end(bound: float) -> str:
    return f"{bound:.0f}" if abs(bound) >= 100 else f"{bound:.2g}"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    running.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS))
    running.add_argument("--fluency", action="store_true", help=f"texts of the first {FLUENT} facts instead")
    writing = steps.add_parser("write")
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--to", type=Path, required=True)
    steps.add_parser("table").add_argument("figures", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.figures))
    elif args.step == "write":
        write(args.out, args.to)
    else:
        guard = open_guard(home=args.out / "home")
        chosen = cases_of(guard, args.data, args.out)
        cells = [(r, s) for s in args.shape for r in args.row if s in ROWS[r].shapes]
        run(guard, chosen, args.out, cells, ("fluency",) if args.fluency else EXTRAS)


if __name__ == "__main__":
    main()
