"""Prompts and keys around an edit that a request does not name, made by the rules in docs/probes.md.

Deterministic: the same request and the same weights give the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

from guardedit.edits.namesakes import namesakes
from guardedit.models.control import next_tokens
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest, ProbePrompts
from guardedit.risk.proposals import LISTS, proposals
from guardedit.risk.relations import Match, match, stems
from guardedit.risk.stems import article_of, behind, fill, stem_rounds, turns

SPARE = 4
"""Same-subject stems beyond the number asked for, to make up for those that turn out to ask for the edited relation."""


@dataclass(frozen=True)
class ProbeSizes:
    """How many prompts a scope shall have; what the request names is never cut."""

    subject: int = 32
    near: int = 24
    namesake: int = 12
    entailed: int = 4
    target: int = 4


@dataclass(frozen=True)
class NearProbe:
    """A prompt about another subject; `subject` is None where the request named the prompt whole."""

    prompt: str
    subject: str | None


@dataclass(frozen=True)
class NearProbes:
    """All near prompts of one request."""

    probes: tuple[NearProbe, ...]
    origin: str
    """Where their subjects came from."""


@dataclass(frozen=True)
class Probes:
    """All prompts around one request, with the subjects of the near ones."""

    target: tuple[str, ...]
    entailed: tuple[str, ...]
    subject: tuple[str, ...]
    near: tuple[NearProbe, ...]
    origin: str
    """Where the subjects of the near prompts came from."""
    namesake: tuple[str, ...] = ()
    note: str = ""

    def prompts(self) -> ProbePrompts:
        """The record without the subjects."""
        near = tuple(probe.prompt for probe in self.near)
        return ProbePrompts(
            target=self.target, entailed=self.entailed, subject=self.subject, near=near, namesake=self.namesake,
            note=self.note,
        )  # fmt: skip


def generated_probes(
    handle: ModelHandle, request: EditRequest, sizes: ProbeSizes | None = None, seed: int = 0
) -> ProbePrompts:
    """Prompts of every scope: those that the request names, filled up by rule to `sizes`."""
    return probes_around(handle, request, sizes or ProbeSizes(), seed).prompts()


def probes_around(handle: ModelHandle, request: EditRequest, sizes: ProbeSizes, seed: int = 0) -> Probes:
    """As `generated_probes`, with the subject of each near prompt, which its key is taken at."""
    probes = unfiltered_probes(handle, request, sizes, seed)
    with preserved(handle):
        subject = _filled_up(request.same_subject, lambda: _filtered_stems(handle, request), sizes.subject)
    return noted(request, replace(probes, subject=subject))


def unfiltered_probes(
    handle: ModelHandle,
    request: EditRequest,
    sizes: ProbeSizes,
    seed: int = 0,
    near: NearProbes | None = None,
) -> Probes:
    """Probes before the model has been asked which same-subject stems ask for the edited relation: `SPARE` too many.

    `near` is what `near_probes` gave, where that has been asked for already.
    """
    found = match(request)
    near = near or near_probes(handle, request, sizes.near, seed)
    named = (*request.elsewhere, *request.same_subject)
    extra = 0 if len(named) >= sizes.subject else SPARE
    probes = Probes(
        target=(
            request.asked,
            *_filled_up(request.wordings[1:], lambda: _in_context(request), sizes.target - 1),
        ),
        entailed=_filled_up(request.entailed, lambda: _entailed(request, found), sizes.entailed),
        subject=_filled_up(named, lambda: turns(stem_rounds(request)), sizes.subject + extra),
        near=near.probes,
        origin=near.origin,
        namesake=tuple(
            request.prompt.replace("{}", one) for one in namesakes(request.subject)[: sizes.namesake]
        ),
    )
    return noted(request, probes)


def near_probes(handle: ModelHandle, request: EditRequest, n: int, seed: int = 0) -> NearProbes:
    """The near prompts alone."""
    with preserved(handle):
        return _near(handle, request, match(request), n, seed)


def near_probes_of(
    handle: ModelHandle, requests: Sequence[EditRequest], n: int, seed: int = 0
) -> tuple[NearProbes, ...]:
    """The near prompts of many requests. Subjects that the model has to propose are asked for in one go, and fewer of
    them a request: a list of names costs as much as all that the key screen measures beside."""
    if len(requests) == 1:
        return (near_probes(handle, requests[0], n, seed),)
    found = [match(request) for request in requests]
    short = [
        request for request, known in zip(requests, found, strict=True)
        if known is None and len(request.neighborhood) < n
    ]  # fmt: skip
    with preserved(handle):
        lists = max(1, LISTS // max(1, len(short)))
        proposed = dict(
            zip((request.subject for request in short), proposals(handle, short, lists, seed), strict=True)
        )
        return tuple(
            _near(handle, request, known, n, seed, proposed.get(request.subject))
            for request, known in zip(requests, found, strict=True)
        )


def noted(request: EditRequest, probes: Probes) -> Probes:
    """The probes with a note on how many prompts were named and how many made."""
    nothing = "" if probes.entailed else " (none named, and no rule for this relation)"
    note = (
        f"target: {len(probes.target)} prompts, {len(request.wordings)} named; "
        f"entailed: {len(probes.entailed)}, {len(request.entailed)} named{nothing}; "
        f"subject: {len(probes.subject)}, {len(request.elsewhere) + len(request.same_subject)} named; "
        f"near: {len(probes.near)}, {len(request.neighborhood)} named, {probes.origin}; "
        f"namesakes: {len(probes.namesake)}"
    )
    return replace(probes, note=note)


def _filled_up(named: tuple[str, ...], generated: Callable[[], Iterator[str]], n: int) -> tuple[str, ...]:
    """The named prompts, then generated ones that are not among them, up to `n`."""
    if len(named) >= n:
        return named
    seen = dict.fromkeys(named)
    for prompt in generated():
        if len(seen) >= n:
            break
        seen.setdefault(prompt)
    return tuple(seen)


def _in_context(request: EditRequest) -> Iterator[str]:
    """The request's own prompt behind short neutral openings."""
    return (behind(prefix, request.asked, request.subject) for prefix in stems()["contexts"])


