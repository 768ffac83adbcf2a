"""Outcomes measured a second time: on nothing that the first measurement read, and what the table says of both ends."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from guard_helpers import made_rows

from benchmarks.outcome_noise import KEYS, SAID_AGAIN, second_text, seconds, section_noise
from guardedit.evaluation.guard.association import spearman
from guardedit.evaluation.guard.far_sample import TOKENS, FarSample
from guardedit.evaluation.guard.outcome_prompts import SAID
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.handle import ModelHandle


def test_the_second_measurement_reads_nothing_of_the_first(tiny_llama: ModelHandle) -> None:
    assert not set(SAID_AGAIN) & set(SAID) and len(set(SAID_AGAIN)) == len(SAID)
    again = second_text(tiny_llama, {})
    assert set(again) == set(DOMAINS)
    for domain, texts in again.items():
        assert texts and not set(texts) & set(control_texts(tiny_llama, domain, 2 * TOKENS, half="test"))
    rows = {tuple(row) for one in FarSample.of(tiny_llama, 1).batches for row in one.ids.tolist()}
    second = FarSample.only(tiny_llama, 1, 0, again)
    assert not rows & {tuple(row) for one in second.batches for row in one.ids.tolist()}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return made_rows(n=160, relations=8)


def measured_again(frame: pd.DataFrame, noise: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same damage once more, with noise."""
    rng = np.random.default_rng(3)

    def again(name: str) -> np.ndarray:
        values = frame[f"out.{name}/kl_nats"].to_numpy(float)
        found: np.ndarray = values * np.exp(noise * rng.normal(size=len(values)))
        return found

    kept = frame[KEYS].assign(far=again("far"), subject=[[one, one] for one in again("subject")])
    others = [[one] * 12 for one in again("near")]
    others[0] = [1.0]  # too few to measure near damage a second time
    return kept, pd.DataFrame({"case_id": frame["case_id"], "others": others})


def test_what_repeats_itself_foretells_itself(frame: pd.DataFrame) -> None:
    lines = section_noise(frame, *measured_again(frame, 0.0)).splitlines()
    assert len(lines) == 2 + 6
    for line in lines[2::2]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2] == "a second measurement"
        assert cells[3].startswith("1.00 (") and cells[4].startswith("1.00 (") and cells[5] == "1.00"
    assert [line.split("|")[2].strip() for line in lines[2::2]] == ["160", "159", "160"]


def test_what_does_not_repeat_itself_foretells_less(frame: pd.DataFrame) -> None:
    damage = frame["out.far/kl_nats"].to_numpy(float)

    def far(noise: float) -> float:
        (again,) = seconds("far", frame, *measured_again(frame, noise))
        return spearman(again, damage)

    assert far(0.0) > far(1.0) > far(4.0)
