"""What the pages say of batches, of neighbours and of namesakes follows from their rows; tables join by edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guard_helpers import made_rows

from benchmarks.guard_together import foretold, section_together
from benchmarks.monitor_findings import caught
from benchmarks.namesakes import section_namesakes
from benchmarks.near_rehearsal import section_rehearsal
from guardedit.errors import BadRequestError
from guardedit.evaluation.guard.command import gathered
from guardedit.evaluation.guard.frames import joined
from guardedit.evaluation.rowfile import RowFile


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _by_law(n: int = 40) -> pd.DataFrame:
    """Single edits whose far damage is exactly a tenth of the square of their leakage, and one batch that does more."""
    rows = made_rows(n + 1)
    leak = np.exp(np.linspace(-1, 1, n + 1))
    rows = rows.assign(
        **{"pred.leakage": leak, "out.far/kl_nats": 0.1 * leak**2, "out.far/nll_gain_nats": 0.0}
    )
    rows = rows.assign(**{"pred.rehearsed_near_kl": rows["out.near/kl_nats"]})
    last = rows.index[-1]
    rows.loc[last, ["stratum", "pred.leakage", "out.far/kl_nats"]] = ["batch of 10", 10.0, 30.0]
    return rows


def test_a_line_through_single_edits_foretells_what_follows_the_same_law() -> None:
    rows = _by_law()
    said = foretold(rows, "rome", "far", rows.tail(1))
    assert said is not None and said[0] == pytest.approx(0.1 * 10.0**2)
    assert foretold(rows.head(5), "rome", "far", rows.tail(1)) is None


def test_the_table_of_batches_says_how_many_times_more_came() -> None:
    (line,) = [one for one in section_together(_by_law()).splitlines() if "batch of 10" in one]
    assert _cells(line)[:5] == ["rome", "batch of 10", "1", "30", "3"]
    assert section_together(made_rows()) == "None yet.\n"


def test_of_an_edit_in_both_tables_the_later_row_stays() -> None:
    earlier, later = made_rows(6), made_rows(3).assign(**{"out.far/kl_nats": 7.0})
    both = joined(earlier, later)
    assert list(both.columns) == list(earlier.columns) and len(both) == 6
    assert both["out.far/kl_nats"].tolist() == [7.0] * 3 + earlier["out.far/kl_nats"].tolist()[3:]


def test_rows_of_other_far_text_do_not_stand_in_one_table(tmp_path: Path) -> None:
    earlier, later = made_rows(6).assign(far_text="sha256:a"), made_rows(3).assign(far_text="sha256:b")
    with pytest.raises(BadRequestError, match=r"different text .*sha256:a.* 3 rows.*sha256:b.* 3 rows"):
        joined(earlier, later)
    assert joined(earlier.head(3), later)["far_text"].tolist() == ["sha256:b"] * 3
    for text in ("a", "b"):
        file = RowFile(tmp_path / f"{text}.jsonl", {"far": f"sha256:{text}"})
        file.append({"editor": "rome", "stratum": "known", "case_id": text})
    with pytest.raises(BadRequestError, match="--far"):
        gathered(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    assert gathered(tmp_path)["far_text"].tolist() == ["sha256:b"]


def test_namesakes_that_move_are_told_from_neighbours_that_do_not() -> None:
    rows = made_rows(30).assign(**{"pred.rehearsed_near_kl": np.arange(1.0, 31.0)})
    moved = pd.DataFrame(
        {
            "case_id": one,
            "moved": [5.0 + at / 100, 3.0],
            "real": [9.0, 1.0],
            "others": [0.0],
            "unread": [at / 10, at / 5],
            "anywhere": [30.0 - at] if at % 2 else [],
        }
        for at, one in enumerate(rows["case_id"])
    )
    alike, others = section_namesakes(moved, rows).splitlines()[2:4]
    assert _cells(alike)[1:] == ["30", "60", "30: 0.50 (0.50 to 0.50)"]
    assert _cells(others)[1:] == ["30", "30", "0: 0.00 (0.00 to 0.00)"]
    assert "4.1 nats; above 1 nat in 1.00" in section_namesakes(moved, rows)
    unread, anywhere = section_namesakes(moved, rows).splitlines()[-2:]
    assert _cells(unread)[1:3] == ["30", "1.00 (1.00 to 1.00)"]
    assert _cells(anywhere)[1:3] == ["15", "-1.00 (-1.00 to -1.00)"] and _cells(anywhere)[-1] == "15.0"


def test_prompts_that_say_what_the_outcome_says_order_it_perfectly_and_others_do_not() -> None:
    rows = made_rows(40)
    damage, rng = rows["out.near/kl_nats"].to_numpy(), np.random.default_rng(0)
    rows = rows.assign(**{"pred.rehearsed_near_kl": damage})
    table = pd.DataFrame({
        "case_id": rows["case_id"], "relation": range(40), "outcome": [[d] * 12 for d in damage],
        "rehearsed": [[d] * 6 for d in damage], "named": [[True] * 3 + [False] * 3] * 40,
        "others": [list(rng.random(24)) for _ in damage],
    })  # fmt: skip
    told = section_rehearsal(table, rows)
    every, *_, drawn = [line for line in told.splitlines() if line.startswith("|")][2:]
    assert _cells(every)[2].startswith("1.00") and abs(float(_cells(drawn)[2].split()[0])) < 0.5
    assert "Spearman of 1.00" in told and "e-16 of their value" in told


def test_real_harm_that_breaks_a_limit_of_another_scope_is_not_counted_as_seen() -> None:
    rows = made_rows(20)
    worst = str(rows.loc[rows["out.near/kl_nats"].idxmax(), "case_id"])
    scores = {f"score.{scope}_kl": 0.5 for scope in ("far", "near", "subject")}
    scores["score.subject_lost_top1"] = 0.7
    table = pd.DataFrame([{"kind": "harmful", "case_id": worst, "broken": "subject-lost-top1", **scores}])
    (line,) = [one for one in caught(table, rows).splitlines() if one.startswith("| near")]
    assert _cells(line)[1:5] == ["1", "1 of 1", "1 of 1", "0 of 1"]
    # What only a limit that is new says was not said before.
    later = table.assign(broken="subject-kl", **{"score.subject_lost_top1": 0.1})
    (line,) = [one for one in caught(later, rows).splitlines() if one.startswith("| near")]
    assert _cells(line)[1:5] == ["1", "1 of 1", "0 of 1", "0 of 1"]
