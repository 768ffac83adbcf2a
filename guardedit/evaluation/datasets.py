"""Evaluate a method on a data file with the kit of a workspace: what `guardedit evaluate DATASET` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from guardedit.editors import EDITORS
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.value_shelf import ValueShelf
from guardedit.errors import BadRequestError
from guardedit.evaluation.ability import ITEMS, battery, measure
from guardedit.evaluation.bootstrap import Estimate
from guardedit.evaluation.cases import CaseSet
from guardedit.evaluation.extras import WholeModel, extras_named, filled
from guardedit.evaluation.far import FAR_TOKENS, FarText
from guardedit.evaluation.filling import with_old_answers
from guardedit.evaluation.measuring import as_it_is
from guardedit.evaluation.methods import IN_CONTEXT, Solve, state_in_context
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.readers import choose, read_cases, with_neighbours
from guardedit.evaluation.run import Job, Progress, Selection, evaluate, select
from guardedit.evaluation.summary import Evaluation, Point, item_figures
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest, digest_of_bytes


@dataclass(frozen=True)
class Asking:
    """What is looked at beside the record's own prompts."""

    extras: tuple[str, ...] = ()
    """Names of `guardedit.evaluation.extras.EXTRAS`, or "all"."""
    far_tokens: int = FAR_TOKENS
    ability_items: int = ITEMS
    blimp: Path | None = None
    """Minimal pairs, for `ability`."""
    text: Path | None = None
    """Held-out text, for `ability`."""

    def whole(self, handle: ModelHandle, extras: Sequence[str], seed: int) -> WholeModel | None:
        """What is measured of the model as a whole; None for nothing."""
        far = FarText.of(handle, self.far_tokens, seed) if "far" in extras else None
        asked = None
        if "ability" in extras:
            asked = battery(handle, n=self.ability_items, seed=seed, blimp=self.blimp, text=self.text)
        return WholeModel(handle, far, asked) if far or asked else None

    def about(self, whole: WholeModel | None) -> dict[str, Any]:
        """What the figures of the whole model rest on."""
        found: dict[str, Any] = {}
        if whole is not None and whole.far_text is not None:
            found["far_text_digest"] = whole.far_text.rows.digest
        if whole is not None and whole.battery is not None:
            files = {"minimal_pairs": self.blimp, "held_out_text": self.text}
            named = {name: digest_of_bytes(path.read_bytes()) for name, path in files.items() if path}
            found["ability"] = {"items": self.ability_items, **named}
        return found


