"""One table for all model families: a new one is a row here and a tiny random config in the test fixtures.

A row is found by the modules that a model has, never by its name. A family that is not in the table can be loaded all
the same with a row of one's own: `sources.load(folder, architecture=Architecture(...))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from guardedit.errors import UnknownArchitectureError


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts. Paths of parts of a block are relative to the block."""

    name: str
    layers: str
    """The list of blocks."""
    embedding: str
    """Token embedding."""
    final_norm: str
    """Norm before the unembedding."""
    unembedding: str
    """Projection to the vocabulary."""
    mlp: str
    """The MLP inside a block."""
    rewrite_module: str
    """The MLP's down projection inside a block: the matrix that edits write to."""
    attention: str
    """The attention inside a block."""
    positions: str | None = None
    """Learned position embedding, where the family has one."""
    transposed: bool = False
    """True where the rewrite module stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""
    post_mlp_norm: str | None = None
    """Norm between the MLP and the residual stream (Gemma 2, Gemma 3, OLMo 2). An edit adds ΔW x before it."""
    post_attention_norm: str | None = None
    """Norm between the attention and the residual stream. Not to be taken from a module's name: Llama calls the norm
    *before* its MLP post_attention_layernorm."""
    returns_tuple: bool = False
    """True where a block returns (hidden states, …) and not the hidden states alone, as GPT-J's does."""
    logit_softcap: str | None = None
    """Setting of the model's configuration that bounds the logits: c·tanh(logits / c); a value of None is no bound."""
    prefix_cache: bool = True
    """False where keys and values do not say all about the tokens before: they are then run again each time."""

    def block_parts(self) -> tuple[str, ...]:
        """Paths that every block must have."""
        parts = (self.mlp, self.rewrite_module, self.attention, self.post_mlp_norm, self.post_attention_norm)
        return tuple(part for part in parts if part is not None)

    def model_parts(self) -> tuple[str, ...]:
        """Paths that the whole model must have."""
        parts = (self.layers, self.embedding, self.final_norm, self.unembedding, self.positions)
        return tuple(part for part in parts if part is not None)


_LLAMA = Architecture(
    name="llama",
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    unembedding="lm_head",
    mlp="mlp",
    rewrite_module="mlp.down_proj",
    attention="self_attn",
)
_GPT_NEOX = Architecture(
    name="gpt_neox",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    unembedding="lm_head",
    mlp="mlp",
    rewrite_module="mlp.dense_4h_to_h",
    attention="attention",
)

ARCHITECTURES: tuple[Architecture, ...] = (
    _LLAMA,
    replace(
        _LLAMA,
        name="gemma2",
        post_mlp_norm="post_feedforward_layernorm",
        post_attention_norm="post_attention_layernorm",
        logit_softcap="final_logit_softcapping",
    ),
    Architecture(
        name="gpt2",
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        unembedding="lm_head",
        mlp="mlp",
        rewrite_module="mlp.c_proj",
        attention="attn",
        positions="transformer.wpe",
        transposed=True,
    ),
    Architecture(
        name="gptj",
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        unembedding="lm_head",
        mlp="mlp",
        rewrite_module="mlp.fc_out",
        attention="attn",
        returns_tuple=True,
    ),
    _GPT_NEOX,
    # The name that transformers gave the same module before.
    replace(_GPT_NEOX, name="gpt_neox_embed_out", unembedding="embed_out"),
)
"""Llama's row also fits Mistral, Qwen2, Qwen3, SmolLM2 and Phi-3, Gemma 2's fits Gemma 3 (text) and OLMo 2,
GPT-NeoX's fits Pythia."""

# A block part under one of these names sits between the MLP and the residual stream. A row that does not name it
# would take the MLP's output for what the stream gets.
_POST_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# Settings that scale what a block adds or what the unembedding puts out (Granite, Cohere, Gemma 2), where they are
# neither None nor 1. A row that does not name it would read other logits or another stream than the model's.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "residual_multiplier")


def detect(model: nn.Module, rows: Sequence[Architecture] = ARCHITECTURES) -> Architecture:
    """The first of `rows` whose paths exist in `model`, by structure and never by name.

    Raises UnknownArchitectureError naming, for each row, the first path that is missing.
    """
    misses = []
    for row in rows:
        missing = _first_missing(model, row)
        if missing is None:
            return row
        misses.append(f"{row.name}: {missing}")
    raise UnknownArchitectureError(
        f"no row of the architecture table fits {type(model).__name__}. Looked for: {'; '.join(misses)}. "
        "Describe the family by one guardedit.models.architectures.Architecture(...) and load the model with "
        "guardedit.models.sources.load(..., architecture=row). For everybody, add the row to "
        "guardedit/models/architectures.py and one tiny random config to tests/conftest.py."
    )


def _first_missing(model: nn.Module, row: Architecture) -> str | None:
    """The first path that `row` wants and `model` lacks, or None where all is there."""
    for path in row.model_parts():
        if not has_module(model, path):
            return f"no {path}"
    blocks = model.get_submodule(row.layers)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        return f"{row.layers} is not a list of blocks"
    for index, block in enumerate(blocks):
        for path in row.block_parts():
            if not has_module(block, path):
                return f"no {row.layers}.{index}.{path}"
        for path in _POST_MLP_NORMS:
            if path != row.post_mlp_norm and has_module(block, path):
                return f"{row.layers}.{index}.{path} is a norm after the MLP, which this row does not expect"
    return _wrong_orientation(model, row) or _unexpected_scale(model, row)


def _wrong_orientation(model: nn.Module, row: Architecture) -> str | None:
    """A complaint where the rewrite module's weight does not lie as `row.transposed` says."""
    path = f"{row.layers}.0.{row.rewrite_module}"
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear) == row.transposed:
        return f"{path} is a {type(module).__name__}, which does not go with transposed={row.transposed}"
    return None


def _unexpected_scale(model: nn.Module, row: Architecture) -> str | None:
    """A complaint where the configuration scales something that the row takes as it is."""
    config = getattr(model, "config", None)
    for name in _SCALES:
        value = getattr(config, name, None)
        if name != row.logit_softcap and value is not None and value != 1:
            return f"config.{name} is {value}, which this row does not expect"
    return None


def has_module(module: nn.Module, path: str) -> bool:
    """Whether `module` has a submodule at the dotted `path`."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
