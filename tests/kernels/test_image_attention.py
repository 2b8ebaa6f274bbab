"""image_attention: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.kernels.image_attention import (
    LARGEST,
    fits,
    image_attention,
    image_attention_bwd,
    image_attention_fwd,
    image_attention_reference,
    make_inputs,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    run,
)

# images, patches, heads, size of a head
SHAPES = [(2, 196, 2, 64), (3, 49, 3, 64), (1, 256, 1, 64), (2, 17, 2, 32), (1, 1, 1, 32)]


CASES = [
    (shape, dtype)
    for shape in (*SHAPES, (0, 196, 12, 64))
    for dtype in DTYPES
    # On a device, only what the model uses: large float32 images would compile for minutes.
    if DEVICE == "cpu" or fits(shape[1], shape[3], dtype)
]


@on_the_gpu_too
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_parity(shape, dtype):
    inputs = make_inputs(*shape, dtype, DEVICE)
    check_parity(image_attention, image_attention_reference, inputs)


@on_the_gpu_too
def test_parity_at_the_models_size():
    images = 1 if DEVICE == "cpu" else 256
    inputs = make_inputs(images, 196, 12, 64, DTYPES[0], DEVICE)
    check_parity(image_attention, image_attention_reference, inputs)


@on_the_gpu_too
def test_images_do_not_see_each_other():
    inputs = make_inputs(3, 20, 2, 32, torch.float32, DEVICE)
    before = image_attention(**inputs)
    inputs["qkv"][1] += torch.randn_like(inputs["qkv"][1])
    after = image_attention(**inputs)
    assert (before != after).flatten(1).any(1).tolist() == [False, True, False]


@on_the_gpu_too
def test_it_is_the_bias_and_then_attention():
    inputs = make_inputs(2, 33, 3, 32, torch.float32, DEVICE)

    def in_two_steps(qkv, bias, n_heads):
        q, k, v = (qkv + bias).unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    ours = run(image_attention, inputs)
    for name, value in run(in_two_steps, inputs).items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@on_the_gpu_too
def test_not_contiguous():
    inputs = make_inputs(2, 9, 1, 32, DTYPES[0], DEVICE)
    inputs["qkv"] = torch.randn(2, 9, 192, device=DEVICE).to(DTYPES[0])[:, :, ::2]
    inputs["bias"] = torch.randn(192, device=DEVICE)[::2]
    check_parity(image_attention, image_attention_reference, inputs)
    check_parity(
        lambda **i: image_attention(**i).transpose(0, 1),
        lambda **i: image_attention_reference(**i).transpose(0, 1),
        inputs,
    )  # the gradient arrives transposed


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(2, 9, 2, 32, DTYPES[0], DEVICE)
    check_compile(image_attention, inputs)
    dout = torch.randn(2, 9, 64, device=DEVICE).to(DTYPES[0])
    opcheck(image_attention_bwd, dout, *inputs.values())
    inputs["qkv"].requires_grad_()
    inputs["bias"].requires_grad_()
    opcheck(image_attention_fwd, *inputs.values())


def test_reference_gradients():
    inputs = make_inputs(2, 3, 2, 4, torch.float32, "cpu")
    check_reference_gradients(image_attention_reference, inputs)


def test_what_fits():
    assert fits(196, 64, torch.bfloat16) and fits(LARGEST // 2, 32, torch.float32)
    assert not fits(LARGEST + 1, 64, torch.bfloat16)
    assert not fits(LARGEST // 2 + 1, 64, torch.float32)
    assert not (fits(196, 128, torch.bfloat16) or fits(0, 64, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.ones(2, 4, 192, dtype=torch.int32)}, TypeError, "qkv is torch.int32"),
        ({"qkv": torch.ones(4, 192)}, ValueError, "qkv has shape"),
        ({"qkv": torch.ones(2, 4, 190)}, ValueError, "multiple of 3 \\* n_heads"),
        ({"qkv": torch.ones(2, 257, 192)}, ValueError, "257 patches, expected 1 to 256"),
        ({"n_heads": 0}, ValueError, "n_heads is 0"),
        ({"n_heads": 4}, ValueError, "heads have 16 columns"),
        ({"bias": torch.ones(191)}, ValueError, "bias has shape"),
        ({"bias": torch.ones(192, dtype=torch.int64)}, TypeError, "bias is torch.int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(2, 4, 2, 32, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        image_attention_fwd(**inputs)


def test_tiles_of_512_pixels_are_left_to_the_attention_backend():
    """1,024 patches: their scores do not fit the registers of a program."""
    assert fits(196, 64, torch.bfloat16)
    assert not fits(1024, 64, torch.bfloat16)
