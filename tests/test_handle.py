"""Orientation, digests, tokenising and scoring targets, and leaving the model as it was found."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from guardedit.errors import BadRequestError
from guardedit.models import sources
from guardedit.models.handle import ModelHandle, preserved, tensor_digest
from guardedit.records import digest_of_bytes

PROMPTS = ["The capital of France is", "Alan Turing was born in", "Italy is a country in the"]
TARGETS = ["Paris", "London", "north of Rome"]


def edit(handle: ModelHandle, parameter: str) -> None:
    with torch.no_grad():
        handle.model.get_parameter(parameter).view(-1)[0] += 0.5


@pytest.fixture
def fresh(tiny: ModelHandle) -> ModelHandle:
    """A copy of its own, free to be written to."""
    return sources.load(str(tiny.folder))


def test_the_rewrite_parameter_is_the_storage_behind_weight(fresh: ModelHandle) -> None:
    for layer in range(fresh.n_layers):
        parameter = fresh.model.get_parameter(fresh.rewrite_parameter(layer))
        assert fresh.weight(layer).data_ptr() == parameter.data_ptr()
        assert tuple(fresh.weight(layer).shape) == (fresh.d_model, fresh.d_in(layer)) == (32, 64)
        assert tuple(parameter.shape) == ((64, 32) if fresh.architecture.transposed else (32, 64))


def test_a_layer_that_does_not_exist_is_refused(tiny: ModelHandle) -> None:
    for layer in (-1, 4):
        with pytest.raises(BadRequestError, match="layers 0 to 3"):
            tiny.rewrite_parameter(layer)


def test_loading_twice_gives_one_digest(tiny: ModelHandle, fresh: ModelHandle) -> None:
    assert fresh.manifest() == tiny.manifest()
    assert fresh.digest() == tiny.digest()


def test_the_manifest_names_every_parameter_once_and_hashes_its_bytes(tiny: ModelHandle) -> None:
    manifest = tiny.manifest()
    assert manifest.keys() == dict(tiny.model.named_parameters()).keys()
    assert not any(name.startswith(tiny.architecture.unembedding) for name in manifest), "tied: listed once"
    name = tiny.rewrite_parameter(1)
    assert manifest[name] == digest_of_bytes(tiny.model.get_parameter(name).detach().numpy().tobytes())


def test_a_digest_is_of_the_bytes_and_not_of_the_values() -> None:
    """-0.0 equals 0.0, and a float32 may hold a bfloat16's value: neither has the same bytes."""
    zero = torch.zeros(4)
    assert tensor_digest(zero) != tensor_digest(-zero)
    assert tensor_digest(zero) != tensor_digest(zero.bfloat16())
    assert tensor_digest(torch.arange(6.0).reshape(2, 3).T) == tensor_digest(
        torch.tensor([0.0, 3, 1, 4, 2, 5])
    )


def test_one_changed_weight_changes_the_digest(fresh: ModelHandle) -> None:
    before, manifest = fresh.digest(), fresh.manifest()
    edit(fresh, fresh.rewrite_parameter(2))
    changed = {name for name, digest in fresh.manifest().items() if digest != manifest[name]}
    assert fresh.digest() != before and changed == {fresh.rewrite_parameter(2)}


@pytest.mark.parametrize(
    ("hook_name", "told"),
    [
        ("blocks.2.hook_resid_pre", False),
        ("blocks.2.hook_attn_out", False),
        ("blocks.2.mlp.hook_post", False),
        ("blocks.2.mlp.out.hook_out", True),
        ("blocks.2.hook_mlp_out", True),
        ("blocks.2.hook_resid_post", True),
        ("blocks.3.hook_resid_pre", True),
    ],
)
def test_an_edit_is_upstream_of_its_own_output_only(fresh: ModelHandle, hook_name: str, told: bool) -> None:
    before = fresh.hook_digest(hook_name)
    edit(fresh, fresh.rewrite_parameter(2))
    assert (fresh.hook_digest(hook_name) != before) is told


def test_offsets_point_at_the_characters_and_padding_is_masked(tiny: ModelHandle) -> None:
    for side in ("right", "left"):
        encoded = tiny.encode(PROMPTS, side)
        for row, prompt in enumerate(PROMPTS):
            real = encoded["attention_mask"][row].bool()
            spans = encoded["offsets"][row][real].tolist()
            assert "".join(prompt[start:end] for start, end in spans) == prompt
            ids = encoded["input_ids"][row][real]
            assert tiny.tokenizer.decode(ids) == prompt
            assert bool(real[0 if side == "right" else -1]), side


def test_the_padding_side_does_not_move_a_token(every_family: ModelHandle) -> None:
    """Positions are counted from the first real token, so GPT-2's learned positions agree too."""
    states = {}
    for side in ("right", "left"):
        encoded = every_family.encode(PROMPTS, side)
        with torch.no_grad():
            hidden = every_family.hidden(encoded["input_ids"], encoded["attention_mask"])
        states[side] = hidden[encoded["attention_mask"].bool()]
    # Another mask shape sums in another order: a few float32 roundings.
    torch.testing.assert_close(states["right"], states["left"], rtol=1e-4, atol=1e-5)


