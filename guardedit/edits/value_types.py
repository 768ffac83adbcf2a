"""Settings and outcome of the optimisation of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from guardedit.edits.settings import require_number
from guardedit.errors import BadRequestError


@dataclass(frozen=True)
class ValueHparams:
    """Settings of the optimisation; names as in the published code's."""

    steps: int = 25
    learning_rate: float = 0.5
    kl_factor: float = 0.0625
    weight_decay: float = 1e-3
    clamp_norm_factor: float = 3.0
    """‖r‖ is at most this many times ‖W k_star‖."""
    stop_loss: float = 0.05
    """Stop once the mean negative log-likelihood per target token, in nats, is below this."""
    kl_prompt: str = "{} is a"
    """What the subject is shall stay; one `{}`, where the subject goes."""
    facts_at_once: int = 16
    """Facts optimised in one batch; more use more memory."""
    warm_contexts: int = 0
    """Descend on this many contexts first, then on all from there on, each for `steps` at most; 0: on all at once."""
    reword: bool = False
    """Also ask with shorter wordings of the prompt, so that the value is not tied to one sentence."""
    keep_texts: int = 0
    """Guarded values: texts about the subject, in the model's own words, that are kept; 0 keeps none, as published."""
    keep_length: int = 10
    """Tokens that the model adds to each of their openings."""
    keep_weight: float = 1.0
    """Weight of the kept texts at the start; see `Keep`."""
    hold_loss: float = 0.1
    """With kept texts: an edit holds while its loss, in nats per target token, is at most this."""

    def __post_init__(self) -> None:
        require_number(self, "steps", least=0, whole=True)
        require_number(self, "facts_at_once", least=1, whole=True)
        require_number(self, "warm_contexts", least=0, whole=True)
        require_number(self, "keep_texts", least=0, whole=True)
        require_number(self, "keep_length", least=1, whole=True)
        for name in ("keep_weight", "hold_loss"):
            require_number(self, name, least=0, above=True)
        require_number(self, "clamp_norm_factor", least=0, above=True)
        for name in ("learning_rate", "kl_factor", "weight_decay", "stop_loss"):
            require_number(self, name, least=0)
        if not isinstance(self.reword, bool):
            raise BadRequestError(f"reword is {self.reword!r}; it must be true or false")
        if not isinstance(self.kl_prompt, str) or self.kl_prompt.count("{}") != 1:
            raise BadRequestError(f"kl_prompt is {self.kl_prompt!r}; it needs exactly one `{{}}`")


@dataclass(frozen=True, eq=False)
class Value:
    """The outcome of one optimisation."""

    residual: Float[Tensor, " d_out"]
    """r = v_star − W k_star, float64."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood of the target, per step, in nats per token."""
    kl_nats: float
    p_new: float
    """Geometric mean probability of a target token at the last step."""
    clamped: bool
    kept_nats: float = 0.0
    """Mean KL(unedited ‖ edited) over the kept texts at the residual; 0 without any."""
    keep_weight: float = 0.0
    """Weight of the kept texts when it was found; 0 without any."""


@dataclass(frozen=True)
class Keep:
    """Texts about each request's subject whose next tokens shall stay, as far as the edit holds all the same.

    Minimise the mean KL on the texts subject to (target's NLL) <= `hold_loss`, by dual ascent: after each step a fact's
    weight on its texts grows by `rate` where its edit holds and shrinks where it does not. The value is the residual
    with the smallest KL among those that hold (where none does, the one with the smallest NLL).
    """

    texts: tuple[tuple[str, ...], ...]
    """Per request; each text contains the subject."""
    weight: float = 1.0
    """At the start, in nats of target likelihood per nat of KL(unedited ‖ edited)."""
    hold_loss: float = 0.1
    """An edit holds while its mean negative log-likelihood per target token, in nats, is at most this."""
    rate: float = 0.2
    patience: int = 8
    """Stop a fact that holds and has not got better for this many steps."""


Told = Callable[[int, float], None]
"""Called with the step and the mean loss of the facts that are still in it."""
