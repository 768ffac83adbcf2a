"""Whatever people, the clock and crashes do to a home: nothing unapproved goes live, and the chain verifies.

A stateful property test of the real gate, ledger, versions and recovery (benchmarks/small_home.py says what is not
real) beside a small independent model of what ought to be (benchmarks/expected_history.py).
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.histories import begun, random_step, run, small_template
from benchmarks.history_steps import History
from benchmarks.small_home import PARAMETERS, PEOPLE, SmallHome
from guardedit.gate.states import TRANSITIONS

numbers = st.integers(0, 5)
people = st.sampled_from(sorted(PEOPLE))
verdicts = st.sampled_from(("pass", "fail", "inconclusive"))
SHORT = settings(
    max_examples=20, stateful_step_count=8, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallHome:
    """A home with base and keys; each history has a copy."""
    return begun(tmp_path_factory.mktemp("histories") / "begun", small_template())


class Machine(RuleBasedStateMachine):
    """Steps of `History`, chosen by hypothesis."""

    world: SmallHome

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.history: History | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def it(self) -> History:
        assert self.history is not None
        return self.history

    def name(self, number: int) -> str:
        names = list(self.it.want.cases)
        return names[number % len(names)]

    @initialize(approvals=st.sampled_from((1, 2)), says=st.sampled_from(("pass", "ask", "block")))
    def begin(self, approvals: int, says: str) -> None:
        self.history = History(self.world.copied(self.folder / "h", approvals), approvals)
        self.it.plan(says, PARAMETERS[0])

    @rule(says=st.sampled_from(("pass", "ask", "block")), where=st.sampled_from(PARAMETERS))
    def propose_and_check(self, says: str, where: str) -> None:
        self.it.plan(says, where)

    @rule(number=numbers, says=st.sampled_from(("pass", "ask")))
    def replan(self, number: int, says: str) -> None:
        self.it.plan(says, PARAMETERS[0], self.name(number))

    @rule(number=numbers, who=people)
    def approve(self, number: int, who: str) -> None:
        self.it.approve(self.name(number), who)

    @rule(number=numbers, who=st.none() | people)
    def reject(self, number: int, who: str | None) -> None:
        self.it.reject(self.name(number), who)

    @rule(number=numbers, who=people)
    def break_glass(self, number: int, who: str) -> None:
        self.it.break_glass(self.name(number), who)

    @rule(number=numbers, verdict=verdicts)
    def apply(self, number: int, verdict: str) -> None:
        self.it.apply(self.name(number), verdict)

    @rule(number=numbers)
    def roll_back(self, number: int) -> None:
        self.it.roll_back(self.name(number))

    @rule(hours=st.sampled_from((1.0, 3.0, 80.0)))
    def wait(self, hours: float) -> None:
        self.it.wait(hours)

    @rule(who=st.sampled_from(("ana", "eva", "ben", "gus")))
    def revoke(self, who: str) -> None:
        self.it.revoke(who)

    @rule(number=numbers, what=st.sampled_from(("plan", "delta", "ledger", "head")))
    def tamper(self, number: int, what: str) -> None:
        self.it.tamper(self.name(number), what)

    @rule(number=numbers)
    def forge(self, number: int) -> None:
        self.it.forge(self.name(number))

    @rule(number=numbers, at=st.integers(0, 2))
    def crash(self, number: int, at: int) -> None:
        self.it.crash(self.name(number), at)

    @rule(number=numbers)
    def crash_undo(self, number: int) -> None:
        self.it.crash_undo(self.name(number))

    @precondition(lambda self: self.history is not None)
    @invariant()
    def everything_is_as_expected(self) -> None:
        self.it.check()


def test_no_history_leads_to_an_unapproved_commit_or_a_broken_chain(world: SmallHome) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("InAWorld", (Machine,), {"world": world})
    run_state_machine_as_test(machine, settings=SHORT)


def test_the_walk_sees_what_the_model_does_not_expect(world: SmallHome, tmp_path: Path) -> None:
    """The comparison can fail: an approval that the model never heard of."""
    history = History(world.copied(tmp_path / "h", 1), 1)
    history.plan("ask", PARAMETERS[0])
    (name,) = history.want.cases
    history.check()
    history.want.cases[name].state = "approved"
    with pytest.raises(AssertionError, match="is not"):
        history.check()
    history.want.cases[name].state = "needs-approval"
    history.want.live[PARAMETERS[0]] = "sha256:" + "1" * 64
    with pytest.raises(AssertionError, match="other bytes"):
        history.check()


def test_random_histories_reach_the_states_of_the_table(world: SmallHome, tmp_path: Path) -> None:
    """Most states of the table are met within a few histories."""
    met: set[str] = set()
    for seed in range(5):
        draw = random.Random(seed)
        history = History(world.copied(tmp_path / f"h{seed}", 1), 1, seed)
        for _ in range(12):
            random_step(history, draw)
            history.check()
            met |= {case.state for case in history.want.cases.values()}
    known = {t.to for t in TRANSITIONS.values()}
    assert met <= known and len(met) >= 8, sorted(known - met)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_five_thousand_random_histories(world: SmallHome, tmp_path: Path) -> None:
    for seed in range(5000):
        run(world, tmp_path / "h", seed, 8)
        shutil.rmtree(tmp_path / "h")
