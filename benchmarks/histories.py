"""Random histories of a home, step by step beside a small model of what ought to be.

    python -m benchmarks.histories --histories 5000

The home is `small_home`'s: real gate, ledger, versions and recovery, without a model. What should follow says
`expected_history`, which knows no code of the package. After each step: every plan stands where that says; the live
digest is that of the expected bytes, and one that was committed (or the base); the ledger's chain verifies; and the
index says what the ledger says. As a commit is expected only with the words the policy asks for, none was made without.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.history_steps import History
from benchmarks.small_home import AUTHOR, PARAMETERS, SmallHome
from guardedit.records import AuditReport

CLOSED = ("rejected", "superseded", "rolled-back", "stale")
EXAMPLE = Path(__file__).parent.parent / "reports" / "example" / "0001-eiffel-tower-rome" / "report.json"


def random_step(history: History, draw: random.Random) -> None:
    """One of everything that can happen, on one of the plans that there are."""
    names = list(history.want.cases)
    if not names or (len(names) < 6 and draw.random() < 0.2):
        replaced = draw.choice(names) if names and draw.random() < 0.3 else None
        history.plan(draw.choice(("pass", "ask", "ask", "block")), draw.choice(PARAMETERS), replaced)
        return
    # Four in five steps are about a plan that is still open.
    open_ = [name for name in names if history.want.cases[name].state not in CLOSED]
    name = draw.choice(open_ if open_ and draw.random() < 0.8 else names)
    who = draw.choice(("ana", "eva", AUTHOR, "gus", "max"))
    fitting = _fitting(history, draw, name)
    step = fitting if fitting is not None and draw.random() < 0.5 else _any(history, draw, name, who)
    step()


def _fitting(history: History, draw: random.Random, name: str) -> Callable[[], None] | None:
    """What usually comes next for a plan, so that histories get somewhere."""
    verdict = draw.choice(("pass", "pass", "fail", "inconclusive"))
    reviewer, at = draw.choice(("ana", "eva")), draw.randrange(3)
    steps: dict[str, list[Callable[[], None]]] = {
        "needs-approval": [*3 * [lambda: history.approve(name, reviewer)], lambda: history.forge(name)],
        "blocked": [lambda: history.break_glass(name, "gus")],
        "approved": [lambda: history.apply(name, verdict), lambda: history.crash(name, at)],
        "auto-approved": [lambda: history.apply(name, verdict), lambda: history.crash(name, at)],
        "held": [lambda: history.approve(name, reviewer), lambda: history.apply(name, verdict)],
        "committed": [lambda: history.roll_back(name)],
        "stale": [lambda: history.plan("ask", PARAMETERS[0], name)],
        "expired": [lambda: history.plan("pass", PARAMETERS[0], name)],
    }
    found = steps.get(history.want.cases[name].state)
    return draw.choice(found) if found else None


def _any(history: History, draw: random.Random, name: str, who: str) -> Callable[[], None]:
    """Anything at all, possible or not."""
    verdict, other = draw.choice(("pass", "pass", "fail", "inconclusive")), draw.choice((None, who))
    what, at, hours = (
        draw.choice(("plan", "delta", "ledger", "head")),
        draw.randrange(3),
        draw.choice((1, 3, 80)),
    )
    steps: list[Callable[[], None]] = [
        *2 * [lambda: history.approve(name, who)],
        lambda: history.reject(name, other),
        lambda: history.break_glass(name, who),
        *3 * [lambda: history.apply(name, verdict)],
        lambda: history.roll_back(name),
        lambda: history.wait(hours),
        lambda: history.revoke(who),
        lambda: history.tamper(name, what),
        lambda: history.forge(name),
        lambda: history.crash(name, at),
        lambda: history.crash_undo(name),
    ]
    return draw.choice(steps)


def begun(folder: Path, template: AuditReport) -> SmallHome:
    """A home with base and keys, to be copied for each history."""
    world = SmallHome(folder, template)
    world.begin()
    return world


def small_template() -> AuditReport:
    """The demo's report without its long lists: what is recorded of each edit is short, and tests are quick."""
    whole = AuditReport.model_validate_json(EXAMPLE.read_bytes())
    risk = whole.plan.risk.model_copy(update={"tokens": (), "latents": (), "probes": ()})
    drift = (
        whole.drift.model_copy(update={"latents": (), "probes": (), "domains": ()}) if whole.drift else None
    )
    return whole.model_copy(update={"plan": whole.plan.model_copy(update={"risk": risk}), "drift": drift})


def run(world: SmallHome, folder: Path, seed: int, steps: int) -> Counter[str]:
    """One random history of so many steps, every invariant checked after each."""
    draw = random.Random(seed)
    approvals = draw.choice((1, 1, 2))
    history = History(world.copied(folder, approvals), approvals, seed)
    for number in range(steps):
        try:
            random_step(history, draw)
            history.check()
        except Exception as error:
            raise AssertionError(f"history {seed}, step {number}: {error}") from error
    history.world.session().ledger.verify()
    history.world.session().store.verify()
    return history.done


def _counted(world: SmallHome, folder: Path, seed: int, steps: int, broken: list[str]) -> Counter[str]:
    """What happened in one history; one in which an invariant does not hold is named, and the others go on."""
    try:
        return run(world, folder, seed, steps)
    except AssertionError as error:
        broken.append(str(error))
        print(error, file=sys.stderr, flush=True)
        return Counter()


def main() -> None:
    """Run histories and print what happened in them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="Stop early, and say how many were run.")
    parser.add_argument(
        "--folder", type=Path, help="Where homes are made; a folder in memory is much quicker."
    )
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    broken: list[str] = []
    started, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        world = begun(Path(root) / "begun", small_template())
        while number < arguments.histories and time.monotonic() - started < 60 * arguments.minutes:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                total += _counted(world, Path(folder) / "h", arguments.seed + number, arguments.steps, broken)
            number += 1
            if number % 250 == 0:
                print(f"{number} histories, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    found = {
        "histories": number, "steps_each": arguments.steps, "first_seed": arguments.seed,
        "violations": broken, "wall_s": round(time.monotonic() - started), "cpu_s": round(time.process_time()),
        "done": dict(sorted(total.items())),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
