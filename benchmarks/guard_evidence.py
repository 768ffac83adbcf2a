"""docs/evidence.md: what the guard's scores say of damage, from the committed table of tried edits.

    python -m benchmarks.guard_evidence table OUT --to docs/data/guard_rows.parquet     (rows of `evaluate guard`;
                                                                            earlier rows of other edits stay)
    python -m benchmarks.guard_evidence write docs/data/guard_rows.parquet --to docs/evidence.md

`write` puts figures between the page's markers and draws docs/images/guard_*.svg; the words around them are written by
hand and are to be read again after it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from benchmarks.drifted_latents import section_drifted
from benchmarks.guard_adversarial import section_adversarial
from benchmarks.guard_fresh import section_fresh
from benchmarks.guard_levels import section_levels
from benchmarks.guard_sections import SECTIONS, SEED, editors_of, section_controls
from benchmarks.guard_together import section_together
from benchmarks.monitor_findings import section_monitor
from benchmarks.namesakes import section_namesakes
from benchmarks.near_rehearsal import section_rehearsal
from benchmarks.outcome_noise import section_noise
from benchmarks.ripples import section_ripples
from benchmarks.subject_rehearsal import section_subject
from guardedit.drift.null import load_bank
from guardedit.evaluation.guard.command import gathered
from guardedit.evaluation.guard.features import MEANT
from guardedit.evaluation.guard.findings import avoided, combined_risk
from guardedit.evaluation.guard.fitting import OUTCOMES, cross_validated, log_damage, natural_edits
from guardedit.evaluation.guard.frames import joined, read_rows, write_rows
from guardedit.pipeline.kit import DRIFT_BANK, kit_folder
from guardedit.records import Scope


def draw(frame: pd.DataFrame, folder: Path) -> None:
    """Damage avoided against the share stopped, and expected against measured, by scope."""
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "guardedit", "font.size": 9})
    edits = natural_edits(frame, editors_of(frame)[0])
    expected: dict[Scope, np.ndarray] = {
        s: cross_validated(edits, s, MEANT[s], SEED).log_expected for s in OUTCOMES
    }
    risk = combined_risk(expected)
    fig, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
    shares = np.linspace(0, 1, len(edits) + 1)
    for (scope, log), upper, lower in zip(expected.items(), *axes, strict=True):
        measured_log = log_damage(edits, scope)
        damage = np.exp(measured_log)
        for curve, label in ((avoided(risk, damage), "combined"), (avoided(damage, damage), "oracle")):
            upper.plot(shares, curve, label=label)
        upper.plot([0, 1], [0, 1], ":", color="grey", label="chance")
        upper.set(title=scope, xlabel="share of edits stopped", ylabel="damage avoided")
        lower.loglog(np.exp(log), damage, ".", alpha=0.5)
        ends = [
            float(np.exp(min(log.min(), measured_log.min()))),
            float(np.exp(max(log.max(), measured_log.max()))),
        ]
        lower.plot(ends, ends, ":", color="grey")
        lower.set(xlabel="expected, nats", ylabel="measured, nats")
    axes[0][0].legend()
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / "guard_rome.svg", metadata={"Date": None})


def fill(text: str, name: str, body: str) -> str:
    """The page's text with `body` between a section's markers."""
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not mark.search(text):
        raise SystemExit(f"the page has no markers for {name!r}: <!-- {name} --> … <!-- end -->")
    return mark.sub(lambda m: f"{m[1]}{body}{m[2]}", text)


def write(
    frame: pd.DataFrame,
    page: Path,
    controls: pd.DataFrame,
    monitor: pd.DataFrame,
    near: pd.DataFrame,
    namesakes: pd.DataFrame,
    ripples: pd.DataFrame,
    noise: pd.DataFrame,
    sentences: pd.DataFrame,
) -> None:
    """Put every section between its markers."""
    text = page.read_text("utf-8")
    bank = load_bank(kit_folder("smollm2-135m") / DRIFT_BANK)
    sections = {
        **SECTIONS,
        "controls": lambda rows: section_controls(rows, controls),
        "together": section_together,
        "levels": section_levels,
        "fresh": lambda rows: section_fresh(rows, near["case_id"].tolist()),
        "rehearsal": lambda rows: section_rehearsal(near, rows),
        "namesakes": lambda rows: section_namesakes(namesakes, rows),
        "monitor": lambda rows: section_monitor(monitor, bank, rows),
        "drifted": lambda rows: section_drifted(monitor, rows),
        "adversarial": section_adversarial,
        "ripples": lambda rows: section_ripples(ripples),
        "noise": lambda rows: section_noise(rows, noise, near),
        "sentences": lambda rows: section_subject(rows, sentences),
    }
    for name, section in sections.items():
        text = fill(text, name, section(frame))
    page.write_text(text, "utf-8")
    draw(frame, page.parent / "images")


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("table", "write"):
        step = steps.add_parser(name)
        step.add_argument("source", type=Path)
        step.add_argument("--to", type=Path, required=True)
        step.add_argument("--controls", type=Path, default=Path("docs/data/guard_controls.parquet"))
        step.add_argument("--monitor", type=Path, default=Path("docs/data/monitor_power.parquet"))
        step.add_argument("--near", type=Path, default=Path("docs/data/near_rehearsal.parquet"))
        step.add_argument("--namesakes", type=Path, default=Path("docs/data/namesakes.parquet"))
        step.add_argument("--ripples", type=Path, default=Path("docs/data/ripples.parquet"))
        step.add_argument("--noise", type=Path, default=Path("docs/data/outcome_noise.parquet"))
        step.add_argument("--sentences", type=Path, default=Path("docs/data/subject_rehearsal.parquet"))
    args: Any = parser.parse_args()
    if args.step == "table":
        found = gathered(args.source)
        write_rows(joined(read_rows(args.to), found) if args.to.is_file() else found, args.to)
    else:
        paths = (args.monitor, args.near, args.namesakes, args.ripples, args.noise, args.sentences)
        kept = (pd.read_parquet(path) for path in paths)
        write(read_rows(args.source), args.to, read_rows(args.controls), *kept)


if __name__ == "__main__":
    main()
