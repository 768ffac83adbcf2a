"""All restorations at one token in a single way up the blocks: each joins the batch at the block where it starts.

So no block is run for a restoration that does not need it, and those that need it run together, as many as a pass
may hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardedit.models.corrupting import Runs, p_answer
from guardedit.models.hooks import Replace, patch, record
from guardedit.models.partial import mlp_only_at
from guardedit.models.restorations import Restoration, resid_pre
from guardedit.models.suffix import Suffix

Stream = Float[Tensor, "rows tail d_model"]
"""Of each restoration the corrupted rows, from the restored token on."""


@dataclass(frozen=True, eq=False)
class Climb:
    """What is restored at one token of one fact."""

    runs: Runs
    states: Mapping[str, Float[Tensor, "samples seq d_model"]]
    """What fixes name: the clean run's states, and the first step of every window."""
    token: int
    most_tokens: int
    """In one pass, where one restoration alone has no more."""

    def values(self, work: Sequence[Restoration]) -> list[float]:
        """Mean probability of the answer with each restoration made; `work` in the order of the starts."""
        runs, samples = self.runs, len(self.runs.corrupted)
        stream, inside = runs.streams[0][:0, self.token :], 0
        for block in range(work[0].start, runs.handle.n_layers):
            joining = [one for one in work if one.start == block]
            stream = torch.cat([stream, *(self._joined(one, work, stream) for one in joining)])
            inside += len(joining)
            stream = torch.cat([self._run(block, *part) for part in self._parts(work[:inside], stream)])
        means: list[float] = stream.view(len(work), samples).mean(1).tolist()
        return means

    def _joined(self, one: Restoration, work: Sequence[Restoration], stream: Stream) -> Stream:
        """What a restoration goes on with: the corrupted rows or, where it forks, those of another."""
        if one.forks is None:
            return self.runs.streams[one.start][:, self.token :]
        samples, kind = len(self.runs.corrupted), one.kind
        at = next(at for at, other in enumerate(work) if other.kind == kind and other.column == one.forks)
        return stream[at * samples : (at + 1) * samples]

    def _parts(
        self, work: Sequence[Restoration], stream: Stream
    ) -> Iterator[tuple[Sequence[Restoration], Stream]]:
        """Restorations that one pass holds, and their rows."""
        samples = len(self.runs.corrupted)
        count = max(1, self.most_tokens // (samples * stream.shape[1]))
        for at in range(0, len(work), count):
            yield work[at : at + count], stream[at * samples : (at + count) * samples]

    def _run(self, block: int, work: Sequence[Restoration], stream: Stream) -> Tensor:
        """The rows behind the block; behind the last one, the probability of the answer in each."""
        handle = self.runs.handle
        samples, last = len(self.runs.corrupted), block == handle.n_layers - 1
        fixes: dict[str, list[tuple[int, Tensor]]] = {}
        for at, one in enumerate(work):
            for name in (name for name in one.fixes if name.startswith(f"blocks.{block}.")):
                state = self.states[one.fixes[name]][:, self.token : self.token + 1]
                fixes.setdefault(name, []).append((at * samples, state))
        # A pass puts its stream in place whatever came before, so what is restored right there goes in by hand.
        here = fixes.pop(resid_pre(block), None)
        suffix = self._suffix(block, _fix(here, samples)(stream) if here else stream)
        with ExitStack() as stack:
            read = self._read(block, stream, fixes.get(f"blocks.{block}.hook_mlp_out", ()))
            # Where earlier tokens run again, hooks see parts of rows: such a family's passes stay whole.
            if self.runs.past and not read.all():
                stack.enter_context(mlp_only_at(handle, block, read))
            for name, parts in fixes.items():
                stack.enter_context(patch(handle, name, _fix(parts, samples)))
            if last:
                return p_answer(handle, suffix.hidden(), self.runs.answer)
            behind = resid_pre(block + 1)
            with record(handle, [behind], stop=True) as seen:
                suffix.hidden()
        return seen[behind]

    def _read(
        self, block: int, stream: Stream, fixed: Sequence[tuple[int, Tensor]]
    ) -> Bool[Tensor, "rows tail"]:
        """Where the output of the block's MLP is read: not where it is restored; behind the last block at the end."""
        read = torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
        if block == self.runs.handle.n_layers - 1:
            read[:, :-1] = False
        for row, _ in fixed:
            read[row : row + len(self.runs.corrupted), 0] = False
        return read

    def _suffix(self, block: int, stream: Stream) -> Suffix:
        """The rows at the block, with what the corrupted run remembers of the tokens before."""
        runs, token, ids = self.runs, self.token, self.runs.input_ids
        rows, copies = len(stream), len(stream) // len(runs.corrupted)
        # Other blocks do not run: theirs only have to say how long the past is.
        past = tuple(
            (keys[:, :, :token].repeat(copies, 1, 1, 1), values[:, :, :token].repeat(copies, 1, 1, 1))
            if layer == block
            else (keys[:1, :1, :token], values[:1, :1, :token])
            for layer, (keys, values) in enumerate(runs.past)
        )
        again = 0 if runs.past else token
        before = runs.streams[block][:, :again].repeat(copies, 1, 1)
        tail = ids[:, token:].expand(rows, -1)
        return Suffix(
            handle=runs.handle,
            layer=block,
            input_ids=tail,
            mask=torch.ones_like(tail, dtype=torch.bool),
            full_mask=torch.ones_like(ids).expand(rows, -1),
            position_ids=torch.arange(token, ids.shape[1], device=ids.device).expand(rows, -1),
            past=past if token else (),
            again=ids[:, :again].expand(rows, -1),
            resid_pre=torch.cat([before, stream], 1),
        )


def _fix(parts: Sequence[tuple[int, Tensor]], samples: int) -> Replace:
    """Sets the first position of some rows; a part is the first of its rows and their state (1 or samples, 1, d)."""

    def fix(activation: Tensor) -> Tensor:
        fixed = activation.clone()
        for row, state in parts:
            fixed[row : row + samples, :1] = state
        return fixed

    return fix
