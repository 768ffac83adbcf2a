"""The table of every editor: cells of earlier runs stay, and texts of twenty facts do not stand in for a hundred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.editors_table import table, write
from benchmarks.own_words import figures, nearer

Pairs = dict[str, tuple[float | None, float | None]]


def estimate(value: float, n: int) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def cell(folder: Path, row: str, efficacy: float, n: int, shape: str = "single", **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "row": row, "shape": shape, "n": n, "failed": 0, "hparams": {}, "model_digest": "m", "seconds_per_edit": 1.0,
        "curve": [], "metrics": {"efficacy": estimate(efficacy, n), **more.pop("metrics", {})}, **more,
    }  # fmt: skip
    (folder / f"{row}-{shape}.json").write_text(json.dumps(found))


def texts(out: Path, row: str, words: dict[str, list[float]]) -> None:
    metrics = {"fluency": estimate(600, 2), "own_words_nats": estimate(words["a"][0], 2)}
    cell(out / "fluency", row, 0.25, 2, metrics=metrics, own_words=words)


def test_texts_of_a_few_facts_add_their_own_columns_and_leave_the_others_alone(tmp_path: Path) -> None:
    out, to = tmp_path / "out", tmp_path / "kept.json"
    cell(out / "main", "rome", 0.75, 100)
    texts(out, "rome", {"a": [2.0, 1.0], "b": [3.0, 1.0]})
    texts(out, "guarded", {"a": [1.5, 1.0], "b": [2.0, 1.0]})
    write(out, to)
    kept = json.loads(to.read_text())["rome / single"]
    assert (kept["n"], kept["metrics"]["efficacy"]["value"]) == (100, 0.75)
    assert kept["metrics"]["own_words_nats"]["value"] == 2.0
    single, fluent = table(to).split("**Texts of")
    assert "0.75" in single and "guarded" not in single and "600" not in single
    line = next(line for line in fluent.splitlines() if line.startswith("| guarded"))
    assert line.split("|")[4].strip().startswith("-0.75 (")


def test_cells_of_earlier_runs_stay(tmp_path: Path) -> None:
    to = tmp_path / "kept.json"
    for number, row in enumerate(("rome", "memit")):
        cell(tmp_path / row / "main", row, 0.5 + number / 4, 100)
        write(tmp_path / row, to)
    assert set(json.loads(to.read_text())) == {"rome / single", "memit / single"}


def test_texts_are_compared_fact_by_fact() -> None:
    one: Pairs = {"a": (1.0, 0.5), "b": (4.0, 0.5), "c": (None, 0.5), "d": (9.0, 0.5)}
    other: Pairs = {"a": (2.0, 0.5), "b": (5.5, 0.5), "c": (7.0, 0.5)}
    gap = nearer(one, other, 0)
    assert gap is not None and (gap.value, gap.n) == (-1.25, 2)
    assert figures(one, 0)["own_words_nats"]["value"] == pytest.approx(14 / 3)
    assert figures(one, 0)["own_words_nats_base"]["value"] == pytest.approx(0.5)