def _entailed(request: EditRequest, found: Match | None) -> Iterator[str]:
    rules: dict[str, list[str]] = stems()["entailed"]
    if found is None or found.rule == "objects":  # a guess by objects is too weak to say what follows
        return
    for stem in rules.get(found.relation.name, []):
        yield fill(stem, request.subject, article_of(request), "")


# --- same subject, other relations ---


def _filtered_stems(handle: ModelHandle, request: EditRequest) -> Iterator[str]:
    """Without the stems that ask for the edited relation: those the model answers with the old or the new target."""
    rounds = stem_rounds(request)
    answers = first_tokens(handle, request)
    tops = next_tokens(handle, [variants[0] for variants in rounds])
    return turns([variants for variants, top in zip(rounds, tops, strict=True) if top not in answers])


# --- other subjects, same relation ---


def _near(
    handle: ModelHandle,
    request: EditRequest,
    found: Match | None,
    n: int,
    seed: int,
    proposed: list[str] | None = None,
) -> NearProbes:
    """`proposed` are the model's own subjects where it has been asked for them already."""
    known = (request.prompt, *(found.relation.prompts if found is not None else ()))
    named = tuple(NearProbe(prompt, _subject_in(prompt, known)) for prompt in request.neighborhood)
    if len(named) >= n:
        return NearProbes(named, "none generated")
    if found is not None:
        subjects, wordings = _table_subjects(request, found), found.relation.prompts
        origin = f"relation {found.relation.name!r} by {found.rule}"
    else:
        subjects = proposed if proposed is not None else proposals(handle, [request], LISTS, seed)[0]
        wordings = ()
        origin = f"{len(subjects)} subjects proposed by the model"
    generated = _near_prompts(request, subjects, wordings)
    seen = {probe.prompt: probe for probe in named}
    targets = _about_targets(request)
    room = max(0, n - len(seen) - len(targets))
    fresh = (probe for probe in generated if probe.prompt not in seen)
    for probe in chain(islice(fresh, room), targets):
        if len(seen) < n:
            seen.setdefault(probe.prompt, probe)
    return NearProbes(tuple(seen.values()), origin)


def _subject_in(prompt: str, wordings: Sequence[str]) -> str | None:
    """The subject of a named prompt that is worded as one of `wordings`, else None."""
    for wording in wordings:
        front, back = wording.split("{}")
        inside = prompt[len(front) : len(prompt) - len(back)].strip()
        if inside and prompt.startswith(front) and prompt.endswith(back):
            return inside
    return None


def _table_subjects(request: EditRequest, found: Match) -> list[str]:
    """Subjects of the relation, those with the edit's old object and others in turn, without the edited one."""
    own, old = request.subject.casefold(), (request.target_true or "").strip().casefold()
    others = {
        s: o for s, o in found.relation.pairs.items() if s.casefold() not in own and own not in s.casefold()
    }
    same = [subject for subject, value in others.items() if value.casefold() == old]
    rest = [subject for subject, value in others.items() if value.casefold() != old]
    mixed = chain.from_iterable(zip_longest(same, rest))
    return [subject for subject in mixed if subject is not None]


def _near_prompts(
    request: EditRequest, subjects: Sequence[str], wordings: Sequence[str]
) -> Iterator[NearProbe]:
    """The request's wording for every subject, then the relation's other wordings, then each behind prefixes."""
    prompts = dict.fromkeys([request.prompt, *wordings])
    for prefix in ("", *stems()["prefixes"]):
        for prompt in prompts:
            for subject in subjects:
                text = prompt.replace("{}", subject)
                yield NearProbe(behind(prefix, text, subject) if prefix else text, subject)


def _about_targets(request: EditRequest) -> list[NearProbe]:
    """The old and the new object as subjects: an edit that ties a subject to them may move them too."""
    first, second = stems()["subject"][:2]
    prefix = stems()["prefixes"][0]
    targets = [target.strip() for target in (request.target_true, request.target_new) if target is not None]
    made = [NearProbe(fill(first, target, "", prefix), target) for target in targets]
    return made + [NearProbe(fill(second, target, "", ""), target) for target in targets]


# --- what the model answers ---


def first_tokens(handle: ModelHandle, request: EditRequest) -> frozenset[int]:
    """First tokens of the new target and of the old one, which the model is asked for where it is not named."""
    targets = [target for target in (request.target_new, request.target_true) if target is not None]
    pairs = handle.encode_pairs([request.filled] * len(targets), targets)
    mask = pairs["target_mask"]
    firsts = pairs["input_ids"][mask & (mask.cumsum(1) == 1)].tolist()
    own = next_tokens(handle, [request.filled]) if request.target_true is None else []
    return frozenset([*firsts, *own])
