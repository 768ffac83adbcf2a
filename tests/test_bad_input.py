"""Bad input: one clear line, its exit code, and model and ledger as they were."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline_helpers as kit
import pytest
import torch
from pipeline_helpers import FACTS, Home, Ran, World, home, request_of, world
from safetensors.torch import load_file, save_file

from guardedit.audit.versions import VersionStore
from guardedit.editors import EDITORS
from guardedit.models import sources
from guardedit.models.hooks import mlp_hook

__all__ = ["home", "world"]

GOOD = {"subject": "France", "prompt": "The capital of {} is", "target_new": "Lisbon", "target_true": "Oslo"}


def said(ran: Ran, code: int, *phrases: str) -> None:
    """One line on stderr with these phrases, nothing on stdout."""
    assert ran.code == code, ran
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("guardedit: "), ran.err
    assert ran.out == ""
    for phrase in phrases:
        assert phrase in lines[0], lines[0]


def changed(**values: Any) -> dict[str, Any]:
    return {**GOOD, **values}


REQUESTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no blank": (changed(prompt="The capital of France is"), ("0 `{}`", "exactly one")),
    "two blanks": (changed(prompt="The {} of {} is"), ("2 `{}`", "exactly one")),
    "stray brace": (changed(prompt="The {capital of {} is"), ("stray brace",)),
    "empty subject": (changed(subject=" "), ("subject is empty",)),
    "empty target": (changed(target_new=""), ("target_new is empty",)),
    "equal target": (changed(target_new=" Oslo"), ("' Oslo'", "nothing would change")),
    "unknown key": (changed(taget="x"), ("unknown key 'taget'", "allowed are subject, prompt")),
    "wrong type": (changed(paraphrases="no list"), ("paraphrases", "'no list'")),
    "missing key": ({"subject": "France"}, ("prompt", "required")),
    "no mapping": ("just some text", ("is str", "a request is a mapping")),
    "number": ("12", ("is int",)),
    "broken YAML": ("- subject: [", ("requests.yaml cannot be read",)),
    "empty file": ("", ("NoneType", "a request is a mapping")),
    "empty list": ("[]", ("holds no request",)),
    "control characters": ("subject: \x00", ("cannot be read",)),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_understood(home: Home, case: str) -> None:
    entry, phrases = REQUESTS[case]
    said(home.run("plan", str(home.requests(entry))), 2, "requests.yaml", *phrases)
    assert not home.folder.exists()


def test_one_bad_request_among_good_ones_is_numbered_and_none_is_planned(home: Home) -> None:
    path = home.requests(GOOD, changed(prompt="no blank"))
    said(home.run("plan", str(path)), 2, "request 2", "0 `{}`")
    asks_for_the_same = {"subject": FACTS[0][0], "prompt": FACTS[0][1], "target_new": said_today(home)}
    said(home.run("plan", str(home.requests(GOOD, asks_for_the_same))), 2, "already answers")
    assert not home.folder.exists()


def said_today(home: Home) -> str:
    from guardedit.pipeline.trying import continued

    return continued(sources.load(str(home.world.model)), request_of(0).filled, 3).strip()


def test_files_that_are_not_there(home: Home, tmp_path: Path) -> None:
    said(home.run("plan", str(tmp_path / "none.yaml")), 2, "none.yaml", "No such file")
    said(home.run("plan", str(tmp_path)), 2, "cannot be read", "directory")
    assert not home.folder.exists()


def test_an_unknown_editor_model_edit_and_folder(home: Home, tmp_path: Path) -> None:
    asked = str(home.requests(GOOD))
    said(home.run("plan", asked, "--editor", "mend"), 2, "'mend'", ", ".join(sorted(EDITORS)))
    said(
        kit.run("--home", str(home.folder), "plan", asked, "--model", "no/such/model"),
        2,
        "'no/such/model'",
        "smollm2",
    )
    for verb in ("show", "apply", "rollback", "report"):
        said(home.run(verb, "0001-nothing"), 2, "0001-nothing", "guardedit plan")
        said(home.run(verb, "../../etc"), 2, "../../etc", "guardedit status")
    said(home.run("approve", "0001-nothing", "--reason", "because"), 2, "0001-nothing")
    said(home.run("export", str(tmp_path / "out")), 2, "guards no model yet")
    assert not home.folder.exists() and not (tmp_path / "out").exists()


def test_a_home_that_cannot_be_made(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    blocked = Home(home.world, tmp_path / "file" / "home")
    said(blocked.run("plan", str(home.requests(GOOD))), 2, "cannot be read", "Not a directory")


POLICIES = {
    "no TOML": ("version = ", "is not TOML"),
    "empty": ("", "Field required"),
    "unknown metric": (
        kit.policy_text({"preop/leekage": ("<=", 1.0, "soft")}),
        "did you mean 'preop/leakage'",
    ),
    "unknown lineage": (kit.policy_text({"postop/lineage_x": ("<=", 1.0, "soft")}), "'postop/lineage_x'"),
    "unknown key": ("surprise = 1\n" + kit.policy_text(), "unknown key 'surprise'"),
    "unknown level": (
        kit.policy_text({"preop/leakage": ("<=", 1.0, "firm")}),
        "'advisory', 'soft' or 'hard'",
    ),
    "not a number": (kit.policy_text({"preop/leakage": ("<=", float("nan"), "soft")}), "finite number"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_cannot_be_used(home: Home, case: str, tmp_path: Path) -> None:
    text, phrase = POLICIES[case]
    path = tmp_path / "strange.toml"
    path.write_text(text, encoding="utf-8")
    said(home.run("plan", str(home.requests(GOOD)), "--policy", str(path)), 2, "strange.toml", phrase)
    assert not home.folder.exists()


def test_a_policy_that_is_not_there(home: Home, tmp_path: Path) -> None:
    asked = str(home.requests(GOOD))
    said(home.run("plan", asked, "--policy", str(tmp_path / "none.toml")), 2, "none.toml", "No such file")
    said(home.run("plan", asked, "--policy", str(tmp_path)), 2, "cannot be read")


def test_every_metric_that_is_measured_may_be_named(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    before = [f"preop/{score.name}" for score in plan.risk.scores]
    drift = guard.apply(plan.plan_id).drift
    assert drift is not None
    after = [f"postop/{prefix}{score.name}" for prefix in ("", "lineage_") for score in drift.scores]
    limits = dict.fromkeys((*before, *after), ("<=", 1.0, "advisory"))
    assert len(home.guard(limits).kit.policy.rules) == len({*limits, *kit.LIMITS})


def test_waivers_that_could_lift_nothing(home: Home) -> None:
    plan = ("plan", str(home.requests(GOOD)), "--reason", "long enough a reason")
    said(home.run(*plan, "--waive", "preop/nothing"), 2, "preop/nothing", "is in no rule")
    said(home.run(*plan, "--waive", "postop/far_kl"), 2, "is hard", "preop/delta_norm_ratio")
    said(home.run(*plan, "--waive", "preop/delta_norm_ratio", "--expires", "soon"), 2, "'soon'", "ISO 8601")
    said(home.run(*plan[:2], "--waive", "preop/delta_norm_ratio"), 2, "reason ''", "10 characters")
    assert not home.folder.exists()


def test_weights_that_are_not_numbers(home: Home, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(home.world.model, broken)
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name][3, 4] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    said(home.run("plan", str(home.requests(GOOD)), "--model", str(broken)), 2, name, "NaN or infinity")
    assert not home.folder.exists()


def test_a_model_without_a_kit(home: Home, tmp_path: Path) -> None:
    plain = kit.build_folder("llama", tmp_path / "plain", seed=5)
    said(
        home.run("plan", str(home.requests(GOOD)), "--model", str(plain)),
        2,
        "no kit yet",
        "guardedit stats collect",
    )
    assert not home.folder.exists()


@pytest.fixture
def other_sae(world: World) -> Iterator[Path]:
    """The place of the MLP output's SAE, empty; the old one is back afterwards."""
    folder, aside = world.saes[1], world.model.parent / "aside"
    folder.rename(aside)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def test_an_sae_of_the_wrong_width_or_of_other_weights(home: Home, other_sae: Path) -> None:
    handle = sources.load(str(home.world.model))
    name, asked = mlp_hook(kit.LAYER), str(home.requests(GOOD))
    kit.save_sae(other_sae, name, 48, handle.hook_digest(name), handle)
    said(home.run("plan", asked), 6, name, "48 wide", "32 wide")
    kit.save_sae(other_sae, name, 32, kit.ZERO, handle)
    said(home.run("plan", asked), 6, name, kit.ZERO)
    assert not home.folder.exists()


def test_a_moment_of_other_weights(home: Home, tmp_path: Path) -> None:
    """The same folder with other weights upstream: statistics that no longer belong to it are refused."""
    twin = World(tmp_path / "twin", home.world.cache)
    kit.build_folder("llama", twin.model, seed=11)
    shutil.copytree(home.world.kit, twin.kit)
    try:
        asked = str(home.requests(GOOD))
        said(
            home.run("plan", asked, "--model", str(twin.model)), 6, "collected on weights", "collect it again"
        )
    finally:
        shutil.rmtree(twin.kit)


def test_no_space_left(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_id = home.run("--json", "plan", str(home.requests(GOOD))).json["plans"][0]["plan_id"]
    before = home.trace()
    with monkeypatch.context() as patch:
        patch.setitem(VersionStore.__init__.__kwdefaults__, "free", lambda _: 1000)
        said(home.run("apply", plan_id), 2, "1,000 bytes free", "are needed")
    assert home.trace() == before
    assert home.run("apply", plan_id).code == 0
