"""Fine-tuning of one layer's rewrite module: the baseline that every editing paper starts from.

FT-M: cross-entropy on the target's tokens only, all of them, each at its own position. With `clamp` it is FT-L's
constraint ‖ΔW‖∞ <= clamp on top (Zhu et al. 2020; the published FT-L also scores every target token at the
prompt's last position, which is not repeated here). The result is a dense delta like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.deltas import Dense, EditDelta, WeightChange, require_linear
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_contexts, require_number
from guardedit.errors import SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import key_hook, patch, record, resume, rewrite_hook
from guardedit.records import EditRequest


@dataclass(frozen=True)
class FinetuneHparams:
    """Settings of the descent."""

    layer: int = 0
    steps: int = 25
    learning_rate: float = 5e-4
    clamp: float | None = None
    """Largest change of any entry; None leaves it free."""
    stop_loss: float = 0.05
    """Stop once the mean negative log-likelihood per target token, in nats, is below this."""
    contexts: tuple[str, ...] = ("",)
    """Prefixes that each prompt is trained behind; the bare prompt "" alone unless more are named."""

    def __post_init__(self) -> None:
        require_number(self, "layer", least=0, whole=True)
        require_number(self, "steps", least=0, whole=True)
        for name in ("learning_rate", "stop_loss"):
            require_number(self, name, least=0)
        if self.clamp is not None:
            require_number(self, "clamp", least=0, above=True)
        require_contexts(self.contexts)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Token rows with everything below the layer computed once."""

    batch: dict[str, Tensor]
    predicts: Tensor
    target_ids: Tensor
    resid_pre: Tensor


def solve_finetune(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    hparams: FinetuneHparams,
    inputs: SolveInputs,
) -> EditDelta:
    """Fine-tune one layer on the requests' prompts; the model is left as it was. Of `inputs` only the
    progress display is used.

    Raises SolveError if the loss stops being a number, BadRequestError for no requests or no such layer.
    """
    require_linear(handle)
    with preserved(handle), torch.enable_grad():
        rows = _rows(handle, requests, hparams.layer, hparams.contexts)
        matrix, losses = _descend(handle, rows, hparams, inputs)
    change = WeightChange(handle.rewrite_parameter(hparams.layer), hparams.layer, Dense(matrix))
    diagnostics: dict[str, float | int | str | bool | None] = {
        "steps": len(losses) - 1,
        "loss_first_nats": losses[0],
        "loss_last_nats": losses[-1],
        "p_new_at_solution": math.exp(-losses[-1]),
    }
    named = {**asdict(hparams), "contexts": "|".join(hparams.contexts), "seed": inputs.seed}
    return EditDelta((change,), "finetune", named, diagnostics)


def _rows(handle: ModelHandle, requests: Sequence[EditRequest], layer: int, contexts: Sequence[str]) -> _Rows:
    prompts = [context + request.filled for request in requests for context in contexts]
    batch = handle.encode_pairs(prompts, [request.target_new for request in requests for _ in contexts])
    predicts = torch.zeros_like(batch["target_mask"])
    predicts[:, :-1] = batch["target_mask"][:, 1:]
    name = f"blocks.{layer}.hook_resid_pre"
    with torch.no_grad(), record(handle, [name], stop=True) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    return _Rows(batch, predicts, batch["input_ids"][batch["target_mask"]], seen[name])


def _loss(handle: ModelHandle, rows: _Rows, layer: int, matrix: Tensor) -> Tensor:
    """Mean negative log-likelihood per target token, in nats, with ΔW = `matrix` (d_out, d_in)."""
    keys: list[Tensor] = []

    def keep(key: Tensor) -> Tensor:
        keys[:] = [key]
        return key

    with (
        resume(handle, layer, rows.resid_pre),
        patch(handle, key_hook(layer), keep),
        patch(handle, rewrite_hook(layer), lambda output: output + Dense(matrix).move(keys[0])),
    ):
        hidden = handle.hidden(rows.batch["input_ids"], rows.batch["attention_mask"])
    logits = handle.logits_at(hidden, rows.predicts).float()
    return torch.nn.functional.cross_entropy(logits, rows.target_ids)


def _descend(
    handle: ModelHandle, rows: _Rows, hparams: FinetuneHparams, inputs: SolveInputs
) -> tuple[Float[Tensor, "d_out d_in"], list[float]]:
    shape = handle.weight(hparams.layer).shape
    matrix = torch.zeros(shape, device=handle.device, requires_grad=True)
    adam = torch.optim.Adam([matrix], lr=hparams.learning_rate)
    losses: list[float] = []
    for step in range(hparams.steps + 1):
        loss = _loss(handle, rows, hparams.layer, matrix)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise SolveError(
                f"the loss at step {step} is {losses[-1]}; lower the learning rate or check the weights"
            )
        inputs.tell(f"fine-tuning: loss {losses[-1]:.2f} nats", step / max(hparams.steps, 1))
        if losses[-1] < hparams.stop_loss or step == hparams.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        if hparams.clamp is not None:
            with torch.no_grad():
                matrix.clamp_(-hparams.clamp, hparams.clamp)
    return matrix.detach(), losses
