"""Deciding and recording load no model: an auditor's machine needs neither torch nor MLflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "mlflow", "sae_lens", "transformer_lens", "matplotlib", "numpy")
LIGHT = ("gate", "audit", "records", "errors", "config", "executors")


def _loaded_by(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_gate_audit_and_the_records_load_nothing_heavy() -> None:
    package = Path(__import__("guardedit").__file__).parent
    names = [
        f"guardedit.{name}"
        for name in LIGHT
        if (package / name).exists() or (package / f"{name}.py").exists()
    ]
    for room in ("gate", "audit"):
        names += [f"guardedit.{room}.{p.stem}" for p in (package / room).glob("*.py") if p.stem != "__init__"]
    assert len(names) > 12
    assert _loaded_by("import " + ", ".join(names)) & set(HEAVY) == set()


def test_the_check_above_would_notice() -> None:
    assert "numpy" in _loaded_by("import numpy")
