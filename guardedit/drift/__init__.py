"""The monitor: what changed in an edited model, on the same tokens, against a reference version.

probes.py     the texts and prompts that both sides read
sides.py      activations of the reference (cached on disk by cache.py) and of the edited model
observe.py    one pass over one group of rows, both sides
latents.py    paired statistics of SAE latents
behaviour.py  KL, perplexity, lost answers, the edited sentence as distractor
scores.py     observations -> named scores
null.py       the bank of accepted real edits that a measurement is ranked in
measure.py    base_side + measure_drift -> DriftReport (lists.py: its lists and remarks)
"""

from __future__ import annotations