def evaluate_dataset(
    workspace: Workspace,
    path: Path,
    *,
    editor: str = "rome",
    limit: int | None = 100,
    seed: int = 0,
    known_only: bool = False,
    split: str | None = None,
    variants: tuple[str, ...] = ("raw",),
    neighbours: int = 0,
    protocols: Sequence[Protocol] = (Protocol(),),
    asking: Asking | None = None,
    hparams: Mapping[str, Any] | None = None,
    state: Path | None = None,
    values: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Edit `limit` cases of the file on the workspace's live model, alone unless `protocols` say otherwise; the model
    is left as it was.

    Of several protocols (batches of 1, 10, 100) the last one gives the figures, and all of them the curve.

    `seed` decides which cases are drawn, the editor's sampling and the bootstrap. `neighbours` fills each case's
    neighborhood up to that number from the same split (see `with_neighbours`). `state` makes the run resumable;
    `values` is a folder in which the values of locate-then-edit editors are kept and looked for (`ValueShelf`).
    `editor` is one of EDITORS, or "in-context" for the baseline that edits nothing and states the facts in every
    prompt. Nothing goes into the ledger: no version is staged.
    """
    handle, asking = workspace.handle, asking or Asking()
    extras = extras_named(asking.extras)
    job = method(workspace, editor, seed, hparams, values)
    case_set = read_cases(path, split)
    chosen = select(
        handle, choose(case_set.cases, seed), limit=limit, known_only=known_only, progress=progress
    )
    chosen = _prepared(handle, chosen, case_set, neighbours, seed, extras, progress)
    whole = asking.whole(handle, extras, seed)
    job = replace(
        job,
        dataset=case_set.name if split is None else f"{case_set.name}, split {split}",
        dataset_digest=case_set.digest,
        variants=variants,
        extras=extras,
        whole=whole,
        whole_about=asking.about(whole),
    )
    found = _under(handle, chosen, job, protocols, state, progress)
    extra = {"known_only": known_only, "neighbours": neighbours, "left_out": len(case_set.left_out)}
    return found.model_copy(update={"about": {**found.about, **extra}})


def _under(
    handle: ModelHandle,
    chosen: Selection,
    job: Job,
    protocols: Sequence[Protocol],
    state: Path | None,
    progress: Progress | None,
) -> Evaluation:
    """The last protocol's outcome, with every protocol's points on its curve."""
    if not protocols:
        raise BadRequestError("no protocol was named: give one, for example Protocol(batch=10)")
    points: dict[int, Point] = {}
    for protocol in protocols:
        own = (
            state
            if state is None or len(protocols) == 1
            else state.with_name(f"{protocol.name}-{state.name}")
        )
        found = evaluate(handle, chosen, replace(job, protocol=protocol), state=own, progress=progress)
        points |= {point.edits: point for point in found.curve}
    return found.model_copy(update={"curve": tuple(points[edits] for edits in sorted(points))})


def measure_ability(workspace: Workspace, asking: Asking, seed: int = 0) -> dict[str, Estimate | None]:
    """Arithmetic, syllogisms, minimal pairs, held-out text on the live model, edited or not; intervals over items."""
    asked = battery(workspace.handle, n=asking.ability_items, seed=seed, blimp=asking.blimp, text=asking.text)
    return item_figures(measure(workspace.handle, asked, as_it_is), seed)


def _prepared(
    handle: ModelHandle,
    chosen: Selection,
    case_set: CaseSet,
    neighbours: int,
    seed: int,
    extras: Sequence[str],
    progress: Progress | None,
) -> Selection:
    """The chosen cases with everything filled in that their records leave open."""
    cases = with_old_answers(handle, chosen.cases)
    if neighbours:
        # From the same split only: another split's facts are not to be looked at, not even as neighbours.
        cases = with_neighbours(cases, neighbours, case_set.cases, seed)
    return replace(chosen, cases=tuple(filled(handle, cases, extras, progress)))


def method(
    workspace: Workspace,
    editor: str,
    seed: int = 0,
    hparams: Mapping[str, Any] | None = None,
    values: Path | None = None,
) -> Job:
    """The named method with the kit's settings, or `hparams` over them, bound; see `evaluate_dataset`."""
    if editor == IN_CONTEXT:
        if hparams:
            raise BadRequestError(f"{IN_CONTEXT} has no settings; it edits nothing")
        return Job(editor=editor, solve=state_in_context, seed=seed, joint=True)
    settings = with_contexts(workspace.handle, workspace.kit.settings(editor, hparams), seed)
    shelf = ValueShelf(values) if values is not None else None
    kit = workspace.kit
    inputs = SolveInputs(kit.second_moments, seed, kit.saes, values=shelf, maps=kit.maps)
    return Job(
        editor=editor,
        solve=bind(editor, settings, inputs),
        hparams=plain(settings),
        seed=seed,
        joint=EDITORS[editor].joint,
        solve_after=lambda earlier: bind(editor, settings, replace(inputs, earlier=earlier)),
    )


def bind(editor: str, settings: Any, inputs: SolveInputs) -> Solve:
    """The editor with everything but model and requests fixed."""

    def solve(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        return EDITORS[editor].solve(handle, requests, settings, inputs)

    return solve


def with_contexts(handle: ModelHandle, settings: Any, seed: int) -> Any:
    """The settings with their sampled prefixes filled in, where the editor uses any: sampled once, not once a case."""
    if getattr(settings, "contexts", None) != () or not hasattr(settings, "n_prefixes"):
        return settings
    return replace(settings, contexts=sample_contexts(handle, settings.n_prefixes, seed))


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain JSON values, for the record."""
    if not is_dataclass(settings) or isinstance(settings, type):
        return {}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
    }
