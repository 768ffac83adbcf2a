"""Settings and outcome of the optimisation of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from guardedit.edits.openings import OPENINGS
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
    keep_openings: int = 0
    """Guarded values: openings about the subject whose answers are kept, 12 at most; 0 keeps none, as published."""
    keep_turns: int = 3
    """In each step every so many-th of them is kept, in turn."""
    keep_weight: float = 4.0
    """Of their mean KL(unedited ‖ edited)."""
    keep_contrast: float = 0.5
    """Of the margin by which the new target shall beat the old one behind them."""
    hold_loss: float = 0.7
    """With kept openings: an edit holds once its loss, in nats per target token, is at most this."""
    margin: float = 3.0
    """With kept openings: nats by which the new target shall be likelier than the old one in every wording."""

    def __post_init__(self) -> None:
        require_number(self, "steps", least=0, whole=True)
        require_number(self, "facts_at_once", least=1, whole=True)
        require_number(self, "warm_contexts", least=0, whole=True)
        require_number(self, "keep_openings", least=0, whole=True)
        if self.keep_openings > len(OPENINGS):
            raise BadRequestError(
                f"keep_openings is {self.keep_openings}; there are {len(OPENINGS)} openings to keep, so 0 to "
                f"{len(OPENINGS)} are allowed"
            )
        require_number(self, "keep_turns", least=1, whole=True)
        for name in ("keep_weight", "keep_contrast", "hold_loss", "margin"):
            require_number(self, name, least=0)
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
    """Mean KL(unedited ‖ edited) behind the kept openings at the residual; 0 without any."""
    keep_weight: float = 0.0
    """Their weight; 0 without any."""


Told = Callable[[int, float], None]
"""Called with the step and the mean loss of the facts that are still in it."""
