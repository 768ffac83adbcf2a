"""REMEDI's map for a model: split the facts, train, measure on held-out facts, put it into the kit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guardedit.config import cache_folder
from guardedit.edits import remedi_quality as quality
from guardedit.edits.remedi_map import MapCard, RemediMap, halved, save_map, tensor_bytes
from guardedit.edits.remedi_rows import RowSettings, rows_of
from guardedit.edits.remedi_training import RemediTraining, Split, Told, Trained, split_facts, train_map
from guardedit.edits.representations import represent
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.kit import KIT_FILE, MAPS, kit_folder, read_kit, write_kit
from guardedit.pipeline.workspace import versions
from guardedit.records import EditRequest, digest_of, digest_of_bytes


def train_remedi(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    settings: RemediTraining,
    *,
    data_name: str,
    out: Path | None = None,
    told: Told | None = None,
) -> RemediMap:
    """Train a map on facts with old targets and save it, with its card, where `plan --editor remedi` looks for it.

    `out` is another folder to put the map's own folder in; the kit is then left alone. May be interrupted: a second
    call goes on from the checkpoint. Facts that cannot be used are left out (see `usable`). Raises BadRequestError for
    too few facts, or a model without a kit where no `out` is named; SolveError where training diverges.
    """
    folder = (out or _kit_of(handle) / MAPS) / settings.hook_name
    facts = split_facts(usable(handle, requests), settings.held_out, settings.seed)
    key = digest_of([handle.digest(), facts.digest, asdict(settings)])[7:23]
    state = cache_folder() / MAPS / key
    trained = train_map(handle, facts, settings, state, told)
    made = save_map(folder, *_rounded(trained), card_of(handle, facts, settings, trained, data_name))
    if out is None:
        _into_kit(handle, settings.layer)
    return made


def usable(handle: ModelHandle, requests: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """The facts that have an old target, and whose subject and targets share no token in any wording."""

    def fits(request: EditRequest) -> bool:
        try:
            rows_of(handle, [request], RowSettings())
        except BadRequestError:
            return False
        return True

    return tuple(request for request in requests if fits(request))


def card_of(
    handle: ModelHandle, facts: Split, settings: RemediTraining, trained: Trained, data_name: str
) -> MapCard:
    """The card, with figures of the map as it is stored, on the facts that were held out."""
    weight, bias = _rounded(trained)
    held, seed = facts.held_out, settings.seed
    found = represent(handle, [(request, request.target_new) for request in held], settings.hook_name)
    asked = quality.ask(handle, held, found.together() @ weight.T + bias, settings.hook_name)
    plain: dict[str, Any] = asdict(settings)
    return MapCard(
        hook_name=settings.hook_name,
        model_name=handle.name,
        model_digest=handle.digest(),
        d_model=handle.d_model,
        tensors_digest=digest_of_bytes(tensor_bytes(weight, bias)),
        data_name=data_name,
        data_digest=facts.digest,
        n_train=len(facts.train),
        n_held_out=len(held),
        seed=seed,
        settings={**plain, "prefixes": "|".join(settings.prefixes)},
        epochs=len(trained.losses) - 1,
        best_epoch=trained.best_epoch,
        held_out_loss=trained.losses,
        efficacy=quality.efficacy(asked, seed),
        paraphrase=quality.paraphrase(asked, seed),
        p_new=quality.p_new(asked, seed),
        kept_kl_nats=quality.kept(asked, seed),
        resamples=quality.RESAMPLES,
        created_with=versions(),
    )


def _rounded(trained: Trained) -> tuple[Any, Any]:
    return halved(trained.weight, trained.bias)


def _kit_of(handle: ModelHandle) -> Path:
    folder = kit_folder(handle.name)
    if not (folder / KIT_FILE).is_file():
        raise BadRequestError(
            f"{handle.name} has no kit that the map could be put into; make one with `guardedit stats collect` first, "
            "or name a folder with --out"
        )
    return folder


def _into_kit(handle: ModelHandle, layer: int) -> None:
    """Seal the kit again over the new map, and let plans take it."""
    folder = kit_folder(handle.name)
    known = read_kit(folder / KIT_FILE)
    write_kit(folder, layer=known["layer"], hparams={**known["hparams"], "remedi": {"layer": layer}})
