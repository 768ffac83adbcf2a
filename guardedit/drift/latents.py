"""Paired statistics of SAE latents: the same tokens through both models, one sequence = one unit of replication.

Tokens of a sequence depend on each other, so a token-level test (McNemar) would find too much. Under the null "before
and after may be swapped within each sequence", a per-sequence difference d_s is as likely as -d_s: sign-flips give its
distribution exactly. Counts are whole numbers, so ties are counted as ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.stats import binom, false_discovery_control
from torch import Tensor

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FDR = 0.05
RATE_FLOOR = 5e-4
RELATIVE_FLOOR = 0.2
MIN_SEQUENCES = 6
"""A latent that changed in fewer sequences cannot reach two-sided p < 0.05 (2·2⁻⁵ = 0.0625): it is not tested."""
FIRST_FLIPS = 2_000
SECOND_FLIPS = 100_000
N_TESTS = 3
"""Rate, magnitude, turnover: the smallest of the three p-values is multiplied by three."""
_CHUNK = 4_000


@dataclass(frozen=True)
class Counts:
    """Sums over the tokens of each sequence, for every latent of one SAE."""

    before: Float[Tensor, "seq latent"]
    """Tokens on which the latent fires in the reference."""
    after: Float[Tensor, "seq latent"]
    both: Float[Tensor, "seq latent"]
    mass_before: Float[Tensor, "seq latent"]
    """Sum of activations in the reference."""
    mass_after: Float[Tensor, "seq latent"]
    shift: Float[Tensor, "seq latent"]
    """Sum of (after − before) over tokens on which it fires in both."""
    tokens: Float[Tensor, " seq"]

    @property
    def changed(self) -> Float[Tensor, "seq latent"]:
        """Tokens on which the latent fires in exactly one of the two."""
        return self.before + self.after - 2 * self.both


def count(
    before: Float[Tensor, "batch token latent"],
    after: Float[Tensor, "batch token latent"],
    counted: Bool[Tensor, "batch token"],
) -> Counts:
    """Counts of one batch; `counted` says which tokens take part."""
    weight = counted.unsqueeze(-1).to(before.dtype)
    on_before, on_after = (before > 0) * weight, (after > 0) * weight
    both = on_before * on_after
    return Counts(
        before=on_before.sum(1),
        after=on_after.sum(1),
        both=both.sum(1),
        mass_before=(before * on_before).sum(1),
        mass_after=(after * on_after).sum(1),
        shift=((after - before) * both).sum(1),
        tokens=weight.sum((1, 2)),
    )


def joined(parts: Sequence[Counts]) -> Counts:
    """Counts of several batches, one below the other."""
    return Counts(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in Counts.__dataclass_fields__}
    )


@dataclass(frozen=True)
class LatentTests:
    """Per latent of one SAE in one scope; all arrays (d_sae,)."""

    rate_before: Floats
    """Share of tokens on which it fires."""
    rate_after: Floats
    turnover: Floats
    """1 − Jaccard of the two firing sets; 0 where it never fires."""
    magnitude_ratio: Floats
    """Mean activation given firing, after over before; NaN where it does not fire in both models."""
    p_value: Floats
    """Bonferroni over three tests; 1 where not testable."""
    testable: Bools
    changed_rate: Floats
    """Share of tokens on which it fires in exactly one of the two: π·turnover, π the rate of firing in either."""

    @property
    def reaches_floor(self) -> Bools:
        """|Δπ| ≥ max(0.2 π, 5e-4), or turnover ≥ 0.2, or a magnitude change of at least a fifth."""
        rate = np.abs(self.rate_after - self.rate_before)
        by_rate = rate >= np.maximum(RELATIVE_FLOOR * self.rate_before, RATE_FLOOR)
        by_magnitude = np.nan_to_num(np.abs(self.magnitude_ratio - 1)) >= RELATIVE_FLOOR
        result: Bools = by_rate | (self.turnover >= RELATIVE_FLOOR) | by_magnitude
        return result


def compare_latents(counts: Counts, seed: int) -> LatentTests:
    """Firing rate, magnitude and turnover of every latent, before against after.

    - rate: sign-flips over sequences of (fires after − fires before), two-sided;
    - magnitude: sign-flips of the summed change on tokens where it fires in both, two-sided;
    - turnover: exact binomial test over the sequences in which it fires at all, of "at most half of them turned over
      more than a fifth of the firing set"; finds a latent that moved to other tokens at an unchanged rate.
    """
    tokens = float(counts.tokens.sum())
    before, after, both = (_total(x) for x in (counts.before, counts.after, counts.both))
    union = before + after - both
    p_rate = sign_flip_p(counts.after - counts.before, seed)
    p_magnitude = sign_flip_p(counts.shift, seed + 1, tolerance=1e-6)
    p_turnover = _turnover_p(counts)
    smallest = np.minimum(np.minimum(p_rate, p_magnitude), p_turnover)
    touched = (counts.changed > 0) | (counts.shift != 0)
    testable = touched.sum(0).cpu().numpy() >= MIN_SEQUENCES
    return LatentTests(
        rate_before=before / max(tokens, 1),
        rate_after=after / max(tokens, 1),
        turnover=np.divide(union - both, union, out=np.zeros_like(union), where=union > 0),
        magnitude_ratio=_magnitude_ratio(counts, before, after),
        p_value=np.where(testable, np.minimum(1.0, N_TESTS * smallest), 1.0),
        testable=testable,
        changed_rate=(union - both) / max(tokens, 1),
    )


def significant(tests: Sequence[LatentTests]) -> list[Bools]:
    """Per SAE, what stands out: Benjamini-Hochberg at 0.05 over all testable latents of all SAEs, and the floor.

    Which latents are testable depends on absolute differences only, which sign-flips leave alone.
    """
    return [q & t.reaches_floor for q, t in zip(discovered(tests), tests, strict=True)]


def discovered(tests: Sequence[LatentTests]) -> list[Bools]:
    """Benjamini-Hochberg alone, without the effect floor."""
    found = [np.zeros_like(t.testable) for t in tests]
    p = np.concatenate([t.p_value[t.testable] for t in tests]) if tests else np.zeros(0)
    if not p.size:
        return found
    adjusted = np.split(false_discovery_control(p), np.cumsum([t.testable.sum() for t in tests])[:-1])
    for flags, t, q in zip(found, tests, adjusted, strict=True):
        flags[t.testable] = q <= FDR
    return found


def in_target(counts: Counts, tests: LatentTests) -> Bools:
    """Latents that the edit moves at the target: the floor is reached, and at least half of the prompts take part.

    The handful of target prompts is the whole population, not a sample of it, so no test is asked for.
    """
    touched = ((counts.changed > 0) | (counts.shift != 0)).sum(0).cpu().numpy()
    return tests.reaches_floor & (touched >= max(1.0, len(counts.tokens) / 2))


def omnibus(tests: Sequence[LatentTests]) -> float:
    """T = Σ_f π_f·turnover_f, π_f the rate of firing in either: latents switched per token; mean over SAEs."""
    return float(np.mean([t.changed_rate.sum() for t in tests]))


def sign_flip_p(differences: Float[Tensor, "seq latent"], seed: int, tolerance: float = 0.0) -> Floats:
    """Two-sided p of Σ_s d_s under independent random signs, per column; 1 for columns with under six non-zeros.

    Where Hoeffding's bound 2·exp(−T²/(2Σd²)) ≤ 1e-5, that bound is the p-value (it is never smaller than the exact
    one). Otherwise (1+#{|T*| ≥ |T|})/(1+R) with R = 2,000 flips, and R = 100,000 fresh ones where those gave p < 0.01.
    """
    p = np.ones(differences.shape[1])
    enough = (differences != 0).sum(0) >= MIN_SEQUENCES
    columns = enough.nonzero()[:, 0]
    if not len(columns):
        return p
    chosen = differences[:, columns].float()
    chosen = chosen[(chosen != 0).any(1)]
    observed = chosen.sum(0).abs() - tolerance * chosen.abs().sum(0)
    bound = 2 * torch.exp(-(observed.double() ** 2) / (2 * (chosen.double() ** 2).sum(0)))
    generator = torch.Generator(device=chosen.device).manual_seed(seed)
    values = bound.clone()
    _fill(values, bound > 1 / SECOND_FLIPS, chosen, observed, FIRST_FLIPS, generator)
    _fill(values, (bound > 1 / SECOND_FLIPS) & (values < 0.01), chosen, observed, SECOND_FLIPS, generator)
    p[columns.cpu().numpy()] = values.cpu().numpy()
    return p


def _fill(
    values: Tensor, where: Tensor, chosen: Tensor, observed: Tensor, flips: int, generator: torch.Generator
) -> None:
    """Set values[where] to their sign-flip p-values."""
    index = where.nonzero()[:, 0]
    if not len(index):
        return
    data, limit = chosen[:, index], observed[index]
    extreme = torch.zeros(len(index), dtype=torch.float64, device=chosen.device)
    for start in range(0, flips, _CHUNK):
        size = (min(_CHUNK, flips - start), len(data))
        coins = torch.randint(0, 2, size, generator=generator, device=chosen.device, dtype=torch.int8)
        signs = coins.mul_(2).sub_(1).to(data.dtype)
        extreme += ((signs @ data).abs() >= limit).sum(0)
    values[index] = (1 + extreme) / (1 + flips)


def _turnover_p(counts: Counts) -> Floats:
    """Exact one-sided binomial p over sequences in which the latent fires in either model."""
    union = counts.before + counts.after - counts.both
    fires = (union > 0).sum(0).cpu().numpy()
    over = ((counts.changed > RELATIVE_FLOOR * union) & (union > 0)).sum(0).cpu().numpy()
    p: Floats = np.asarray(binom.sf(over - 1, np.maximum(fires, 1), 0.5), dtype=np.float64)
    return np.where(fires >= MIN_SEQUENCES, p, 1.0)


def _magnitude_ratio(counts: Counts, before: Floats, after: Floats) -> Floats:
    mass_before, mass_after = _total(counts.mass_before), _total(counts.mass_after)
    fires = (before > 0) & (after > 0) & (mass_before > 0)
    blank = np.full_like(before, np.nan)
    ratio: Floats = np.divide(mass_after * before, mass_before * np.maximum(after, 1), out=blank, where=fires)
    return ratio


def _total(x: Tensor) -> Floats:
    total: Floats = x.double().sum(0).cpu().numpy()
    return total


def energy_distance(
    before: Float[Tensor, "seq latent"], after: Float[Tensor, "seq latent"], seed: int, swaps: int = 999
) -> tuple[float, float]:
    """(E, p): energy distance 2E|X−Y| − E|X−X'| − E|Y−Y'| between sequence means, and its label-swap p-value.

    A backstop (Székely & Rizzo 2013) for a change that no single latent shows; labels are swapped within sequences.
    """
    n = len(before)
    if n < 2 or torch.equal(before, after):
        return 0.0, 1.0
    pooled = torch.cat([before, after]).double()
    distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    generator = torch.Generator(device=pooled.device).manual_seed(seed)
    signs = torch.randint(0, 2, (swaps, n), generator=generator, device=pooled.device).mul(2).sub(1).double()
    signs = torch.cat([torch.ones_like(signs[:1]), signs])
    weights = torch.cat([signs, -signs], dim=1) / n
    values = -((weights @ distances) * weights).sum(1)
    p = float((values[1:] >= values[0] * (1 - 1e-12)).sum() + 1) / (swaps + 1)
    return max(0.0, float(values[0])), p


def resolution(n_sequences: int, n_tokens: int, n_tested: int, loss: float = 0.3) -> dict[str, float]:
    """What the probe size could have shown, at best.

    A latent that changes in m sequences, always the same way, has p = 3·2^(1−m) at the smallest; the first place of
    Benjamini-Hochberg over H tested latents asks for p ≤ 0.05/H. So m* = ⌈1 + log2(3·H/0.05)⌉ changed firings, one a
    sequence, are needed: a rate change of m*/n over n tokens, or a loss of 30 % of a latent with rate m*/(0.3·n).
    Infinite values (too few sequences) are left out.
    """
    needed = float(np.ceil(1 + np.log2(N_TESTS * max(n_tested, 1) / FDR)))
    result = {"sequences": float(n_sequences), "tokens": float(n_tokens), "sequences_needed": needed}
    if needed <= n_sequences and n_tokens:
        result["smallest_rate_change"] = needed / n_tokens
        result["smallest_rate_for_30_percent_loss"] = needed / (loss * n_tokens)
    return result


def switched(counts: Iterable[Counts], latents: Iterable[Bools]) -> float:
    """Firings of the given latents that changed, per token; mean over SAEs."""
    shares = [
        float(c.changed.double().sum(0).cpu().numpy()[chosen].sum()) / max(float(c.tokens.sum()), 1.0)
        for c, chosen in zip(counts, latents, strict=True)
    ]
    return float(np.mean(shares)) if shares else 0.0
