"""Every kernel in float16: in Triton's interpreter, or on a GPU with `pytest -m gpu`.

The other files of this folder check the kernels in bfloat16 and float32.
"""

from __future__ import annotations

import pytest
import torch

from bench.subjects.operators import KERNELS, Kernel
from tests.support.kernel_checks import DEVICE, check_parity, on_the_gpu_too

# Tables of cosines and sines have no gradient.
FIXED = {"rotary": ("cos", "sin"), "document_attention": ("cos", "sin")}


@on_the_gpu_too
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_float16_is_as_exact_as_plain_pytorch(kernel: Kernel):
    inputs = kernel.module.make_inputs(**kernel.small, dtype=torch.float16, device=DEVICE)
    check_parity(kernel.call, kernel.reference, inputs, FIXED.get(kernel.name, ()))


def test_the_update_takes_no_float16_gradients():
    """Weights are float32 in float16 too, and so are their gradients: those of autograd."""
    from nanovlm_fast.kernels.adamw import adamw, make_inputs

    inputs = make_inputs([40], torch.float32, DEVICE)
    inputs["grads"] = [gradient.half() for gradient in inputs["grads"]]
    with pytest.raises(TypeError, match=r"grads\[0\] is torch\.float16"):
        adamw(**inputs)
