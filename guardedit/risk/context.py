"""Everything the scores of one layer are measured with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import MissingStatisticsError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment
from guardedit.risk.banks import KeyBank
from guardedit.risk.neighbours import ProbeSizes
from guardedit.saes.checkpoints import Sae

_RECONSTRUCTED = 1000
"""Bank keys that the SAE reconstructs: enough for a mean, and half a second of work."""


@dataclass(frozen=True)
class RiskContext:
    """Model, statistics, SAEs and banks for edits of one layer. Build it once and measure many edits with it."""

    handle: ModelHandle
    layer: int
    second_moment: SecondMoment | None
    """None: scores that need it have no value."""
    key_sae: Sae | None
    """On the layer's key space; None: scores that need it have no value."""
    mlp_sae: Sae | None
    """On the layer's MLP output. No score uses it yet."""
    bank: KeyBank
    protected: KeyBank
    seed: int = 0
    contexts: tuple[str, ...] = ("",)
    """Prefixes that the key is averaged over: the editor's own."""
    sizes: ProbeSizes = field(default_factory=ProbeSizes)
    remarks: tuple[str, ...] = ()
    """What a reader of scores measured with this must know; joins the report's notes."""

    def __post_init__(self) -> None:
        """Refuse statistics of another hook or width; whether they belong to these weights is checked on loading."""
        hook, width = key_hook(self.layer), self.handle.d_in(self.layer)
        parts = {"key bank": (hook, self.bank.keys.shape[1])}
        parts["protected bank"] = (hook, self.protected.keys.shape[1])
        if self.second_moment is not None:
            parts["second moment"] = (self.second_moment.hook_name, self.second_moment.width)
        if self.key_sae is not None:
            parts["key-space SAE"] = (self.key_sae.hook_name, self.key_sae.d_in)
        for name, found in parts.items():
            if found != (hook, width):
                raise StatisticsMismatchError(
                    f"the {name} is of {found}, layer {self.layer} needs {(hook, width)}"
                )

    @property
    def need_second_moment(self) -> SecondMoment:
        """The second moment; raises MissingStatisticsError where there is none."""
        if self.second_moment is None:
            raise MissingStatisticsError(
                f"no second moment of layer {self.layer}: guardedit stats collect --layer {self.layer}"
            )
        return self.second_moment

    @property
    def need_key_sae(self) -> Sae:
        """The key-space SAE; raises MissingStatisticsError where there is none."""
        if self.key_sae is None:
            raise MissingStatisticsError(
                f"no SAE on the key space of layer {self.layer}: guardedit sae train"
            )
        return self.key_sae

    @cached_property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W, float32."""
        weight: Tensor = self.handle.weight(self.layer).detach().float().cpu()
        return weight

    @cached_property
    def output_energy(self) -> float:
        """tr(W C Wᵀ) = E‖W x‖²: the mean-square output of the unedited module, the yardstick of every move."""
        weight = self.weight.double()
        return float(((weight @ self.need_second_moment.matrix.cpu()) * weight).sum())

    @cached_property
    def neuron_latents(self) -> Float[Tensor, " d_in"]:
        """Effective number of latents per neuron: participation ratio over f of E[a_f²]·W_dec[f, n]².

        Squared, since |W_dec| saturates. Range 1 to d_sae.
        """
        sae = self.need_key_sae
        shares = sae.energy.double().cpu()[:, None] * sae.W_dec.double().cpu() ** 2
        return participation(shares)

    @cached_property
    def neuron_domains(self) -> Float[Tensor, " d_in"]:
        """Effective number of text domains per neuron: exp entropy over domains of its mean-square activation."""
        names = sorted(set(self.bank.domains))
        energy = torch.stack([self.bank.of_domain(name).double().pow(2).mean(0) for name in names])
        return entropy_count(energy)

    @property
    def sampled_keys(self) -> Float[Tensor, "n d_in"]:
        """Evenly spaced bank keys."""
        step = max(1, len(self.bank.keys) // _RECONSTRUCTED)
        return self.bank.keys[::step][:_RECONSTRUCTED]

    @cached_property
    def reconstructed(self) -> Float[Tensor, "n d_in"]:
        """What the key-space SAE makes of the sampled keys."""
        with torch.no_grad():
            return self.need_key_sae.reconstruct(self.sampled_keys).float().cpu()

    def label_of(self, latent: int) -> tuple[str, tuple[str, ...]]:
        """What a latent of the key-space SAE fires on: its label and a few examples."""
        label = self.need_key_sae.labels.latents[latent]
        return label.label, label.examples


def participation(weights: Tensor) -> Tensor:
    """Participation ratio (Σw)² / Σw² over dimension 0: 1 (one weight has all) to n (all are equal); NaN for zeros."""
    return weights.sum(0) ** 2 / (weights**2).sum(0)


def entropy_count(weights: Tensor) -> Tensor:
    """exp of the entropy of the shares over dimension 0: 1 (one weight has all) to n (all are equal); NaN for zeros."""
    shares = weights / weights.sum(0)
    entropy: Tensor = torch.special.entr(shares).sum(0)
    return entropy.exp()
