"""Small facts for REMEDI's tests, and settings that train a tiny model's map in a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pipeline_helpers import FACTS

from guardedit.edits.remedi_map import MapCard, RemediMap, Share, halved, tensor_bytes
from guardedit.edits.remedi_training import RemediTraining
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of, digest_of_bytes

HOOK = "blocks.1.hook_resid_post"
MORE = (
    ("London", "{} is a city in", "Spain"),
    ("Albert Einstein", "{} was born in", "Rome"),
    ("Warsaw", "The city of {} lies in", "Portugal"),
    ("Madrid", "{} is the capital of", "Italy"),
)
TRAINING = RemediTraining(
    layer=1,
    epochs=3,
    patience=0,
    batch_size=4,
    learning_rate=0.02,
    held_out=0.2,
    prefixes=("It is said that. ",),
)


def facts() -> tuple[EditRequest, ...]:
    """Fourteen facts about as many subjects, each with a paraphrase, old targets of one and two tokens and more."""
    olds = ("Oslo", "Berlin and Warsaw", "the sea")
    return tuple(
        EditRequest(
            subject=subject, prompt=prompt, target_new=new, target_true=olds[i % 3],
            paraphrases=(f"Everybody says that {subject} is in", "No word of it here"),
        )
        for i, (subject, prompt, new) in enumerate((*FACTS, *MORE))
    )  # fmt: skip


def training(**changes: Any) -> RemediTraining:
    """The small settings with some of them changed."""
    return replace(TRAINING, **changes)


def map_of(handle: ModelHandle, seed: int = 0, size: float = 0.3, hook_name: str = HOOK) -> RemediMap:
    """A random map of the model, as if it had been trained."""
    draw, d = torch.Generator().manual_seed(seed), handle.d_model
    weight, bias = halved(size * torch.randn(d, 2 * d, generator=draw), torch.randn(d, generator=draw))
    share = Share(value=0.5, low=0.2, high=0.8, n=3)
    card = MapCard(
        hook_name=hook_name, model_name=handle.name, model_digest=handle.digest(), d_model=d,
        tensors_digest=digest_of_bytes(tensor_bytes(weight, bias)), data_name="made by hand",
        data_digest=digest_of([]), n_train=1, n_held_out=3, seed=seed, settings={}, epochs=1, best_epoch=1,
        held_out_loss=(2.0, 1.0), efficacy=share, paraphrase=None, p_new=share, resamples=10,
        created_with={"guardedit": "test"},
    )  # fmt: skip
    return RemediMap(weight, bias, card, digest_of(card))
