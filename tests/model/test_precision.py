"""The precision policy of model/README.md against the types that a bfloat16 step computes in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model import reference
from nanovlm_fast.model.ops import KERNELS, PRODUCTS, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.presets import preset
from nanovlm_fast.training.optim import make_optimizers
from tests.model.test_parity import batch_of, mixed_samples
from tests.support.kernel_checks import DEVICE, GPU

BF16, FP32 = torch.bfloat16, torch.float32
# the kernels that multiply matrices need a GPU: Triton's interpreter has no bfloat16 product
CHOICES = [
    "none",
    ",".join(name for name in KERNELS if name not in PRODUCTS),
    *(["all"] if GPU else []),
]
bit_for_bit = pytest.mark.skipif(
    GPU, reason="on a GPU attention's backward adds up in no fixed order"
)
PRODUCT_OPS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution")
STATISTICS = (
    "layer_norm rms_norm rsqrt. pow. mean. var. log_softmax nll_loss logsumexp exp. embedding_dense"
).split()
with_kernels = pytest.mark.parametrize(
    "kernels", CHOICES, ids=["plain", "pointwise kernels", "all kernels"][: len(CHOICES)]
)


def float_dtypes(values: object) -> list[torch.dtype]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [v.dtype for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


class Watch(TorchDispatchMode):
    """Records every operation: its name and the floating-point types of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.dtype], list[torch.dtype]]] = []
        self.normalised: list[Tensor] = []  # the operations of PyTorch's own norms

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if str(op).startswith(("aten.native_layer_norm.", "aten._fused_rms_norm.", "aten.pow.")):
            self.normalised.append(args[0])
        self.seen.append((str(op), float_dtypes((args, kwargs)), float_dtypes(out)))
        return out

    def named(self, *parts: str) -> list[tuple[str, list[torch.dtype], list[torch.dtype]]]:
        return [seen for seen in self.seen if any(part in seen[0] for part in parts)]


def setting(
    config: VLMConfig, kernels: str, seed: int = 0
) -> tuple[VisionLanguageModel, PackedBatch]:
    """A model whose blocks all do something, and a batch in which documents share images."""
    torch.manual_seed(seed)
    ops = choose_ops(kernels, DEVICE, "auto", BF16)  # the attention that a run takes here
    model = VisionLanguageModel(config, ops).to(DEVICE)
    return model, batch_of(mixed_samples(config, 9, np.random.default_rng(seed)), config).to(DEVICE)


