"""How long `guardedit sync` takes to tell an empty MLflow about many committed edits.

python benchmarks/sync_many.py --edits 1000

The home is written by hand: a tiny version store, one plan, one delta and one monitoring an edit, with numbers that
differ, so that no picture is drawn once for all. Reports are rendered on the way, as `sync` does. MLflow's empty
database is made before the clock starts; its first import is on the clock. `--folder` names where all of it lies (a
memory file system leaves the disk out of the figure), for as long as the command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from guardedit.audit.tracking import prepare
from guardedit.config import Settings
from guardedit.pipeline.reporting import sync
from guardedit.pipeline.workspace import Workspace


def write_home(folder: Path, n_edits: int) -> Workspace:
    """A ledger of so many committed edits; every score differs from edit to edit."""
    import builders
    from audit_helpers import Story
    from stores import NAMES

    story = Story(folder)
    plain = builders.eiffel_committed().plan
    for number in range(n_edits):
        plan_id = f"{number + 1:04d}-edit"
        scores = tuple(
            s.model_copy(update={"value": s.value * (1 + number / n_edits)}) if s.value is not None else s
            for s in plain.risk.scores
        )
        story.plan(plan_id, "auto-approved", risk=plain.risk.model_copy(update={"scores": scores}))
        (story.home / "plans" / plan_id / "delta.safetensors").write_bytes(number.to_bytes(8, "big") * 4096)
        story.tell("staged", plan_id, event="stage")
        story.tell("committed", plan_id, event="commit", **_monitored(number / n_edits))
    story.tiny.apply("0001-edit", NAMES[1])
    settings = Settings(
        model="tiny", home=story.home, reports=folder / "reports",
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
    )  # fmt: skip
    return Workspace(settings)


def _monitored(share: float) -> dict[str, Any]:
    """A monitoring with numbers of its own, so that no picture is drawn once for all."""
    from audit_helpers import facts

    found = facts("committed")
    for latent in found["drift"]["latents"]:
        latent["rate_after"] = min(1.0, latent["rate_after"] * (1 + share / 10))
    return found


def measured(n_edits: int, folder: Path) -> dict[str, Any]:
    """Seconds of a first sync and of one with nothing to do, and how much the view takes on disk."""
    workspace = write_home(folder, n_edits)
    prepare(str(workspace.settings.tracking_uri))
    started, used = time.perf_counter(), time.process_time()
    first = sync(workspace)
    middle, used = time.perf_counter(), time.process_time() - used
    again = sync(workspace)
    ended = time.perf_counter()
    artifacts = workspace.home / "mlflow-artifacts"
    return {
        "edits": n_edits,
        "told": len(first["told"]),
        "behind": first["behind"],
        "told_again": len(again["told"]),
        "seconds": round(middle - started, 1),
        "cpu_seconds": round(used, 1),
        "cpu_seconds_per_edit": round(used / n_edits, 3),
        "seconds_of_an_idle_sync": round(ended - middle, 2),
        "database_mb": round((folder / "mlflow.db").stat().st_size / 1e6, 1),
        "artifacts_mb": _megabytes(artifacts),
        "figures": sum(1 for _ in artifacts.rglob("figures/*.svg")),
        "reports_mb": _megabytes(workspace.settings.reports),
    }


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="An empty folder goes in here.")
    arguments = parser.parse_args()
    # The store and the records are written as the tests write theirs.
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measured(arguments.edits, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