def test_a_text_that_cannot_be_encoded_is_refused(tiny_llama: ModelHandle) -> None:
    for texts, complaint in (([""], "no tokens"), ([], "no texts"), (["word " * 300], "longer than")):
        with pytest.raises(BadRequestError, match=complaint):
            tiny_llama.encode(texts)
    with pytest.raises(BadRequestError, match="side"):
        tiny_llama.encode(["a"], side="both")


def test_a_written_bos_is_not_doubled(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    """A chat template writes BOS out; a tokenizer that adds one as well would shift every position."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.folder)
    tokenizer.bos_token = "<|end|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    handle = ModelHandle(tiny_llama.model, tokenizer, tiny_llama.architecture, "with bos", tmp_path)
    plain, written = (handle.encode([text])["input_ids"].tolist() for text in ("Paris", "<|end|>Paris"))
    assert plain == written and plain[0].count(tokenizer.bos_token_id) == 1


def test_target_logprobs_are_those_of_the_joined_text(tiny: ModelHandle) -> None:
    """Against one unbatched, unpadded forward pass each, with the log-softmax written out."""
    found = tiny.token_logprobs(PROMPTS, TARGETS, batch_size=2)
    for prompt, target, logprobs in zip(PROMPTS, TARGETS, found, strict=True):
        ids = torch.tensor([tiny.tokenizer(f"{prompt} {target}")["input_ids"]])
        n_prompt = len(tiny.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = tiny.model(ids).logits[0, n_prompt - 1 : -1]
        expected = logits[range(len(logits)), ids[0, n_prompt:]] - logits.logsumexp(-1)
        # Padded against unpadded: another order of summation.
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_a_target_gets_one_space_except_after_white_space(tiny_llama: ModelHandle) -> None:
    def target_text(prompt: str, target: str) -> str:
        batch = tiny_llama.encode_pairs([prompt], [target])
        return str(tiny_llama.tokenizer.decode(batch["input_ids"][batch["target_mask"]]))

    assert target_text("The capital is", "Rome") == " Rome"
    assert target_text("The capital is", " Rome ") == " Rome"
    assert target_text(tiny_llama.chat("What is the capital?"), "Rome") == "Rome"
    with pytest.raises(BadRequestError, match="empty"):
        tiny_llama.encode_pairs(["The capital is"], ["  "])
    with pytest.raises(BadRequestError, match="non-empty prompt"):
        tiny_llama.token_logprobs([""], ["Rome"])


def test_chat_ends_where_the_answer_begins(tiny_llama: ModelHandle) -> None:
    assert tiny_llama.chat("Who?") == "<|user|>\nWho?\n<|assistant|>\n"


def test_logits_come_from_the_final_normed_states(every_family: ModelHandle) -> None:
    encoded = every_family.encode(PROMPTS)
    last = torch.zeros_like(encoded["attention_mask"], dtype=torch.bool)
    last[range(3), encoded["attention_mask"].sum(1) - 1] = True
    with torch.no_grad():
        whole = every_family.model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits
        some = every_family.logits_at(
            every_family.hidden(encoded["input_ids"], encoded["attention_mask"]), last
        )
    # One row at a time or all at once: rounding of a sum over 32 terms.
    torch.testing.assert_close(some, whole[last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("raises", [False, True])
def test_preserved_restores_everything(fresh: ModelHandle, raises: bool) -> None:
    fresh.model.train()
    fresh.block(1).eval()
    fresh.model.get_parameter(fresh.rewrite_parameter(0)).requires_grad_(False)

    def trace() -> list[object]:
        flags = [parameter.requires_grad for parameter in fresh.model.parameters()]
        rng = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        return [[module.training for module in fresh.model.modules()], flags, rng, fresh.digest()]

    def body() -> None:
        with preserved(fresh):
            assert not fresh.model.training
            assert not any(parameter.requires_grad for parameter in fresh.model.parameters())
            torch.manual_seed(7), random.seed(7), np.random.seed(7)
            fresh.model.get_parameter(fresh.rewrite_parameter(1)).requires_grad_(True)
            if raises:
                raise KeyError("from the body")

    before = trace()
    if raises:
        with pytest.raises(KeyError):
            body()
    else:
        body()
    assert trace() == before


@pytest.mark.slow
def test_the_default_model_knows_its_capitals(default_handle: ModelHandle) -> None:
    """Converted right: 30 layers, tied embeddings, and France's capital is likelier Paris than Rome."""
    assert (default_handle.n_layers, default_handle.d_model, default_handle.d_in(0)) == (30, 576, 1536)
    embedding = default_handle.model.get_submodule(default_handle.architecture.embedding).weight
    assert default_handle.model.lm_head.weight is embedding
    paris, rome = default_handle.token_logprobs(["The capital of France is"] * 2, ["Paris", "Rome"])
    assert paris.sum() > rome.sum() + 3
    assert default_handle.encode(["Paris"])["input_ids"].shape == (1, 1), (
        "no BOS: a subject can be at position 0"
    )
