"""What the published optimisation of values measures, for many facts at once.

A row is a context with prompt and target (how likely is the new target?), or the KL prompt (what is said right after
the bare subject).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.edits.keys import last_token_of, subject_span
from guardedit.edits.rowset import Row, RowSet, make_rowset
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import encode_pairs
from guardedit.records import EditRequest


@dataclass(frozen=True)
class Fact:
    """One fact of a batch and how it is asked for."""

    request: EditRequest
    contexts: tuple[str, ...]
    kl_prompt: str
    rewordings: tuple[str, ...] = ()
    """Other prompts for the same target, each with one `{}` where the subject goes."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Of each fact, both in nats (facts,)."""

    nll: Float[Tensor, " facts"]
    """Mean negative log-likelihood of a target token over contexts."""
    kl: Float[Tensor, " facts"]
    """KL(edited ‖ unedited) right after the bare subject, as published."""


@dataclass(frozen=True, eq=False)
class Objective:
    """Rows of all facts, and what is read from them."""

    rows: RowSet
    fact_of: Int[Tensor, " rows"]
    target_ids: Int[Tensor, " reads"]
    """The target's token; −1 where the KL prompt is read."""
    weights: Float[Tensor, " reads"]
    """Of a position in its fact's mean."""
    base: Float[Tensor, "kl_reads vocab"]
    """Log-probabilities of the unedited model at the KL prompts."""
    n_facts: int

    @property
    def handle(self) -> ModelHandle:
        """The model."""
        return self.rows.suffix.handle

    def losses(self, residuals: Float[Tensor, "facts d_model"]) -> Losses:
        """Both losses with each fact's residual added at its rows' first position."""
        logprobs = self.rows.logprobs(residuals[self.fact_of])
        asks = self.target_ids >= 0
        chosen = -logprobs[asks].gather(-1, self.target_ids[asks][:, None])[:, 0]
        now = logprobs[~asks]
        # As published: KL(edited ‖ unedited).
        kl = (now.exp() * (now - self.base)).sum(-1)
        return Losses(self._mean(chosen, asks), self._mean(kl, ~asks))

    def _mean(self, values: Tensor, chosen: Tensor) -> Tensor:
        fact = self.fact_of[self.rows.row_of[chosen]]
        return torch.zeros(self.n_facts, device=values.device).index_add(
            0, fact, values * self.weights[chosen]
        )

    def without(self, finished: Sequence[int]) -> Objective:
        """The same without the rows of finished facts; facts keep their numbers."""
        kept = ~torch.isin(self.fact_of, torch.tensor(list(finished), device=self.fact_of.device))
        reads = kept[self.rows.row_of]
        return replace(
            self, rows=self.rows.select(kept), fact_of=self.fact_of[kept], target_ids=self.target_ids[reads],
            weights=self.weights[reads], base=self.base[reads[self.target_ids < 0]],
        )  # fmt: skip


@dataclass(frozen=True)
class TargetRow:
    """A prompt with its target behind it, and what is read there."""

    row: Row
    targets: list[int]
    """The target's tokens, one a read."""
    rivals: list[int]
    """At the read where old and new target part, the old one's token; −1 elsewhere, and where there is no old one."""
    in_context: bool
    """A context before the request's own prompt; else another wording of it."""


def make_objective(handle: ModelHandle, facts: Sequence[Fact], layer: int) -> Objective:
    """Tokenise and split the rows of all facts, and read what the unedited model says after the KL prompts.

    Raises BadRequestError where subject and target share a token, SolveError where the layer is the last and the target
    does not follow the subject at once.
    """
    rows = [(number, row.row, row.targets) for number, row in all_target_rows(handle, facts, layer)]
    rows += [(number, _kl_row(handle, fact), [-1]) for number, fact in enumerate(facts)]
    rows.sort(key=lambda row: row[1].length)
    found = make_rowset(handle, [row for _, row, _ in rows], layer)
    device = found.row_of.device
    objective = Objective(
        rows=found, n_facts=len(facts), base=torch.empty(0),
        fact_of=torch.tensor([number for number, _, _ in rows], device=device),
        target_ids=torch.tensor([token for _, _, targets in rows for token in targets], device=device),
        weights=torch.tensor([share for row in rows for share in _shares(row, rows)], device=device),
    )  # fmt: skip
    with torch.no_grad():
        base = found.logprobs()[objective.target_ids < 0]
    return replace(objective, base=base)


