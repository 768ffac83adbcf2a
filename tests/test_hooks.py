"""What hooks see, what they leave alone, and that they leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models import hooks, partial
from guardedit.models.handle import ModelHandle

TEXTS = ["The capital of France is Paris.", "Alan Turing was born in London. He was"]
POINTS = (
    "hook_resid_pre", "hook_attn_out", "mlp.hook_post", "mlp.out.hook_out", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip


def batch_of(handle: ModelHandle, texts: list[str] = TEXTS) -> tuple[Tensor, Tensor]:
    encoded = handle.encode(texts)
    return encoded["input_ids"], encoded["attention_mask"]


def everywhere(handle: ModelHandle) -> list[str]:
    return [f"blocks.{layer}.{point}" for layer in range(handle.n_layers) for point in POINTS]


@torch.no_grad()
def activations(handle: ModelHandle, names: list[str] | None = None) -> dict[str, Tensor]:
    with hooks.record(handle, names or everywhere(handle)) as seen:
        handle.hidden(*batch_of(handle))
    return seen


def test_the_residual_stream_adds_up(every_family: ModelHandle) -> None:
    """resid_post = resid_pre + attn_out + mlp_out, and one block's output is the next one's input."""
    seen = activations(every_family)
    for layer in range(every_family.n_layers):
        at = {point: seen[f"blocks.{layer}.{point}"] for point in POINTS}
        total = at["hook_resid_pre"] + at["hook_attn_out"] + at["hook_mlp_out"]
        # Same sums in the same order as the block's own: only association may differ in the last bit.
        torch.testing.assert_close(at["hook_resid_post"], total, rtol=1e-6, atol=1e-6)
        if layer + 1 < every_family.n_layers:
            assert torch.equal(at["hook_resid_post"], seen[f"blocks.{layer + 1}.hook_resid_pre"])


def test_the_rewrite_module_puts_out_the_weight_times_the_key(every_family: ModelHandle) -> None:
    """`weight` is (d_out, d_in) in both orientations: W·key + bias, before any norm; d_in is the key's width."""
    seen = activations(every_family)
    for layer in range(every_family.n_layers):
        key, out = seen[hooks.key_hook(layer)], seen[hooks.rewrite_hook(layer)]
        assert key.shape[-1] == every_family.d_in(layer) == 64 and out.shape[-1] == every_family.d_model == 32
        bias = getattr(
            every_family.block(layer).get_submodule(every_family.architecture.rewrite_module), "bias", None
        )
        expected = key @ every_family.weight(layer).T + (0 if bias is None else bias)
        # One matrix product in another memory layout: rounding of a sum over 64 terms.
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_an_early_stop_records_the_same_bits_and_runs_nothing_above(tiny: ModelHandle) -> None:
    names = ["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"]
    whole, reached = activations(tiny, names), []
    above = tiny.block(2).register_forward_hook(lambda *_: reached.append("block 2"))
    try:
        with torch.no_grad(), hooks.record(tiny, names, stop=True) as seen:
            tiny.hidden(*batch_of(tiny))
            reached.append("the rest of the body")
    finally:
        above.remove()
    assert reached == []
    assert all(torch.equal(seen[name], whole[name]) for name in names)


def test_an_inner_stop_does_not_pass_for_an_outer_record(tiny: ModelHandle) -> None:
    """The outer hook lies above the inner stop and saw nothing: an error, not an empty dict."""
    outer = hooks.record(tiny, ["blocks.3.hook_resid_post"])
    inner = hooks.record(tiny, ["blocks.1.hook_resid_pre"], stop=True)
    with pytest.raises(BadRequestError, match=r"blocks\.3\.hook_resid_post"), outer, inner:
        tiny.hidden(*batch_of(tiny))


@pytest.mark.parametrize("point", POINTS)
def test_a_patch_moves_what_lies_above_and_not_a_bit_below(every_family: ModelHandle, point: str) -> None:
    before, name = activations(every_family), f"blocks.2.{point}"
    with hooks.patch(every_family, name, lambda x: x + 0.5):
        after = activations(every_family)
    order = everywhere(every_family)
    for other in order[: order.index(name)]:
        assert torch.equal(before[other], after[other]), other
    assert torch.equal(after[name], before[name] + 0.5)
    assert not torch.equal(after["blocks.3.hook_resid_post"], before["blocks.3.hook_resid_post"])


