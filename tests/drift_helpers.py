"""Hand-made autoencoders, probes and deltas for the monitor's tests."""

from __future__ import annotations

import torch

from guardedit.drift.probes import ProbeSet, build_probes
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, ProbePrompts
from guardedit.saes.cards import Labels, LatentLabel, QualityCard
from guardedit.saes.checkpoints import Sae

LAYER = 1
REQUEST = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new="Rome",
    target_true="Paris",
    paraphrases=("People who visit the Eiffel Tower go to", "You can find the Eiffel Tower in"),
)
CITIES = ("Paris", "Rome", "Berlin", "London", "Madrid", "Lisbon", "Warsaw", "Vienna", "Oslo", "Athens")
PROMPTS = ProbePrompts(
    target=("Where is the Eiffel Tower? It is in",),
    entailed=("The country of the Eiffel Tower is",),
    subject=tuple(f"{start} Eiffel Tower {rest}" for start in ("The", "Our", "That", "One")
                  for rest in ("was built by", "is made of", "is known for")),
    near=tuple(f"{start} {city} {rest}" for city in CITIES for start, rest in
               (("The centre of", "is located in the country of"), ("A tower in", "is named"))),
    note="written for tests",
)  # fmt: skip
FAR = {
    "prose": [f"{city} is a city in Europe, and the trains from {other} to {city} are slow today. " * 8
              for city in CITIES[:6] for other in CITIES[6:8]],
    "python": [f"def add_{i}(left, right):\n    return left + right * {i}\n" * 8 for i in range(10)],
}  # fmt: skip


def make_sae(hook_name: str, d_in: int = 32, d_sae: int = 48, seed: int = 0, threshold: float = 0.4) -> Sae:
    """A random JumpReLU dictionary with unit rows, its encoder the transposed decoder."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    labels = Labels(
        hook_name=hook_name, latents=tuple(LatentLabel(label=f"concept {i}") for i in range(d_sae))
    )
    return Sae(
        hook_name=hook_name, d_in=d_in, d_sae=d_sae, W_enc=rows.T.contiguous(), b_enc=torch.zeros(d_sae), W_dec=rows,
        b_dec=torch.zeros(d_in), threshold=torch.full((d_sae,), threshold), energy=torch.ones(d_sae),
        firing_rate=torch.full((d_sae,), 0.1), digest="sha256:" + f"{seed:x}" * 64,
        card=QualityCard.model_construct(hook_name=hook_name), labels=labels,
    )  # fmt: skip


def make_saes(layer: int = LAYER) -> dict[str, Sae]:
    """Watchers at the MLP output of the layer and one block above."""
    names = (f"blocks.{layer}.hook_mlp_out", f"blocks.{layer + 1}.hook_resid_post")
    return {name: make_sae(name, seed=index) for index, name in enumerate(names)}


def make_probes(handle: ModelHandle, far_tokens: int = 3000) -> ProbeSet:
    """Some 20 rows of control text, 12 subject and 20 near prompts."""
    return build_probes(handle, [REQUEST], [PROMPTS], far_tokens=far_tokens, far_texts=FAR)


def make_delta(handle: ModelHandle, size: float, layer: int = LAYER, seed: int = 0) -> EditDelta:
    """A random rank-one update with ‖ΔW‖ = size·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    weight = handle.weight(layer)
    left = torch.randn(weight.shape[0], 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, weight.shape[1], generator=generator, dtype=torch.float64)
    left *= size * weight.detach().double().norm() / (left.norm() * right.norm())
    change = WeightChange(handle.rewrite_parameter(layer), layer, LowRank(left, right))
    return EditDelta((change,), "test", {}, {})
