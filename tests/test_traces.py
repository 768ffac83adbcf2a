"""Many traced facts: roles, averages, resuming; and the command with its heat map, figure and caveat."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from evaluation_helpers import spoken
from pipeline_helpers import run

from guardedit.cli.heatmap import heatmap
from guardedit.errors import BadRequestError, StaleError
from guardedit.evaluation.facts import FactList, known_facts, read_facts, well_known
from guardedit.evaluation.trace_figures import draw_fact, draw_table
from guardedit.evaluation.traces import CAVEAT, ROLES, TracedFact, markdown, roles_of, summarise, trace_facts
from guardedit.models.handle import ModelHandle
from guardedit.models.tracing import KINDS, Fact, TraceSettings

SETTINGS = TraceSettings(samples=2)
FIRST, MIDDLE, LAST, NEXT, FURTHER, END = ROLES


@pytest.fixture
def facts(tiny_llama: ModelHandle) -> FactList:
    """Three facts that the tiny model knows, as they are what it says, and one that it does not."""
    prompt, said = spoken(tiny_llama)
    words = prompt.split()
    known = [
        Fact(word, " ".join([*words[:at], "{}", *words[at + 1 :]]), said) for at, word in enumerate(words[:3])
    ]
    return FactList("by hand", "sha256:" + "1" * 64, (*known, Fact("Berlin", "{} is", "never said")))


@pytest.mark.parametrize(
    ("n_tokens", "subject", "expected"),
    [
        (8, (1, 5), [None, FIRST, MIDDLE, MIDDLE, LAST, NEXT, FURTHER, END]),
        (5, (0, 1), [LAST, NEXT, FURTHER, FURTHER, END]),
        (4, (0, 2), [FIRST, LAST, NEXT, END]),
        (3, (0, 2), [FIRST, LAST, END]),
        (3, (1, 3), [None, FIRST, LAST]),
    ],
)
def test_every_token_from_the_subject_on_has_one_role(
    n_tokens: int, subject: tuple[int, int], expected: list[str | None]
) -> None:
    assert list(roles_of(n_tokens, subject)) == expected


def made(effect: float, tokens: int = 4) -> TracedFact:
    """A fact of which MLP layer 1 gives back `effect` at the last subject token and nothing else does."""
    table = [[0.0, 0.0, 0.0]] * tokens
    table[1] = [0.0, effect, 0.0]
    return TracedFact(
        subject="s", prompt=f"{{}} {effect}", answer="a", tokens=("t",) * tokens, roles=roles_of(tokens, (0, 2)),
        p_clean=0.9, p_corrupted=0.1, layers=(2, 5, 8), indirect_effect={"mlp": tuple(map(tuple, table))},
    )  # fmt: skip


def test_averages_are_over_facts_and_know_their_peak() -> None:
    table = summarise([made(0.2), made(0.4), made(0.6)], n_seen=9, about={"window": 3}, seed=0)
    assert table.total_effect.value == pytest.approx(0.8) and (table.n, table.n_seen) == (3, 9)
    at = table.indirect_effect["mlp"][LAST]
    assert [column.value for column in at] == pytest.approx([0.0, 0.4, 0.0])
    assert at[1].low < 0.4 < at[1].high
    peak = table.peaks["mlp"][LAST]
    assert (peak.layer, peak.low, peak.high) == (5, 5, 5) and peak.effect == pytest.approx(0.4)
    assert MIDDLE not in table.indirect_effect["mlp"]
    assert CAVEAT in markdown(table) and "2301.04213" in CAVEAT and "0.400" in markdown(table)


def test_many_facts_are_traced_and_taken_up_again(
    tiny_llama: ModelHandle, facts: FactList, tmp_path: Path
) -> None:
    state = tmp_path / "state.jsonl"
    whole = trace_facts(tiny_llama, facts, SETTINGS, limit=3, state=state)
    assert whole.n == 3 and "never said" not in state.read_text()
    lines = state.read_text().splitlines()
    state.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    again = trace_facts(tiny_llama, facts, SETTINGS, limit=3, state=state)
    assert again == whole and state.read_text().splitlines() == lines
    rows = [TracedFact.model_validate_json(line) for line in lines[1:]]
    curves = [row.at_role("mlp", LAST) for row in rows]
    assert whole.indirect_effect["mlp"][LAST][2].value == pytest.approx(fmean(c[2] for c in curves if c))
    with pytest.raises(StaleError, match="samples"):
        trace_facts(tiny_llama, facts, TraceSettings(samples=3), limit=3, state=state)


def test_unknown_facts_are_left_out(tiny_llama: ModelHandle, facts: FactList) -> None:
    assert [fact for _, fact in known_facts(tiny_llama, facts.facts)] == list(facts.facts[:3])
    with pytest.raises(BadRequestError, match="knows none"):
        trace_facts(tiny_llama, FactList("x", facts.digest, facts.facts[3:]), SETTINGS, limit=1)


def test_facts_are_read_from_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "known.jsonl"
    rows = [
        {"subject": "Vinson Massif", "prompt": "Vinson Massif is in the continent of", "attribute": "Antarctica"},
        {"subject": "Gone", "prompt": "no subject here", "attribute": "x"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_facts(path).facts == (Fact("Vinson Massif", "{} is in the continent of", "Antarctica"),)
    case = {
        "case_id": 1, "subject": "France", "prompt": "The capital of France is", "target_new": "Rome",
        "ground_truth": "Paris", "rephrase_prompt": "France's capital is", "locality_prompt": "The capital of Gaul is",
    }  # fmt: skip
    other = tmp_path / "cases.jsonl"
    other.write_text(json.dumps(case) + "\n")
    assert read_facts(other).facts == (Fact("France", "The capital of {} is", "Paris"),)
    with pytest.raises(BadRequestError, match="no data file"):
        read_facts(tmp_path / "none.jsonl")
    shipped = well_known()
    assert len(shipped.facts) > 100 and "Eiffel Tower" in shipped.subjects


def test_the_heat_map_is_darkest_where_the_effect_is_largest() -> None:
    lines = heatmap(made(0.5), colour=False).splitlines()
    assert "a full block is 0.500" in lines[0]
    assert [line.count("█") for line in lines] == [0, 0, 2, 0, 0, 0]
    assert "\x1b[" not in "".join(lines) and "\x1b[" in heatmap(made(0.5), colour=True)


def test_figures_are_svg_and_the_same_every_time() -> None:
    table = summarise([made(0.2), made(0.4)], n_seen=2, about={"window": 3}, seed=0)
    for draw in (lambda: draw_fact(made(0.2), 3), lambda: draw_table(table)):
        assert draw() == draw() and draw().lstrip().startswith("<?xml") and "window of 3" in draw()


def test_the_command_traces_one_fact(tiny_llama: ModelHandle, facts: FactList, tmp_path: Path) -> None:
    fact = facts.facts[1]
    words = ("--model", tiny_llama.name, "--home", str(tmp_path / "home"))
    braces = fact.prompt.replace("{}", "{" + fact.subject + "}")
    svg = tmp_path / "figures" / "one.svg"
    ran = run(
        *words, "--json", "trace", braces, "--answer", fact.answer or "", "--samples", "2", "--svg", svg
    )
    assert ran.code == 0, ran.err
    assert set(ran.json["indirect_effect"]) == set(KINDS) and ran.json["caveat"] == CAVEAT
    assert ran.json["window"] == 1 and svg.read_text().count("<svg") == 1
    named = run(*words, "trace", fact.filled, "--subject", fact.subject, "--samples", "2")
    assert named.code == 0 and "does not choose the layer" in named.out
    shown = re.search(r"total effect (-?\d\.\d{3})", named.out)
    assert shown is not None and float(shown[1]) == pytest.approx(ran.json["total_effect"], abs=6e-4)
    assert run(*words, "trace", braces, "--answer", "never said").code == 2
    assert run(*words, "trace", "no subject").code == 2 and run(*words, "trace").code == 2


def test_the_command_traces_a_file(tiny_llama: ModelHandle, facts: FactList, tmp_path: Path) -> None:
    path = tmp_path / "known.jsonl"
    rows = [{"subject": f.subject, "prompt": f.filled, "attribute": f.answer} for f in facts.facts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model", tiny_llama.name, "--home", str(tmp_path / "home"), "--json", "trace")
    ran = run(*words, "--facts", path, "--limit", "2", "--samples", "2", "--every", "2")
    assert ran.code == 0, ran.err
    assert ran.json["n"] == 2 and ran.json["layers"] == [1, 3] and ran.json["caveat"] == CAVEAT
    assert "about" not in ran.json and ran.json["every"] == 2