def test_a_patch_that_changes_nothing_changes_not_a_bit(tiny: ModelHandle) -> None:
    before = activations(tiny)
    with hooks.patch(tiny, "blocks.1.hook_mlp_out", torch.clone):
        after = activations(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_patch_may_not_change_the_shape(tiny: ModelHandle) -> None:
    narrower = hooks.patch(tiny, "blocks.1.hook_mlp_out", lambda x: x[..., :1])
    with pytest.raises(BadRequestError, match=r"blocks\.1\.hook_mlp_out"), narrower:
        tiny.hidden(*batch_of(tiny))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_resuming_equals_the_whole_forward_bit_for_bit(every_family: ModelHandle, layer: int) -> None:
    """The blocks that run get the same input, mask and positions, so even rounding is the same."""
    with torch.no_grad():
        whole = every_family.hidden(*batch_of(every_family))
        start = activations(every_family, [f"blocks.{layer}.hook_resid_pre"])[
            f"blocks.{layer}.hook_resid_pre"
        ]
        with hooks.resume(every_family, layer, start):
            resumed = every_family.hidden(*batch_of(every_family))
    assert torch.equal(whole, resumed)


def test_gradients_flow_from_the_resumed_hidden_state(tiny: ModelHandle) -> None:
    """Against a central difference in float64, along a random direction."""
    name, generator = "blocks.2.hook_resid_pre", torch.Generator().manual_seed(0)
    start = activations(tiny, [name])[name].requires_grad_()
    direction = torch.randn(start.shape, generator=generator)

    def loss(hidden: Tensor) -> Tensor:
        with hooks.resume(tiny, 2, hidden):
            return tiny.hidden(*batch_of(tiny)).square().sum()

    (gradient,) = torch.autograd.grad(loss(start), start)
    step = 1e-2
    with torch.no_grad():
        slope = (loss(start + step * direction).double() - loss(start - step * direction).double()) / (
            2 * step
        )
    # A float32 loss near 1e3 differenced over 2e-2 leaves three digits.
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=0.5)


def test_a_skipped_block_cannot_be_recorded(tiny: ModelHandle) -> None:
    start = activations(tiny, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"]
    for name in ("blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"):
        resumed, recorded = hooks.resume(tiny, 2, start), hooks.record(tiny, [name])
        with pytest.raises(BadRequestError), resumed, recorded:
            tiny.hidden(*batch_of(tiny))


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
def test_an_mlp_gives_the_same_where_it_runs_and_nothing_elsewhere(
    every_family: ModelHandle, layer: int
) -> None:
    ids, mask = batch_of(every_family, TEXTS)
    out = f"blocks.{layer}.hook_mlp_out"
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with hooks.record(every_family, [out]) as whole:
        every_family.hidden(ids, mask)
    for kept in (keep, torch.zeros_like(keep)):
        with partial.mlp_only_at(every_family, layer, kept), hooks.record(every_family, [out]) as seen:
            every_family.hidden(ids, mask)
        torch.testing.assert_close(seen[out][kept], whole[out][kept], rtol=1e-5, atol=1e-5)
        assert bool((seen[out][~kept] == 0).all())
    assert 0 < int(keep.sum()) < keep.numel() and bool((whole[out] != 0).any())


@torch.no_grad()
def test_the_embedding_is_replaced_before_anything_is_added_to_it(every_family: ModelHandle) -> None:
    ids, mask = batch_of(every_family, TEXTS[:1])
    first = "blocks.0.hook_resid_pre"
    with hooks.record(every_family, [first], stop=True) as clean:
        every_family.hidden(ids, mask)
    with (
        hooks.patch_embedding(every_family, lambda rows: rows + 1),
        hooks.record(every_family, [first]) as moved,
    ):
        every_family.hidden(ids, mask)
    torch.testing.assert_close(moved[first], clean[first] + 1)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("blocks.4.hook_mlp_out", "layers 0 to 3"), ("blocks.1.hook_q", "unknown"), ("hook_embed", "unknown")],
)
def test_a_hook_name_that_does_not_exist_is_refused(
    tiny_llama: ModelHandle, name: str, complaint: str
) -> None:
    with pytest.raises(BadRequestError, match=complaint), hooks.record(tiny_llama, [name]):
        pass


def test_hooks_leave_no_trace_when_the_body_raises(tiny: ModelHandle) -> None:
    """The `left_as_found` fixture looks at hooks, forwards and weights after this."""
    before = activations(tiny)
    for context in (
        hooks.record(tiny, everywhere(tiny)),
        hooks.patch(tiny, "blocks.1.hook_resid_post", lambda x: x * 2),
        hooks.resume(tiny, 3, torch.zeros(2, 5, tiny.d_model)),
    ):
        with pytest.raises(KeyError), context:
            raise KeyError("from the body")
    after = activations(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_record_keeps_no_graph_unless_asked(tiny_llama: ModelHandle) -> None:
    name = "blocks.1.hook_resid_post"
    for detach in (True, False):
        with hooks.record(tiny_llama, [name], detach=detach) as seen:
            tiny_llama.hidden(*batch_of(tiny_llama))
        assert seen[name].requires_grad is not detach


@pytest.mark.slow
def test_hooks_see_what_transformer_lens_sees(default_handle: ModelHandle) -> None:
    """Same names, same activations as TransformerBridge's on the default model."""
    names = [f"blocks.9.{point}" for point in POINTS]
    input_ids, mask = batch_of(default_handle, TEXTS[:1])
    digest = default_handle.digest()
    bridge = default_handle.bridge()
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(input_ids, names_filter=names)
        with hooks.record(default_handle, names, stop=True) as ours:
            default_handle.hidden(input_ids, mask)
    for name in names:
        # The bridge computes attention eagerly, we by sdpa: fp32 rounding of another order of summation.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)
    assert default_handle.digest() == digest, "the bridge's copy is not the model"
