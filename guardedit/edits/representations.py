"""What a model makes of a subject and of an object, read off the residual stream: REMEDI's two representations.

Hernandez, Li, Andreas 2023, "Inspecting and Editing Knowledge Representations in Language Models"
(https://arxiv.org/abs/2304.00740), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.keys import last_token_of, subject_span
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import record
from guardedit.records import EditRequest

Claim = tuple[EditRequest, str]
"""A request, and the object that its prompt is completed with: the new one, the old one, or any other."""


@dataclass(frozen=True, eq=False)
class Representations:
    """Rows in the order of the claims, float32."""

    entity: Float[Tensor, "n d_model"]
    """Hidden state at the subject's last token of the bare prompt."""
    attribute: Float[Tensor, "n d_model"]
    """Mean hidden state of the object's tokens in the sentence "prompt object"."""

    def select(self, rows: Tensor) -> Representations:
        """Some of the claims, by their indices or a mask."""
        return Representations(self.entity[rows], self.attribute[rows])

    def together(self) -> Float[Tensor, "n two_d_model"]:
        """Entity and attribute side by side."""
        return torch.cat([self.entity, self.attribute], 1)


def represent(
    handle: ModelHandle, claims: Sequence[Claim], hook_name: str, batch_size: int = 64
) -> Representations:
    """Both representations of every claim at a hook of the residual stream; the model is left as it was.

    Raises BadRequestError for no claims, or a subject or object without a token of its own.
    """
    if not claims:
        raise BadRequestError("no claims to represent; give at least one request with its object")
    order = sorted(range(len(claims)), key=lambda i: (len(claims[i][0].filled) + len(claims[i][1]), i))
    entity, attribute = (torch.empty(len(claims), handle.d_model, device=handle.device) for _ in range(2))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        rows = torch.tensor(chunk, device=handle.device)
        entity[rows], attribute[rows] = _of_batch(handle, [claims[i] for i in chunk], hook_name)
    return Representations(entity, attribute)


def _of_batch(
    handle: ModelHandle, claims: Sequence[Claim], hook_name: str
) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
    batch = handle.encode_pairs([request.filled for request, _ in claims], [target for _, target in claims])
    spans = [subject_span(request) for request, _ in claims]
    at = last_token_of(batch["offsets"], batch["attention_mask"], spans)
    with torch.no_grad(), preserved(handle), record(handle, [hook_name], stop=True) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    states, mask = seen[hook_name].float(), batch["target_mask"]
    weights = mask.to(states) / mask.sum(1, keepdim=True)
    return states[torch.arange(len(claims)), at], (states * weights[..., None]).sum(1)
