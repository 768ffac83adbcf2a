"""What the tests of the guard's benchmark and of its risk model share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pipeline_helpers import FACTS, request_of

from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.frames import to_frame

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "data" / "guard_rows.parquet"
CASES = tuple(
    EvalCase(case_id=str(number), request=request_of(number, target_true="Oslo"))
    for number in range(len(FACTS))
)


def made_rows(n: int = 120, relations: int = 12, seed: int = 0) -> pd.DataFrame:
    """Edits whose damage follows one known score a scope, with noise, and other scores that say nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        far, near, subject, idle = rng.normal(size=4)
        predictors = {
            "leakage_share": np.exp(far), "near_interference": np.exp(near), "rehearsed_subject_kl": np.exp(subject),
            "key_leakage": np.exp(idle), "latent_leak": np.exp(far + 0.1 * rng.normal()), "sae_view": rng.random(),
        }  # fmt: skip
        outcomes = {
            "far/kl_nats": np.exp(far - 7 + 0.3 * rng.normal()), "near/kl_nats": np.exp(near - 4 + 0.3 * rng.normal()),
            "subject/kl_nats": np.exp(subject + 0.3 * rng.normal()),
        }  # fmt: skip
        rows.append({
            "editor": "rome", "stratum": "known", "case_id": f"{number:04d}", "relation": f"r{number % relations}",
            "predictors": {k: float(v) for k, v in predictors.items()},
            "outcomes": {k: float(v) for k, v in outcomes.items()}, "seconds": float(rng.random()),
        })  # fmt: skip
    return to_frame(rows)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return made_rows()
