"""Gates against rivals: a softmax over kinds of context, part of an edit's bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from edits_helpers import gaussian
from gate_helpers import HOOK, D, N, logits, made, planted

from guardedit.edits.activation_bytes import gate_from, gate_tensors
from guardedit.edits.context_texts import Example
from guardedit.edits.gates import Pooled, fit_gate, kinds_of
from guardedit.errors import BadRequestError, SolveError


def of_three_kinds(n: int = N) -> tuple[list[Example], Pooled]:
    """Kinds one behind the other on a line, the gate's own in the middle: no one plane has it on a side of its own."""
    names = ("fiction", "plain", "document")
    found = [Example(f"text {i}", i % 3 == 0, f"{i % 3} {i % 12}", names[i % 3]) for i in range(n)]
    place = torch.tensor([(0.0, 8.0, -8.0)[i % 3] for i in range(n)])
    line = gaussian(D, seed=2).float()
    return found, Pooled(gaussian(n, D, seed=1).float() + place[:, None] * line / line.norm(), None)


def test_rivals_are_told_apart_where_one_plane_could_not() -> None:
    three, means = of_three_kinds()
    gate, quality = fit_gate(three, means, HOOK, "activations")
    assert gate.rival_names == ("plain", "document") and quality.auroc > 0.95
    alike = [replace(one, kind="") for one in three]
    try:
        _, plane = fit_gate(alike, means, HOOK, "activations")
    except SolveError:
        return
    assert plane.auroc < 0.8


def test_the_logit_against_rivals_is_the_log_odds_of_their_softmax() -> None:
    three, means = of_three_kinds()
    gate, _ = fit_gate(three, means, HOOK, "activations")
    assert gate.rivals is not None and gate.rival_bias is not None
    said = gate.latent_acts(means.acts)
    every = torch.cat(
        [(said @ gate.weights + gate.bias)[:, None], said @ gate.rivals + gate.rival_bias], 1
    ).double()
    share = every.softmax(1)[:, 0]
    torch.testing.assert_close(logits(gate, means.acts).double().sigmoid(), share, rtol=1e-4, atol=1e-6)
    assert torch.equal(gate.net, gate.weights - gate.rivals.mean(1))


def test_rivals_are_part_of_the_bytes_and_gates_without_keep_theirs() -> None:
    three, means = of_three_kinds()
    of_three, _ = fit_gate(three, means, HOOK, "activations")
    of_two, _ = fit_gate(made(), planted(8.0), HOOK, "activations")
    for gate in (of_three, of_two):
        about, tensors = gate_tensors(gate)
        assert ("rival_names" in about) == ("gate.rivals" in tensors) == (gate is of_three)
        again = gate_from(json.loads(json.dumps(about)), dict(tensors))
        torch.testing.assert_close(logits(again, means.acts), logits(gate, means.acts), rtol=0, atol=0)
    about, tensors = gate_tensors(of_three)
    del tensors["gate.rival_bias"]
    with pytest.raises(KeyError):
        gate_from(json.loads(json.dumps(about)), tensors)
    with pytest.raises(BadRequestError, match="rivals"):
        replace(of_three, rivals=torch.zeros(len(of_three.weights), 1))
    with pytest.raises(BadRequestError, match="rival_bias"):
        replace(of_three, rival_bias=None)


def test_rare_kinds_and_prompts_that_do_not_say_are_one_kind() -> None:
    def some(n: int, kind: str, inside: bool = False) -> list[Example]:
        return [Example(f"{kind} {i}", inside, kind, kind) for i in range(n)]

    names, codes = kinds_of([*some(30, "fiction", True), *some(25, "plain"), *some(3, "own"), *some(4, "")])
    assert names == ("fiction", "plain", "outside")
    assert codes.tolist() == [0] * 30 + [1] * 25 + [2] * 7
    assert kinds_of([*some(30, "", True), *some(30, "")])[0] == ("", "outside")
