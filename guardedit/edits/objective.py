"""What the optimisation of values measures, for many facts at once: rows of tokens from a subject's last token on.

A row is one of three kinds: a context with prompt and target (how likely is the new target?), the KL prompt of the
published loss (what is said right after the bare subject), or a text about the subject that is to be kept. A change at
the subject's last token cannot reach earlier tokens, nor layers below, so both are computed once (`Suffix`); logits are
computed only where one of the three needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.edits.keys import last_token_of, subject_span
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, rewrite_hook
from guardedit.models.suffix import Suffix, split_rows
from guardedit.models.tokens import encode_pairs
from guardedit.records import EditRequest

_TARGET, _KL, _KEPT = 0, 1, 2
_OVERHEAD = 24
"""What a pass over the weights costs beside its tokens, in tokens: it reads them all, however few rows there are."""


@dataclass(frozen=True)
class Fact:
    """One fact of a batch: what it asks for, and texts about its subject whose next tokens shall stay."""

    request: EditRequest
    contexts: tuple[str, ...]
    kl_prompt: str
    rewordings: tuple[str, ...] = ()
    """Other prompts for the same target, each with one `{}` where the subject goes."""
    kept: tuple[str, ...] = ()
    """Each contains the subject; kept from the subject's last token on."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Of each fact, all in nats (facts,)."""

    nll: Float[Tensor, " facts"]
    """Mean negative log-likelihood of a target token over contexts."""
    kl: Float[Tensor, " facts"]
    """KL(edited ‖ unedited) right after the bare subject, as published."""
    kept: Float[Tensor, " facts"]
    """Mean KL(unedited ‖ edited) over the positions of the kept texts; 0 without any."""


@dataclass(frozen=True, eq=False)
class Objective:
    """Rows of all facts, and at which positions what is read."""

    layer: int
    suffix: Suffix
    fact_of: Int[Tensor, " rows"]
    kind_of: Int[Tensor, " rows"]
    """Rows stand in the order of their lengths, so that those of similar length can run together."""
    row_of: Int[Tensor, " reads"]
    at_of: Int[Tensor, " reads"]
    """Row and position whose logits are needed, in row order; the vectors below go along them."""
    target_ids: Int[Tensor, " reads"]
    """The target's token, where one is predicted; else 0."""
    weights: Float[Tensor, " reads"]
    """Of a position in its fact's mean."""
    base: Float[Tensor, "kept_reads vocab"]
    """Log-probabilities of the unedited model at the KL and kept positions."""
    n_facts: int

    def losses(self, residuals: Float[Tensor, "facts d_model"]) -> Losses:
        """The three losses with each fact's residual added at its rows' first position."""

        logprobs = self._logprobs(residuals[self.fact_of])
        fact, kind = self._of_reads
        chosen = -logprobs[kind == _TARGET].gather(-1, self.target_ids[kind == _TARGET][:, None])[:, 0]
        found = {_TARGET: self._mean(chosen, fact[kind == _TARGET], kind == _TARGET)}
        base_kind = kind[kind != _TARGET]
        for which in (_KL, _KEPT):
            now, before = logprobs[kind == which], self.base[base_kind == which]
            # As published, the KL term is KL(edited ‖ unedited); the kept texts' is the one that damage is measured in.
            held, other = (now, before) if which == _KL else (before, now)
            found[which] = self._mean(
                (held.exp() * (held - other)).sum(-1), fact[kind == which], kind == which
            )
        return Losses(found[_TARGET], found[_KL], found[_KEPT])

    @property
    def _of_reads(self) -> tuple[Tensor, Tensor]:
        return self.fact_of[self.row_of], self.kind_of[self.row_of]

    @cached_property
    def _parts(self) -> tuple[tuple[slice, Suffix], ...]:
        """Rows that run together: padding is work for nothing, but so is a pass over the weights for a few rows."""
        numbers = torch.arange(len(self.fact_of), device=self.fact_of.device)
        cuts = bucketed(self.suffix.mask.sum(1).tolist())
        return tuple((cut, self.suffix.select(numbers[cut])) for cut in cuts)

    def _logprobs(self, added: Float[Tensor, "rows d_model"] | None = None) -> Tensor:
        """At every read, with `added` put to the rows' first positions."""
        found = []
        for rows, suffix in self._parts:
            inside = (self.row_of >= rows.start) & (self.row_of < rows.stop)
            hidden = _moved_hidden(suffix, self.layer, None if added is None else added[rows])
            found.append(hidden[self.row_of[inside] - rows.start, self.at_of[inside]])
        states = torch.cat(found)[None]
        everywhere = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return self.suffix.handle.logits_at(states, everywhere).float().log_softmax(-1)

    def _mean(self, values: Tensor, fact: Tensor, chosen: Tensor) -> Tensor:
        return torch.zeros(self.n_facts, device=values.device).index_add(
            0, fact, values * self.weights[chosen]
        )

    def without(self, finished: Sequence[int]) -> Objective:
        """The same without the rows of finished facts; facts keep their numbers."""
        kept = ~torch.isin(self.fact_of, torch.tensor(list(finished), device=self.fact_of.device))
        rows, reads = kept.nonzero()[:, 0], kept[self.row_of]
        number = kept.cumsum(0) - 1
        return replace(
            self, suffix=self.suffix.select(rows), fact_of=self.fact_of[rows], kind_of=self.kind_of[rows],
            row_of=number[self.row_of[reads]], at_of=self.at_of[reads], target_ids=self.target_ids[reads],
            weights=self.weights[reads], base=self.base[reads[self._of_reads[1] != _TARGET]],
        )  # fmt: skip


