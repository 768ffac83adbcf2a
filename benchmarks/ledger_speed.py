"""How long `guardedit status` and `log`, and the deciding of `approve` and `apply`, take on a ledger of many records.

    python -m benchmarks.ledger_speed --records 10000
    python -m benchmarks.ledger_speed --records 10000 --deciding

The first edits are those of `small_home`: planned, approved, committed and undone through gate, ledger and version
store, with plans and monitor reports as large as the demo's (reports/example/). Their entries are then appended again
under new names until there are enough: an edit on a long ledger reads it many times over, and takes long. Each command
runs in a process of its own. Printed are wall and processor seconds: of the first run without an index, which checks
the whole chain, and the median of five after it. Of `approve` and `apply` what is timed is everything but the model:
reading and checking the record, writing the entries, staging, committing (`--deciding`; it alone changes the ledger).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.small_home import PARAMETERS, SmallHome
from guardedit.audit.ledger import Ledger
from guardedit.pipeline.deciding import decide_plan
from guardedit.records import AuditReport

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "reports" / "example" / "0001-eiffel-tower-rome" / "report.json"
REASON = "benchmark: looked at it"


def make_home(folder: Path, records: int, edits: int = 8) -> None:
    """A home with so many records, of which those of the first `edits` edits are told again and again."""
    template = AuditReport.model_validate_json(EXAMPLE.read_bytes())
    world = SmallHome(folder, template)
    world.begin()
    for number in range(edits):
        plan = world.plan("ask", PARAMETERS[number % 2])
        decide_plan(world.session("ana"), plan.plan_id, "approved", REASON)
        world.apply(plan.plan_id, "pass")
        world.roll_back(plan.plan_id)
    ledger = Ledger(world.home / "ledger.sqlite")
    told = [entry for entry in ledger.entries() if entry.body.get("plan_id")]
    for number in range(records - ledger.entries()[-1].seq):
        entry, turn = told[number % len(told)], number // len(told) + 1
        plan_id = f"{entry.body['plan_id']}-{turn}"
        ledger.append(entry.kind, {**entry.body, "plan_id": plan_id, "edit_id": plan_id})


def timed(words: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one `guardedit` command in a process of its own."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "guardedit", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    wall, after = time.perf_counter() - start, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, spent


def deciding(folder: Path) -> dict[str, object]:
    """Wall and processor seconds of one approval and one apply, each in a session that has read nothing yet."""
    world = SmallHome(folder, AuditReport.model_validate_json(EXAMPLE.read_bytes()))
    plan_id = world.plan("ask", PARAMETERS[0]).plan_id
    steps: dict[str, Callable[[], object]] = {
        "approve": lambda: decide_plan(world.session("ana"), plan_id, "approved", REASON),
        "apply": lambda: world.apply(plan_id, "pass"),
    }
    found: dict[str, object] = {}
    for name, step in steps.items():
        wall, spent = time.perf_counter(), time.process_time()
        step()
        found[name] = {
            "wall_s": round(time.perf_counter() - wall, 2),
            "cpu_s": round(time.process_time() - spent, 2),
        }
    return found


def main() -> None:
    """Make the ledger (or take one that is there), time the commands, print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="Keep the home here, and take it when it is there.")
    parser.add_argument("--deciding", action="store_true", help="Time approve and apply instead.")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    home = folder / "home"
    if not home.exists():
        make_home(folder, arguments.records)
    entries = Ledger(home / "ledger.sqlite").entries()
    found: dict[str, object] = {
        "records": len(entries),
        "megabytes": round((home / "ledger.sqlite").stat().st_size / 1e6, 1),
    }
    if arguments.deciding:
        found |= deciding(folder)
    for verb in () if arguments.deciding else ("status", "log"):
        (home / "ledger.index").unlink(missing_ok=True)
        first = timed(["--home", str(home), verb])
        rest = [timed(["--home", str(home), verb]) for _ in range(5)]
        found[verb] = {
            "first_wall_s": round(first[0], 2),
            "first_cpu_s": round(first[1], 2),
            "wall_s": round(statistics.median(w for w, _ in rest), 2),
            "cpu_s": round(statistics.median(c for _, c in rest), 2),
        }
    print(json.dumps(found, indent=1))
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
