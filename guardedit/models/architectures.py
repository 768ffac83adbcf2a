"""One table for all model families: a new one is a row here and a tiny random config in the test fixtures."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Norm between the down projection and the residual stream. A row with one can be watched, but an edit no
    longer reaches the residual stream linearly."""

    def block_parts(self) -> tuple[str, ...]:
        """Paths that every block must have."""
        parts = (self.mlp, self.rewrite_module, self.attention)
        return parts if self.post_mlp_norm is None else (*parts, self.post_mlp_norm)

    def model_parts(self) -> tuple[str, ...]:
        """Paths that the whole model must have."""
        parts = (self.layers, self.embedding, self.final_norm, self.unembedding)
        return parts if self.positions is None else (*parts, self.positions)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="llama",
        layers="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        unembedding="lm_head",
        mlp="mlp",
        rewrite_module="mlp.down_proj",
        attention="self_attn",
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
)
"""Llama's row also fits its structural kin (Mistral, Qwen2, Qwen3, SmolLM2)."""

# A block part under one of these names sits between the down projection and the residual stream (Gemma 2, 3,
# OLMo 2). A row that does not name it would treat such a model as linear where it is not.
_POST_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")


def detect(model: nn.Module) -> Architecture:
    """The row whose paths exist in `model`, by structure and never by name.

    Raises UnknownArchitectureError naming, for each row, the first path that is missing.
    """
    misses = []
    for row in ARCHITECTURES:
        missing = _first_missing(model, row)
        if missing is None:
            return row
        misses.append(f"{row.name}: {missing}")
    raise UnknownArchitectureError(
        f"no row of the architecture table fits {type(model).__name__}. Looked for: {'; '.join(misses)}. "
        "To add a family, add one Architecture row to guardedit/models/architectures.py "
        "and one tiny random config to tests/conftest.py."
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
    return _wrong_orientation(model, row)


def _wrong_orientation(model: nn.Module, row: Architecture) -> str | None:
    """A complaint where the rewrite module's weight does not lie as `row.transposed` says."""
    path = f"{row.layers}.0.{row.rewrite_module}"
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear) == row.transposed:
        return f"{path} is a {type(module).__name__}, which does not go with transposed={row.transposed}"
    return None


def has_module(module: nn.Module, path: str) -> bool:
    """Whether `module` has a submodule at the dotted `path`."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