def loss_of(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    with autocast_to(torch.bfloat16, torch.device(DEVICE))():
        return model(batch) / batch.n_labels


def watched(config: VLMConfig, kernels: str) -> tuple[Watch, Watch, Tensor]:
    """The operations of the forward pass, those of the backward pass, and the loss."""
    model, batch = setting(config, kernels)
    with Watch() as forward:
        loss = loss_of(model, batch)
    with Watch() as backward:
        loss.backward()
    return forward, backward, loss


def assert_needs_float32(tensor: Tensor, what: str) -> None:
    """The tensor is float32, and its values are not all bfloat16 values."""
    assert tensor.dtype == FP32, f"{what} is {tensor.dtype}"
    assert (tensor != tensor.to(BF16)).float().mean() > 0.1, f"{what} was rounded to bfloat16"


@pytest.mark.gpu
@with_kernels
def test_matrix_products_take_bfloat16(small_config, kernels):
    forward, backward, _ = watched(small_config, kernels)
    for watch in (forward, backward):
        for name, dtypes, _ in watch.named(*PRODUCT_OPS):
            assert set(dtypes) == {BF16}, f"{name} computes in {dtypes}"
        attention = watch.named("_attention", "varlen")
        assert attention and all(set(dtypes[:3]) == {BF16} for _, dtypes, _ in attention)
    # patches, 4 per block, projector, head; backward each has two, but pixels take no gradient
    products = 1 + 4 * small_config.vit_n_blocks + 1 + 4 * small_config.lm_n_blocks + 1
    inside = dict.fromkeys(PRODUCTS, 1)  # products that a kernel's operator hides
    inside["gelu_mlp"] = 2 * small_config.vit_n_blocks
    inside["swiglu_mlp"] = 2 * small_config.lm_n_blocks
    products -= sum(inside.get(name, 0) for name in choose_ops(kernels).kernels)
    if kernels != "all":
        assert len(backward.named(*PRODUCT_OPS)) == 2 * products - 1
    assert len(forward.named(*PRODUCT_OPS)) == products


@pytest.mark.gpu
@with_kernels
def test_norms_softmax_and_loss_compute_in_float32(small_config, kernels):
    forward, backward, loss = watched(small_config, kernels)
    assert loss.dtype == FP32
    norms = 2 * small_config.vit_n_blocks + 1 + 2 * small_config.lm_n_blocks + 1
    ours = [seen for watch in (forward, backward) for seen in watch.named("nanovlm_fast.")]
    for name, dtypes, results in [*forward.named(*STATISTICS), *backward.named(*STATISTICS)]:
        if name.startswith("aten."):
            assert set(dtypes) | set(results) == {FP32}, (
                f"{name} takes {dtypes} and gives {results}"
            )
    for name, dtypes, results in ours:
        if (
            "norm_fwd" in name
        ):  # x may be bfloat16: y is what x is, the stream and the statistics are float32
            assert (
                set(dtypes[1:]) == {FP32} and results[0] == dtypes[0] and set(results[1:]) == {FP32}
            )
        elif (
            "norm_bwd" in name
        ):  # dx is what dy is, the stream's gradient may share its memory; weights' are float32
            assert set(dtypes[1:]) == {FP32} and results[-1] == FP32
    found = len(
        forward.named("aten.native_layer_norm", "aten.rsqrt", "aten._fused_rms_norm", "norm_fwd")
    )
    assert found == norms and forward.named("log_softmax", "linear_cross_entropy_fwd")
    assert len(forward.normalised) == (norms if kernels == "none" else 0)
    for x in forward.normalised:
        assert_needs_float32(x, "what a norm takes")
    # fused attention: its softmax shows as the log-sum-exp that it keeps for the backward
    attention = forward.named("_attention", "varlen")
    assert len(attention) == small_config.vit_n_blocks + small_config.lm_n_blocks
    assert all(results[1] == FP32 for _, _, results in attention)


@pytest.mark.gpu
@with_kernels
def test_the_residual_stream_and_its_gradient_are_float32(small_config, kernels):
    model, batch = setting(small_config, kernels)
    blocks = [*model.vision_encoder.blocks, *model.decoder.blocks]
    streams, gradients, deltas = [], [], []

    def look(_block, _arguments, out: tuple[Tensor, ...]) -> None:
        x, delta = out[:2]  # of the vision tower's blocks, a bias is the third
        streams.append(x.detach())
        deltas.append(delta.dtype)
        x.register_hook(lambda gradient: gradients.append(gradient))
        delta.register_hook(lambda gradient: deltas.append(gradient.dtype))

    for block in blocks:
        block.register_forward_hook(look)
    loss_of(model, batch).backward()
    assert len(streams) == len(gradients) == len(blocks) and set(deltas) == {BF16}
    for stream in streams:
        assert_needs_float32(stream, "the residual stream")
    for gradient in gradients:
        assert_needs_float32(gradient[gradient != 0], "the residual stream's gradient")


@bit_for_bit
@with_kernels
def test_the_tied_weight_adds_its_two_gradients_in_float32(small_config, kernels):
    tied, batch = setting(small_config, kernels)
    untied, _ = setting(dataclasses.replace(small_config, lm_tie_weights=False), kernels)
    untied.load_reference_state_dict(tied.reference_state_dict())
    for model in (tied, untied):
        loss_of(model, batch).backward()
    head, embedding = untied.decoder.head.weight.grad, untied.decoder.token_embedding.weight.grad
    both = embedding.abs().sum(1) > 0  # tokens that were also read
    assert_needs_float32((head + embedding)[both], "the sum")
    assert torch.equal(tied.decoder.token_embedding.weight.grad, head + embedding)


@bit_for_bit
@with_kernels
def test_micro_batches_add_up_in_float32(small_config, kernels):
    model, first = setting(small_config, kernels)
    _, second = setting(small_config, kernels, seed=1)
    parts = []
    for batch in (first, second):
        model.zero_grad()
        loss_of(model, batch).backward()
        parts.append({name: parameter.grad for name, parameter in model.named_parameters()})
    model.zero_grad()
    for batch in (first, second):
        loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        expected = parts[0][name] + parts[1][name]
        assert_needs_float32(expected[expected != 0], name)
        assert torch.equal(parameter.grad, expected), name


@pytest.mark.gpu
@with_kernels
def test_an_image_shown_by_many_documents_sums_its_gradient_in_float32(kernels):
    """On whole numbers: their sums are exact in float32, and wrong in bfloat16 beyond 256."""
    documents, tokens, width = 64, 9, 32
    gradient = torch.randint(-127, 128, (documents * tokens, width), device=DEVICE).float()
    rows = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(documents)
    images = torch.zeros(tokens, width, dtype=BF16, device=DEVICE, requires_grad=True)
    table = torch.zeros(5, width, device=DEVICE)
    choose_ops(kernels).embed_splice(torch.zeros_like(rows).long(), table, rows, images).backward(
        gradient
    )
    exact = gradient.view(documents, tokens, width).sum(0)
    # One rounding: half a unit in the last place, or a whole one in Triton's interpreter, which
    # truncates.
    assert images.grad.dtype == BF16 and ((images.grad - exact).abs() <= exact.abs() / 128).all()


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.875])
def test_bright_pictures_keep_their_bits(mean):
    """The folded normalisation gives what normalised pixels give, both in bfloat16."""
    config = dataclasses.replace(preset("tiny")[0], image_mean=mean, image_std=0.25)
    torch.manual_seed(0)
    ours, plain = (
        VisionLanguageModel(config).to(DEVICE),
        reference.VisionLanguageModel(config).to(DEVICE),
    )
    plain.load_state_dict(ours.reference_state_dict())
    images = torch.randint(200, 256, (16, 3, 64, 64), dtype=torch.uint8, device=DEVICE)
    pixels = (images.float() / 255 - mean) / config.image_std
    upstream = torch.randn(16, config.grid**2, config.vit_hidden_dim, device=DEVICE)

    def run(model: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedding = model.vision_encoder.patch_embedding
        with autocast_to(dtype, torch.device(DEVICE))():
            out = embedding(x)
        return out, torch.autograd.grad(out, embedding.conv.weight, upstream)[0]

    truth, ref = run(plain, pixels, torch.float32), run(plain, pixels, torch.bfloat16)
    for name, out, near, gt in zip(
        ("output", "gradient"), run(ours, images, torch.bfloat16), ref, truth, strict=True
    ):
        error, allowed = (out - gt).abs().max(), 2 * (near - gt).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_float32(small_config, optimizer):
    model, batch = setting(small_config, "none")
    rates = dict(
        lr_projector=1e-6, lr_vision=1e-6, lr_language=1e-6, weight_decay=0.0, muon_scale=1.0
    )
    optimizers = make_optimizers(
        model, dataclasses.replace(preset("tiny")[1], optimizer=optimizer, **rates)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss_of(model, batch).backward()
    for each in optimizers:
        each.step()
    parameters = dict(model.named_parameters())
    assert {tensor.dtype for p in parameters.values() for tensor in (p, p.grad)} == {FP32}
    states = [state for each in optimizers for state in each.state.values()]
    assert len(states) == len(parameters) and all(
        set(float_dtypes(state)) == {FP32} for state in states
    )
    # an update of a millionth, too small to change a bfloat16 weight
    for name in ("decoder.blocks.0.mlp.down_proj.weight", "vision_encoder.blocks.0.mlp.fc1.weight"):
        moved, old = parameters[name].detach(), before[name]
        assert (moved != old).float().mean() > 0.9 and (
            moved.to(BF16) == old.to(BF16)
        ).float().mean() > 0.9, name