def _shares(row: tuple[int, Row, list[int]], rows: Sequence[tuple[int, Row, list[int]]]) -> list[float]:
    """Each row of a kind counts the same in its fact's mean, and each position of a row."""
    number, _, targets = row
    siblings = sum(other == number and (more[0] < 0) == (targets[0] < 0) for other, _, more in rows)
    return [1.0 / (siblings * len(targets))] * len(targets)


def _kl_row(handle: ModelHandle, fact: Fact) -> Row:
    subject = fact.request.subject
    row = text_row(handle, fact.kl_prompt.replace("{}", subject), fact.kl_prompt.index("{}"), subject)
    # Only what comes right after the subject counts, so the tokens behind it need not run.
    return Row(row.ids[: row.split + 1], row.split, [0])


def text_row(handle: ModelHandle, text: str, at: int, subject: str) -> Row:
    """A text whose subject begins at character `at`, read at its last position."""
    encoded = handle.encode([text])
    split = last_token_of(encoded["offsets"], encoded["attention_mask"], [(at, at + len(subject))])[0]
    ids = encoded["input_ids"][0].tolist()
    return Row(ids, split, [len(ids) - 1 - split])


def all_target_rows(handle: ModelHandle, facts: Sequence[Fact], layer: int) -> list[tuple[int, TargetRow]]:
    """(number of the fact, row) of every prompt of every fact; errors as `make_objective`."""
    rows = [(number, row) for number, fact in enumerate(facts) for row in _target_rows(handle, fact)]
    _require_path(handle, rows, layer)
    return rows


def _target_rows(handle: ModelHandle, fact: Fact) -> list[TargetRow]:
    prompts = [context + fact.request.filled for context in fact.contexts]
    spans = [subject_span(fact.request, context) for context in fact.contexts]
    for template in fact.rewordings:
        reworded = fact.request.model_copy(update={"prompt": template})
        prompts.append(reworded.filled)
        spans.append(subject_span(reworded))
    pairs = encode_pairs(handle, prompts, [fact.request.target_new] * len(prompts))
    splits = last_token_of(pairs["offsets"], pairs["attention_mask"], spans)
    old = _old_ids(handle, prompts, fact.request.target_true)
    rows = []
    for index, split in enumerate(splits):
        ids = pairs["input_ids"][index][pairs["attention_mask"][index].bool()].tolist()
        where = pairs["target_mask"][index].nonzero().flatten().tolist()
        if where[0] <= split:
            raise BadRequestError(
                "the target's first token is the subject's last one; end the prompt otherwise"
            )
        reads = [position - 1 - split for position in where]
        # The last target token predicts nothing that is asked for.
        row, rivals = Row(ids[:-1], split, reads), _rivals(ids, where, old[index])
        rows.append(TargetRow(row, [ids[position] for position in where], rivals, index < len(fact.contexts)))
    return rows


def _old_ids(handle: ModelHandle, prompts: Sequence[str], target_true: str | None) -> list[list[int]]:
    """Each prompt with the old target behind it; nothing where there is none."""
    if target_true is None:
        return [[] for _ in prompts]
    pairs = encode_pairs(handle, prompts, [target_true] * len(prompts))
    rows = zip(pairs["input_ids"], pairs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def _rivals(ids: Sequence[int], where: Sequence[int], old: Sequence[int]) -> list[int]:
    parting = next((at for at in where if at < len(old) and old[at] != ids[at]), None)
    return [old[at] if at == parting else -1 for at in where]


def _require_path(handle: ModelHandle, rows: Sequence[tuple[int, TargetRow]], layer: int) -> None:
    # With a gradient of zero, Adam would blow rounding noise up to full steps.
    if layer != handle.n_layers - 1:
        return
    numbers = {number for number, _ in rows}
    reached = {number for number, row in rows if 0 in row.row.reads}
    if numbers - reached:
        raise SolveError(
            f"layer {layer} is the last: no attention above it carries what the subject's token holds to the target; "
            "edit a lower layer"
        )
