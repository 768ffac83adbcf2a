"""What is written down about an autoencoder: its quality card and the labels of its latents. No torch here."""

from __future__ import annotations

from pydantic import Field

from guardedit.records import Digest, Record


class Aim(Record):
    """One figure that the card was asked to reach."""

    name: str
    op: str
    limit: float
    value: float | None
    met: bool


class QualityCard(Record):
    """How good an autoencoder is, on text it was not trained on; outlier tokens and position 0 are left out."""

    hook_name: str
    model_name: str
    d_in: int
    d_sae: int
    data_digest: Digest
    """Over the rows of tokens it was trained on."""
    mix: dict[str, float]
    """Share of the training tokens by domain."""
    tokens: int
    """Distinct training tokens."""
    samples: int
    """Tokens seen in training; more than `tokens` means several epochs."""
    held_out_tokens: int
    held_out_digest: Digest
    l0: float
    """Mean number of active latents a token, held-out text of the training domains."""
    explained_variance: dict[str, float]
    """1 - sum|x - x_hat|^2 / sum|x - mean|^2 by domain; "all" pools the training domains, "unseen" the others."""
    unseen_domains: tuple[str, ...] = ()
    ce_loss_recovered: float | None = None
    """(CE mean-ablated - CE spliced) / (CE mean-ablated - CE original) on held-out rows."""
    ce_nats: dict[str, float] = {}
    """"original", "spliced", "mean_ablated", in nats a token."""
    ce_rows: int = 0
    dead_share: float
    """Latents that fire on none of `statistics_tokens` training tokens."""
    dense_share: float
    """Latents that fire on more than 10 % of them."""
    statistics_tokens: int
    controls: dict[str, float]
    """Explained variance ("all") of "pca" with as many components as L0 and of "frozen_decoder"."""
    controls_note: str = ""
    leakage_share_explained: float | None = None
    """Median over facts of E[p(x_hat) p(x)] / E[p(x)^2]; key space only. See `quality.leakage_share`."""
    leakage_variance_explained: float | None = None
    """Median over facts of 1 - E[(p(x) - p(x_hat))^2] / E[p(x)^2]; key space only."""
    leakage_facts: int = 0
    threshold_rule: str
    """"global" or "per-latent"."""
    settings: dict[str, float | int | str | bool] = {}
    seed: int
    created_with: dict[str, str]
    """Versions of guardedit, sae-lens, torch."""
    upstream_digest: Digest
    """Of the parameters that the activations depend on."""
    aims: tuple[Aim, ...] = ()
    remarks: tuple[str, ...] = ()


class LatentLabel(Record):
    """One latent in words."""

    label: str
    """Its most characteristic tokens, from training text, e.g. "`import`, `def`"."""
    examples: tuple[str, ...] = ()
    """Contexts with the token in ‹›; only text sampled from the model or read from the Python standard library."""


class Labels(Record):
    """Labels of all latents, by number."""

    hook_name: str
    latents: tuple[LatentLabel, ...] = Field(repr=False)
    source: str = ""
    """Where the examples come from."""

    def __getitem__(self, latent: int) -> LatentLabel:
        return self.latents[latent]
