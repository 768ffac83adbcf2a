"""Autoencoders trained, calibrated, graded, labelled and saved on a tiny model; what must hold whatever the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saes_helpers import folder

from guardedit.errors import BadRequestError, IntegrityError, StatisticsMismatchError, TooFewTokensError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record
from guardedit.saes import checkpoints, command, quality, texts
from guardedit.saes.batches import all_inliers, normalisation, stream
from guardedit.saes.calibrate import to_half
from guardedit.saes.gather import Store, gather
from guardedit.saes.plan import Stores, TrainPlan, prepare
from guardedit.saes.train import TrainSettings, Weights, train

__all__ = ["folder"]

HOOK = "blocks.1.mlp.hook_post"
SETTINGS = TrainSettings(d_sae=96, k=6, samples=12_000, batch_size=128, lr=3e-3, bf16=False)


class Interrupted(Exception):
    """What a test stops a long job with."""


def stop_at(unit: int) -> object:
    def progress(_: str, done: int, __: int) -> None:
        if done >= unit:
            raise Interrupted

    return progress


@pytest.fixture(scope="module")
def plan(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainPlan:
    base = tmp_path_factory.mktemp("trained")
    facts = base / "facts.jsonl"
    facts.write_text(
        "".join(
            json.dumps({"prompt": f"The capital of {s} is", "subject": s}) + "\n" for s in ("France", "Italy")
        )
    )
    return TrainPlan(
        texts=(folder,), layer=1, settings=SETTINGS, row_length=64, held_out_share=0.3, facts=facts,
        frozen_control_samples=2_000, label_tokens=2_000, out=base / "saes", cache=base / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_llama: ModelHandle, plan: TrainPlan) -> dict[str, Path]:
    return command.train_all(tiny_llama, plan)


@pytest.fixture(scope="module")
def stores(tiny_llama: ModelHandle, plan: TrainPlan, trained: dict[str, Path]) -> Stores:
    return prepare(tiny_llama, plan)


@pytest.fixture(scope="module")
def key(trained: dict[str, Path]) -> checkpoints.Sae:
    return checkpoints.load(trained[HOOK])


def test_every_hook_of_the_plan_gets_a_checkpoint_that_loads(
    trained: dict[str, Path], tiny_llama: ModelHandle, plan: TrainPlan
) -> None:
    assert list(trained) == ["blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post"]
    found = checkpoints.load_all(tiny_llama.name, plan.out)
    assert set(found) == set(trained)
    card = found[HOOK].card
    assert (found[HOOK].d_in, found[HOOK].d_sae) == (64, 96)
    assert card.upstream_digest == tiny_llama.upstream_digest(1)
    assert set(card.explained_variance) == {"all", "unseen", "places", "code"}
    assert set(card.controls) == {"pca", "frozen_decoder"}
    assert card.leakage_facts == 2
    assert len(found[HOOK].labels.latents) == 96


def test_sae_lens_reads_the_checkpoint_and_agrees_with_our_own_reader(
    key: checkpoints.Sae, trained: dict[str, Path]
) -> None:
    from sae_lens import SAE

    theirs = SAE.load_from_disk(trained[HOOK])
    assert theirs.cfg.architecture() == "jumprelu"
    assert theirs.cfg.metadata.hook_name == HOOK
    assert theirs.cfg.metadata.prepend_bos is False
    x = torch.randn(32, key.d_in, generator=torch.Generator().manual_seed(1))
    # Both compute in float32, in another order of operations.
    torch.testing.assert_close(theirs.encode(x).detach(), key.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(theirs(x).detach(), key.reconstruct(x), atol=1e-5, rtol=1e-4)


def test_training_explains_more_than_both_controls_and_decoder_rows_have_norm_one(
    key: checkpoints.Sae, stores: Stores
) -> None:
    seen = quality.held_out(stores.test, HOOK, ["code", "places"]).seen
    reached = quality.explained_variance(key.reconstruct, seen)
    assert reached > key.card.controls["pca"] + 0.05
    assert reached > key.card.controls["frozen_decoder"] + 0.05
    torch.testing.assert_close(key.W_dec.norm(dim=-1), torch.ones(key.d_sae), atol=1e-3, rtol=0)


def test_the_card_repeats_what_can_be_measured_from_the_file(
    key: checkpoints.Sae, stores: Stores, tiny_llama: ModelHandle, plan: TrainPlan, trained: dict[str, Path]
) -> None:
    assert command.evaluate(tiny_llama, plan, trained[HOOK]) == key.card.explained_variance
    seen = quality.held_out(stores.test, HOOK, ["code", "places"]).seen
    assert quality.mean_l0(key, seen) == pytest.approx(key.card.l0, abs=0.01)
    assert key.card.l0 == pytest.approx(SETTINGS.k, rel=0.25)


def test_energy_and_firing_rate_are_those_of_the_latents(key: checkpoints.Sae, stores: Stores) -> None:
    x = torch.cat(all_inliers(stores.train, HOOK)).float()
    acts = key.encode(x).double()
    torch.testing.assert_close(key.energy, acts.pow(2).mean(0).float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(key.firing_rate, (acts > 0).double().mean(0).float())


def test_training_leaves_the_model_and_the_random_state_as_they_were(
    tiny_llama: ModelHandle, stores: Stores, tmp_path: Path
) -> None:
    before, state = tiny_llama.manifest(), torch.get_rng_state()
    train(stores.train, HOOK, replace(SETTINGS, samples=1000), tmp_path)
    assert tiny_llama.manifest() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_training_stopped_half_way_ends_with_the_same_bits(stores: Stores, tmp_path: Path) -> None:
    settings = replace(SETTINGS, samples=8_000)
    straight = train(stores.train, HOOK, settings, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(stores.train, HOOK, settings, tmp_path / "halted", progress=stop_at(20), save_every_s=0.0)  # type: ignore[arg-type]
    resumed = train(stores.train, HOOK, settings, tmp_path / "halted")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(straight, name), getattr(resumed, name)), name


def test_a_checkpoint_of_another_training_is_not_resumed(stores: Stores, tmp_path: Path) -> None:
    train(stores.train, HOOK, replace(SETTINGS, samples=2_000, seed=1), tmp_path)
    again = train(stores.train, HOOK, replace(SETTINGS, samples=2_000, seed=2), tmp_path)
    fresh = train(stores.train, HOOK, replace(SETTINGS, samples=2_000, seed=2), tmp_path / "fresh")
    assert torch.equal(again.W_enc, fresh.W_enc)


def test_a_frozen_decoder_stays_as_it_began(stores: Stores, tmp_path: Path) -> None:
    short, long = (
        train(stores.train, HOOK, replace(SETTINGS, samples=n, frozen_decoder=True), tmp_path / str(n))
        for n in (256, 2_000)
    )
    torch.testing.assert_close(short.W_dec, long.W_dec, atol=1e-6, rtol=0)
    assert not torch.allclose(short.W_enc, long.W_enc)


def test_the_stream_is_seeded_and_skips_exactly(stores: Stores) -> None:
    shards = stores.train.available(HOOK)
    normal = normalisation(stores.train, HOOK, shards)

    def first(n: int, skip: int = 0, seed: int = 3) -> list[torch.Tensor]:
        batches = stream(stores.train, HOOK, shards, normal, 64, seed, skip)
        return [next(batches) for _ in range(n)]

    whole = first(120)  # more than one epoch
    assert torch.equal(torch.stack(whole[100:]), torch.stack(first(20, skip=100)))
    assert not torch.equal(whole[0], first(1, seed=4)[0])


def test_normalised_activations_have_zero_mean_and_unit_mean_square(stores: Stores) -> None:
    shards = stores.train.available(HOOK)
    normal = normalisation(stores.train, HOOK, shards)
    x = normal.apply(torch.cat(all_inliers(stores.train, HOOK)))
    assert float(x.mean(0).abs().max()) < 1e-3
    assert float(x.pow(2).mean()) == pytest.approx(1.0, rel=1e-3)


def test_a_batch_larger_than_the_data_is_refused(stores: Stores, tmp_path: Path) -> None:
    with pytest.raises(TooFewTokensError, match="fills one batch"):
        train(stores.train, HOOK, replace(SETTINGS, batch_size=10**6, samples=10**6), tmp_path)


def test_gathered_activations_are_the_model_s_own_without_position_zero(
    tiny_llama: ModelHandle, stores: Stores
) -> None:
    shard = stores.calibrate.load(HOOK, 0)
    assert int(shard["position"].min()) == 1
    row = int(shard["row"][0])
    ids = torch.as_tensor(stores.calibrate.rows.ids[row], dtype=torch.long)[None]
    with record(tiny_llama, [HOOK], stop=True) as seen:
        tiny_llama.hidden(ids, torch.ones_like(ids))
    mine = shard["acts"][shard["row"] == row].float()
    # Half precision on disk: a relative error of 2^-11.
    torch.testing.assert_close(mine, seen[HOOK][0, 1:], rtol=1e-3, atol=1e-4)


def test_gathering_skips_what_is_there_and_goes_on_after_an_interruption(
    tiny_llama: ModelHandle, stores: Stores, tmp_path: Path
) -> None:
    rows = stores.train.rows
    whole, halted = Store(tmp_path / "whole", rows, 1000), Store(tmp_path / "halted", rows, 1000)
    gather(tiny_llama, whole, [HOOK])
    with pytest.raises(Interrupted):
        gather(tiny_llama, halted, [HOOK], progress=stop_at(2))  # type: ignore[arg-type]
    assert halted.available(HOOK) == [0, 1]
    written = (tmp_path / "halted" / HOOK / "00000.safetensors").stat().st_mtime_ns
    gather(tiny_llama, halted, [HOOK])
    assert (tmp_path / "halted" / HOOK / "00000.safetensors").stat().st_mtime_ns == written
    assert whole.manifest() == halted.manifest()


def test_a_changed_shard_is_refused_and_other_rows_are_not_mistaken_for_it(
    tiny_llama: ModelHandle, stores: Stores, tmp_path: Path
) -> None:
    store = Store(tmp_path, stores.calibrate.rows, 1000)
    gather(tiny_llama, store, [HOOK])
    other = Store(
        tmp_path, texts.Rows(store.rows.ids[1:], store.rows.domain_of[1:], store.rows.domains), 1000
    )
    assert other.available(HOOK) == []
    with pytest.raises(StatisticsMismatchError):
        other.load(HOOK, 0)
    path = tmp_path / HOOK / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed"):
        store.load(HOOK, 0)


def test_a_longer_prefix_extends_the_store_instead_of_starting_anew(
    tiny_llama: ModelHandle, stores: Stores
) -> None:
    rows = stores.train.rows
    short = Store(stores.train.folder, rows.prefix(2500), 1000)
    long = Store(stores.train.folder, rows, 1000)
    assert short.shards[:2] == long.shards[:2]


def test_splicing_in_a_perfect_reconstruction_changes_no_loss(
    tiny_llama: ModelHandle, stores: Stores
) -> None:
    class Identity:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, latent_acts: torch.Tensor) -> torch.Tensor:
            return latent_acts

    rows = [row.tolist() for row in stores.test.rows.ids[:4]]
    mean = torch.cat(all_inliers(stores.train, HOOK)).float().mean(0)
    recovered, nats = quality.ce_recovered(tiny_llama, HOOK, Identity(), mean, 1e9, rows)
    assert nats["spliced"] == nats["original"] != nats["mean_ablated"]
    # On a random model the mean may even lower the loss: then there is no gap to recover, and no figure.
    assert recovered == 1.0 if nats["mean_ablated"] > nats["original"] else recovered != recovered


def test_half_precision_weights_are_what_the_file_holds(key: checkpoints.Sae) -> None:
    weights = Weights(key.W_enc, key.b_enc, key.W_dec, key.b_dec)
    assert torch.equal(to_half(weights).W_enc, key.W_enc)


def test_labels_name_the_tokens_that_drive_a_latent(key: checkpoints.Sae) -> None:
    firing = [f for f in range(key.d_sae) if key.firing_rate[f] > 0]
    assert all(key.labels[f].label.startswith("`") for f in firing)
    assert any("‹" in example for f in firing for example in key.labels[f].examples)


def test_show_refuses_a_latent_that_does_not_exist(key: checkpoints.Sae) -> None:
    assert command.show(key, [0])["latents"]
    with pytest.raises(BadRequestError, match="0 to 95"):
        command.show(key, [96])
