"""How many sentences to rehearse: fewer are the first of more, and more say more."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_helpers import nudge
from guard_helpers import made_rows
from pipeline_helpers import request_of

from benchmarks.outcome_noise import KEYS
from benchmarks.subject_rehearsal import COUNTS, MOST, moved, section_subject
from guardedit.models.handle import ModelHandle


def test_fewer_prompts_are_the_first_of_more(tiny_llama: ModelHandle) -> None:
    request = request_of()
    delta = nudge(0.05)(tiny_llama, (request,))
    few, many = (moved(tiny_llama, request, delta, most) for most in (6, 12))
    assert (len(few), len(many)) == (6, 12) and min(many) > 0
    assert many[:6] == pytest.approx(few, rel=1e-3)


def test_more_prompts_say_more_of_what_they_measure() -> None:
    frame = made_rows(n=160, relations=8)
    rng = np.random.default_rng(5)
    true = frame["out.subject/kl_nats"].to_numpy(float)
    drawn = [list(one * np.exp(2 * rng.normal(size=MOST))) for one in true]
    lines = section_subject(frame, frame[KEYS].assign(subject=drawn)).splitlines()
    assert lines[2].startswith("| 32, as the table has it |") and lines[-1] == "n 160"
    found = [float(line.split("|")[2].split("(")[0]) for line in lines[3 : 3 + len(COUNTS)]]
    assert found[0] < found[2] < found[4]
