"""REMEDI's maps where plans look for them: a home's own first, then the kit's; the one that ships with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Home, home, request_of, world
from remedi_helpers import HOOK, map_of

from guardedit.edits.remedi_map import MAP_FILES, RemediMap, load_map, save_map
from guardedit.errors import StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import WHEELS
from guardedit.pipeline import Guard
from guardedit.pipeline.kit import KIT_FILE, MAPS, is_shipped, read_kit
from guardedit.records import ABSENT, digest_of_bytes, is_activation

__all__ = ["home", "world"]

LEAKAGE = {"preop/leakage_share": ("<=", 1.0, "soft")}
SHIPPED = Path(str(importlib.resources.files("guardedit") / "assets" / "smollm2-135m"))
UNDECIDED = "a person looked at the direction"


def own(home: Home, guard: Guard, seed: int = 0, hook: str = HOOK) -> RemediMap:
    """A random map of the world's model, put where a home's own map lies."""
    made = map_of(guard.handle, seed, hook_name=hook)
    return save_map(home.folder / MAPS / hook, made.weight, made.bias, made.card)


def shipped() -> RemediMap:
    """The only map in the package."""
    (folder,) = (SHIPPED / MAPS).glob("*")
    return load_map(folder)


# -- a home's own map


def test_a_plan_with_a_homes_own_map_goes_live_and_is_undone_bit_for_bit(home: Home) -> None:
    guard = home.guard(LEAKAGE)
    made, before = own(home, guard), guard.handle.digest()
    plan = guard.plan(request_of(), "remedi")
    assert plan.editor == "remedi" and plan.delta.diagnostics["map_digest"] == made.digest
    assert f"{MAPS}/{HOOK}/own" in plan.delta.statistics_digests
    (change,) = plan.delta.changes
    assert is_activation(change.parameter) and change.digest_before == ABSENT and change.acts is not None
    guard.approve(plan.plan_id, UNDECIDED)
    guard.apply(plan.plan_id)
    assert home.guard(LEAKAGE).handle.digest() != before
    home.guard(LEAKAGE).rollback(plan.plan_id)
    assert home.guard(LEAKAGE).handle.digest() == before


def test_a_homes_own_map_comes_before_the_kits(home: Home) -> None:
    assert not home.guard().kit.maps
    first = own(home, home.guard(), hook="blocks.2.hook_resid_post")
    kit = home.guard().kit
    assert kit.maps == {first.hook_name: kit.maps[first.hook_name]} and kit.settings("remedi").layer == 2
    second = own(home, home.guard())
    kit = home.guard().kit
    assert kit.settings("remedi").layer == 1 and kit.maps[HOOK].digest == second.digest


def test_a_plan_is_stale_once_its_map_was_trained_again(home: Home) -> None:
    guard = home.guard(LEAKAGE)
    own(home, guard)
    plan = guard.plan(request_of(), "remedi")
    guard.approve(plan.plan_id, UNDECIDED)
    own(home, guard, seed=1)
    ran = home.run("apply", plan.plan_id)
    assert ran.code and f"{MAPS}/{HOOK}/own" in ran.out + ran.err


def test_show_names_the_homes_own_map(home: Home) -> None:
    made = own(home, home.guard())
    (found,) = home.run("remedi", "show", "--json").json["maps"]
    assert found["digest"] == made.digest and found["hook_name"] == HOOK


# -- the shipped map


def test_the_shipped_map_loads_and_its_card_names_its_figures() -> None:
    card = shipped().card
    assert card.model_digest == WHEELS["smollm2-135m"].digest and card.d_model == 576
    assert card.data_name.endswith("split train")
    assert card.n_train > 100
    named: dict[str, Any] = {"efficacy": card.efficacy, "paraphrase": card.paraphrase, "p_new": card.p_new}
    for name, share in named.items():
        assert share is not None and share.low <= share.value <= share.high, name
        assert 20 < share.n <= card.n_held_out, name


def test_the_kit_names_the_shipped_map_and_the_layer_that_plans_take() -> None:
    kit, found = read_kit(SHIPPED / KIT_FILE), shipped()
    for name in MAP_FILES:
        path = f"{MAPS}/{found.hook_name}/{name}"
        assert kit["files"][path] == digest_of_bytes((SHIPPED / path).read_bytes())
    assert kit["hparams"]["remedi"] == {"layer": found.layer}
    assert is_shipped("smollm2-135m") and not is_shipped("nobody/else")


def test_the_shipped_map_is_refused_for_another_model(tiny_llama: ModelHandle) -> None:
    with pytest.raises(StatisticsMismatchError, match="train one for these weights"):
        shipped().check(tiny_llama)


@pytest.mark.slow
def test_the_shipped_map_belongs_to_the_default_model(default_handle: ModelHandle) -> None:
    shipped().check(default_handle)
