"""A loaded model with everything the other rooms ask of it."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guardedit.errors import BadModelError, BadRequestError
from guardedit.models import installed, tokens
from guardedit.models.architectures import Architecture
from guardedit.models.hooks import HookPoint
from guardedit.records import digest_of, digest_of_bytes, is_activation


@dataclass(frozen=True)
class ModelHandle:
    """Model, tokenizer and the row of the architecture table that fits it."""

    model: Any
    """A Hugging Face causal language model."""
    tokenizer: Any
    """Its fast tokenizer."""
    architecture: Architecture
    name: str
    """The name it was asked for by."""
    folder: Path
    """Where its safetensors files lie."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.model.get_submodule(self.architecture.layers))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.get_submodule(self.architecture.embedding).weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that edits write to."""
        return self._stored(0).dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go and recorded activations come back to: the token embedding's device.

        A model that is spread over devices has others beside: a weight's own is `weight(layer).device`.
        """
        return _runs_on(self.model.get_submodule(self.architecture.embedding))

    @property
    def context_length(self) -> int:
        """Longest sequence the model takes."""
        return int(self.model.config.max_position_embeddings)

    def block(self, layer: int) -> nn.Module:
        """Block `layer`; raises BadRequestError where there is none."""
        if not 0 <= layer < self.n_layers:
            raise BadRequestError(
                f"layer {layer} does not exist: {self.name} has layers 0 to {self.n_layers - 1}"
            )
        block: nn.Module = self.model.get_submodule(self.architecture.layers)[layer]
        return block

    def d_in(self, layer: int) -> int:
        """Width of the key space of `layer`: the input of its rewrite module."""
        return int(self._stored(layer).shape[0 if self.architecture.transposed else 1])

    def rewrite_parameter(self, layer: int) -> str:
        """Name of the parameter that an edit of `layer` writes to."""
        self.block(layer)
        return f"{self.architecture.layers}.{layer}.{self.architecture.rewrite_module}.weight"

    def weight(self, layer: int) -> Tensor:
        """The rewrite module's weight as (d_out, d_in): the parameter itself, or a transposed view of it.

        Raises BadModelError where the weight is offloaded, so that no device holds it.
        """
        stored = self.present(self.rewrite_parameter(layer), self._stored(layer))
        return stored.T if self.architecture.transposed else stored

    def _stored(self, layer: int) -> Tensor:
        """The rewrite module's weight as the model keeps it."""
        stored: Tensor = self.block(layer).get_submodule(self.architecture.rewrite_module).weight  # type: ignore[assignment]
        return stored

    def present(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter; raises BadModelError where its bytes are not in the model but with accelerate."""
        if parameter.is_meta:
            raise BadModelError(
                f"{self.name}: {name} is offloaded, no device holds its bytes, so it can be neither digested nor "
                "edited. Load the model without offloading: on the CPU (no device_map), in a smaller type, or with a "
                "device_map and max_memory under which every module fits a device"
            )
        return parameter

    def layer_of(self, parameter: str) -> int | None:
        """The block that a parameter lies in, or the lowest one of an activation edit; None for embeddings, final norm
        and unembedding."""
        if is_activation(parameter):
            return int(parameter.split(".")[1])
        prefix = f"{self.architecture.layers}."
        return int(parameter.removeprefix(prefix).split(".", 1)[0]) if parameter.startswith(prefix) else None

    def lowest_layer(self, parameters: Iterable[str]) -> int:
        """The lowest block that one of the parameters lies in; 0 where one lies outside the blocks."""
        return min((self.layer_of(name) or 0 for name in parameters), default=0)

    def is_transposed(self, parameter: str) -> bool:
        """Whether a linear map's weight is stored as (d_in, d_out), as in GPT-2's Conv1D."""
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        usual = isinstance(module, (nn.Linear, nn.Embedding))
        return self.architecture.transposed and not usual and self.model.get_parameter(parameter).ndim == 2

    def oriented(self, parameter: str) -> Tensor:
        """A parameter as edits see it: a linear map's weight as (d_out, d_in), all else as the model stores it.

        Raises BadModelError as `weight`.
        """
        stored = self.present(parameter, self.model.get_parameter(parameter))
        return stored.T if self.is_transposed(parameter) else stored

    def encode(self, texts: Sequence[str], side: str = "right") -> dict[str, Tensor]:
        """Tokenise and pad: `input_ids`, `attention_mask` (batch, seq), `offsets` (…, 2) in characters."""
        return tokens.pad(self, [tokens.tokenise(self, text) for text in texts], side)

    def encode_pairs(self, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise each prompt with its target behind it: `encode`, with `target_mask` (batch, seq) beside.

        The one place where targets are tokenised: see `tokens.join` for the space between the two.
        """
        return tokens.encode_pairs(self, prompts, targets)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states after the final norm, (batch, seq, d_model); no logits are computed."""
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=tokens.position_ids(attention_mask),
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state
        return states.to(input_ids.device)

    def logits_at(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits (n, vocab) of the positions that the boolean `rows` (batch, seq) selects, in row order."""
        logits: Tensor = self.model.get_submodule(self.architecture.unembedding)(hidden[rows])
        return self.capped(logits).to(hidden.device)

    def capped(self, logits: Tensor) -> Tensor:
        """What the model makes of its unembedding's output: bounded where the family does (Gemma 2), else as it is."""
        setting = self.architecture.logit_softcap
        cap = None if setting is None else getattr(self.model.config, setting, None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def token_logprobs(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 16
    ) -> list[Tensor]:
        """Log-probabilities (n_target_tokens,) in nats of each target after its prompt, teacher forced."""
        return tokens.token_logprobs(self, prompts, targets, batch_size)

    def chat(self, prompt: str) -> str:
        """One user message in the model's chat template, with the generation prompt after it."""
        if not self.tokenizer.chat_template:
            raise BadRequestError(f"{self.name} has no chat template; probe it with raw prompts")
        message = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def manifest(self) -> dict[str, str]:
        """Parameter name -> `sha256:…` of its raw bytes, read now; tied parameters appear once.

        Activation edits in force are in it, by their names and bytes.
        """
        named = self.model.named_parameters()
        weights = {name: tensor_digest(self.present(name, parameter)) for name, parameter in named}
        return weights | self._activation_digests()

    def _activation_digests(self) -> dict[str, str]:
        return {name: digest_of_bytes(edit.data) for name, edit in installed.edits_of(self).items()}

    def digest(self) -> str:
        """`sha256:…` of the manifest's canonical JSON."""
        return digest_of(self.manifest())

    def upstream_digest(self, layer: int) -> str:
        """Digest of the parameters that the keys of `layer` depend on; an edit of `layer` changes none."""
        return self.hook_digest(f"blocks.{layer}.mlp.hook_post")

    def hook_digest(self, hook_name: str, manifest: Mapping[str, str] | None = None) -> str:
        """Digest of the parameters upstream of a hook: what an activation recorded there depends on.

        Activation edits that act upstream of it, or there, are among them. With `manifest`, the digest for another
        version of the same model, without its weights.
        """
        point = HookPoint.parse(hook_name, self.n_layers)
        named = dict(self.model.named_parameters())
        upstream = [name for name in named if self._is_upstream(name, point)]
        known = self._activation_digests() if manifest is None else manifest
        edits = {name: known[name] for name in known if is_activation(name) and self._acts_by(name, point)}
        if manifest is not None:
            return digest_of(edits | {name: manifest[name] for name in upstream})
        return digest_of(edits | {name: tensor_digest(self.present(name, named[name])) for name in upstream})

    def _acts_by(self, parameter: str, point: HookPoint) -> bool:
        """Whether an activation edit can influence the activation at `point`; of one that is not installed, its name
        says no more than its lowest block."""
        edit = installed.edits_of(self).get(parameter)
        lowest = HookPoint(self.layer_of(parameter) or 0, 0)
        return (lowest if edit is None else edit.acts_at) <= point

    def _is_upstream(self, parameter: str, point: HookPoint) -> bool:
        """Whether `parameter` can influence the activation at `point`."""
        row = self.architecture
        if not parameter.startswith(f"{row.layers}."):
            # Embeddings, and whatever a family puts between them and the blocks.
            return not parameter.startswith((f"{row.final_norm}.", f"{row.unembedding}."))
        layer, rest = parameter.removeprefix(f"{row.layers}.").split(".", 1)
        if int(layer) != point.layer or point.point == "hook_resid_pre":
            return int(layer) < point.layer
        if point.point in ("hook_mlp_out", "hook_resid_post"):
            return True
        behind = (
            (row.post_mlp_norm,)
            if point.point == "mlp.out.hook_out"
            else (row.post_mlp_norm, row.rewrite_module)
        )
        return not rest.startswith(tuple(f"{part}." for part in behind if part is not None))

    def bridge(self) -> Any:
        """A transformer_lens TransformerBridge over a throw-away copy: booting one rewires its model."""
        from transformer_lens.model_bridge import TransformerBridge

        twin = copy.deepcopy(self.model)
        return TransformerBridge.boot_transformers(
            str(self.folder), hf_model=twin, tokenizer=copy.deepcopy(self.tokenizer), device=str(self.device)
        )


def _runs_on(module: nn.Module) -> torch.device:
    """The device that a module computes on; accelerate knows it where the weights are offloaded."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    known = [device for device in devices if device is not None]
    return torch.device(known[0]) if weight.is_meta and known else weight.device


def tensor_digest(tensor: Tensor) -> str:
    """`sha256:…` of a tensor's bytes in row-major order: those that its safetensors file holds."""
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return "sha256:" + hashlib.sha256(flat.numpy().data).hexdigest()


@contextmanager
def preserved(handle: ModelHandle) -> Iterator[None]:
    """Measure or solve without a trace: frozen and in eval mode inside; RNG, modes, flags restored."""
    model = handle.model
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