def _moved_hidden(suffix: Suffix, layer: int, added: Tensor | None) -> Float[Tensor, "rows seq d_model"]:
    """The rows' final hidden states, with `added` (rows, d_model) put to the rewrite module's first output."""
    if added is None:
        return suffix.hidden()

    def add(output: Tensor) -> Tensor:
        moved = output[:, :1] + added[:, None].to(output)
        return torch.cat([moved, output[:, 1:]], 1)

    with patch(suffix.handle, rewrite_hook(layer), add):
        return suffix.hidden()


def bucketed(lengths: Sequence[int], overhead: int = _OVERHEAD) -> list[slice]:
    """Cut rows of ascending lengths into runs that are padded to their longest, at the least cost.

    The cost of a run is its rows times its longest length, and `overhead` for the run itself.
    """
    edges = [0, *(i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]), len(lengths)]
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(edges)):
        costs = [
            (best[start][0] + (edges[end] - edges[start]) * lengths[edges[end] - 1] + overhead, start)
            for start in range(end)
        ]
        best.append(min(costs))
    cuts, end = [], len(edges) - 1
    while end:
        start = best[end][1]
        cuts.append(slice(edges[start], edges[end]))
        end = start
    return cuts[::-1]


@dataclass(frozen=True)
class _Row:
    fact: int
    kind: int
    ids: list[int]
    split: int
    """Index of the subject's last token."""
    reads: list[int]
    """Positions from the split on whose logits are needed."""
    targets: list[int]


def make_objective(handle: ModelHandle, facts: Sequence[Fact], layer: int) -> Objective:
    """Tokenise and split the rows of all facts, and read what the unedited model says where that is to be kept.

    Raises BadRequestError where subject and target share a token, SolveError where the layer is the last and the target
    does not follow the subject at once.
    """
    rows = [row for number, fact in enumerate(facts) for row in _rows(handle, fact, number)]
    rows.sort(key=lambda row: len(row.ids) - row.split)
    _require_path(handle, rows, layer)
    suffix = split_rows(handle, [row.ids for row in rows], [row.split for row in rows], layer)
    device = suffix.input_ids.device
    reads = [(index, at) for index, row in enumerate(rows) for at in row.reads]
    shares = [weight for row in rows for weight in _weights(row, rows)]
    objective = Objective(
        layer=layer, suffix=suffix, n_facts=len(facts), base=torch.empty(0),
        row_of=torch.tensor([row for row, _ in reads], device=device),
        at_of=torch.tensor([at for _, at in reads], device=device),
        fact_of=torch.tensor([row.fact for row in rows], device=device),
        kind_of=torch.tensor([row.kind for row in rows], device=device),
        target_ids=torch.tensor([token for row in rows for token in row.targets], device=device),
        weights=torch.tensor(shares, device=device),
    )  # fmt: skip
    with torch.no_grad():
        base = objective._logprobs()[objective._of_reads[1] != _TARGET]
    return replace(objective, base=base)


def _weights(row: _Row, rows: Sequence[_Row]) -> list[float]:
    """Each row of a kind counts the same in its fact's mean, and each position of a row."""
    siblings = sum(other.fact == row.fact and other.kind == row.kind for other in rows)
    return [1.0 / (siblings * len(row.reads))] * len(row.reads)


def _rows(handle: ModelHandle, fact: Fact, number: int) -> list[_Row]:
    subject = fact.request.subject
    kl = _text_row(handle, fact.kl_prompt.replace("{}", subject), fact.kl_prompt.index("{}"), subject)
    # Only what comes right after the subject counts, so the tokens behind it need not run.
    rows = [_Row(number, _KL, kl[0][: kl[1] + 1], kl[1], [0], [0])]
    for text in fact.kept:
        at = text.find(subject)
        if at < 0:
            raise BadRequestError(f"the text to keep {text!r} does not contain the subject {subject!r}")
        ids, split = _text_row(handle, text, at, subject)
        positions = list(range(len(ids) - split))
        rows.append(_Row(number, _KEPT, ids, split, positions, [0] * len(positions)))
    return [*_target_rows(handle, fact, number), *rows]


def _text_row(handle: ModelHandle, text: str, at: int, subject: str) -> tuple[list[int], int]:
    encoded = handle.encode([text])
    split = last_token_of(encoded["offsets"], encoded["attention_mask"], [(at, at + len(subject))])[0]
    return encoded["input_ids"][0].tolist(), split


def _target_rows(handle: ModelHandle, fact: Fact, number: int) -> list[_Row]:
    prompts = [context + fact.request.filled for context in fact.contexts]
    spans = [subject_span(fact.request, context) for context in fact.contexts]
    for template in fact.rewordings:
        reworded = fact.request.model_copy(update={"prompt": template})
        prompts.append(reworded.filled)
        spans.append(subject_span(reworded))
    pairs = encode_pairs(handle, prompts, [fact.request.target_new] * len(prompts))
    splits = last_token_of(pairs["offsets"], pairs["attention_mask"], spans)
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
        rows.append(_Row(number, _TARGET, ids[:-1], split, reads, [ids[position] for position in where]))
    return rows


def _require_path(handle: ModelHandle, rows: Sequence[_Row], layer: int) -> None:
    # With a gradient of zero, Adam would blow rounding noise up to full steps.
    if layer != handle.n_layers - 1:
        return
    numbers = {row.fact for row in rows}
    reached = {row.fact for row in rows if row.kind == _TARGET and 0 in row.reads}
    if numbers - reached:
        raise SolveError(
            f"layer {layer} is the last: no attention above it carries what the subject's token holds to the target; "
            "edit a lower layer"
        )
