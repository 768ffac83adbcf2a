"""LoRA (Hu et al. 2021) by `peft`: low-rank adapters on attention and MLP, exported as a delta of the weights.

The adapters are trained on a copy of the model, since peft rewires the model that it is given, and merged on paper:
ΔW = (alpha / rank)·B·A is a low-rank change like any other, and no adapter is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guardedit.edits.deltas import EditDelta, LowRank, WeightChange, change_of
from guardedit.edits.descent import DescentHparams, descend, diagnostics_of, plain_of, trainable_twin
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_number
from guardedit.edits.targets import parts_of, target_rows
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest

PARTS = ("attention", "mlp")
"""Parts of a block that may get adapters; where they lie is the architecture row's to say."""


@dataclass(frozen=True)
class LoraHparams(DescentHparams):
    """Size and place of the adapters."""

    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    """ΔW = (alpha / rank)·B·A."""
    targets: tuple[str, ...] = PARTS
    """Parts of a block whose linear maps get an adapter each."""
    layers: tuple[int, ...] = ()
    """Blocks that get adapters; all of them when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "rank", least=1, whole=True)
        require_number(self, "alpha", least=1, whole=True)
        if not isinstance(self.targets, tuple) or not self.targets or not {*self.targets} <= {*PARTS}:
            raise BadRequestError(f"targets are {self.targets!r}; name some of {', '.join(PARTS)}")
        if not isinstance(self.layers, tuple) or not all(type(n) is int and n >= 0 for n in self.layers):
            raise BadRequestError(f"layers are {self.layers!r}; they must be whole numbers, or none for all")


def solve_lora(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: LoraHparams, inputs: SolveInputs
) -> EditDelta:
    """Train adapters on the requests' prompts, all of them together, and export them; the model is left as it was.

    Raises SolveError if the loss stops being a number, BadRequestError for no requests or no such layer.
    """
    with preserved(handle), torch.enable_grad():
        twin, losses = trained_twin(handle, requests, hparams, inputs)
        changes = tuple(exported(handle, twin))
    return EditDelta(changes, "lora", plain_of(hparams, inputs.seed), diagnostics_of(losses))


def trained_twin(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: LoraHparams, inputs: SolveInputs
) -> tuple[ModelHandle, list[float]]:
    """A copy of the model with trained adapters in it, and the losses; call it inside `preserved`."""
    from peft import LoraConfig, inject_adapter_in_model

    batches, names = target_rows(handle, requests, hparams.contexts), target_modules(handle, hparams)
    twin = trainable_twin(handle)
    # The adapters' first values are drawn here.
    torch.manual_seed(inputs.seed)
    config = LoraConfig(
        r=hparams.rank,
        lora_alpha=hparams.alpha,
        target_modules=names,
        fan_in_fan_out=handle.architecture.transposed,
    )
    inject_adapter_in_model(config, twin.model)
    twin.model.eval()
    trained = [parameter for parameter in twin.model.parameters() if parameter.requires_grad]
    return twin, descend(trained, parts_of(twin, batches), hparams, inputs)


def target_modules(handle: ModelHandle, hparams: LoraHparams) -> list[str]:
    """Full names of the linear maps under the named parts of the blocks.

    Raises BadRequestError for a layer that the model does not have.
    """
    row = handle.architecture
    paths = {"attention": row.attention, "mlp": row.mlp}
    return [
        f"{row.layers}.{layer}.{paths[part]}{inside and '.'}{inside}"
        for layer in hparams.layers or range(handle.n_layers)
        for part in hparams.targets
        for inside, module in handle.block(layer).get_submodule(paths[part]).named_modules()
        if _is_linear(module)
    ]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def exported(handle: ModelHandle, twin: ModelHandle) -> Iterator[WeightChange]:
    """ΔW = scale·B·A of every adapter that learnt anything."""
    from peft.tuners.lora import LoraLayer

    for name, module in twin.model.named_modules():
        if isinstance(module, LoraLayer):
            update = _low_rank(module)
            if bool(update.left.any()):
                yield change_of(handle, f"{name}.weight", update)


def _low_rank(module: Any) -> LowRank:
    (adapter,) = module.active_adapters
    left, right = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    return LowRank(module.scaling[adapter] * left.detach().double(), right.detach().double())
