"""swiglu: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch

from nanovlm_fast.kernels.swiglu import (
    make_inputs,
    swiglu,
    swiglu_bwd,
    swiglu_fwd,
    swiglu_reference,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    transposed,
)

SHAPES = [(33, 1536), (5, 576), (1, 960), (199, 123), (7, 3072), (3, 1), (0, 1536)]


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype):
    check_parity(swiglu, swiglu_reference, make_inputs(*shape, dtype, DEVICE))


@on_the_gpu_too
def test_parity_at_nanovlms_size():
    rows = 32768 if DEVICE == "cuda" else 101
    check_parity(swiglu, swiglu_reference, make_inputs(rows, 1536, DTYPES[0], DEVICE))


@on_the_gpu_too
@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[0, 0]]
)
def test_not_contiguous_and_other_dimensions(view):
    gate_up = make_inputs(12, 62, DTYPES[0], DEVICE)["gate_up"].view(3, 4, 124)
    check_parity(swiglu, swiglu_reference, {"gate_up": view(gate_up)})


@on_the_gpu_too
def test_gradient_that_is_not_contiguous():
    inputs = make_inputs(6, 20, DTYPES[0], DEVICE)
    check_parity(transposed(swiglu), transposed(swiglu_reference), inputs)


@on_the_gpu_too
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_far_from_zero():
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e30], device=DEVICE)
    check_parity(
        swiglu, swiglu_reference, {"gate_up": torch.stack([gate, torch.ones_like(gate)], 1)}
    )


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(6, 48, DTYPES[0], DEVICE)
    check_compile(swiglu, inputs)
    gate_up = inputs["gate_up"]
    opcheck(swiglu_bwd, torch.randn_like(gate_up[:, :48]).contiguous(), gate_up)
    opcheck(swiglu_fwd, gate_up.requires_grad_())


def test_reference_gradients():
    check_reference_gradients(swiglu_reference, make_inputs(3, 5, torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.ones(4, 8, dtype=torch.int32), TypeError, "gate_up is torch.int32"),
        (torch.ones(4, 8, dtype=torch.float64), TypeError, "gate_up is torch.float64"),
        (torch.ones(4, 7), ValueError, r"gate_up has shape \(4, 7\), expected \(M, 2 N\)"),
        (torch.ones(4, 0), ValueError, "N > 0"),
        (torch.ones(2, 4, 8), ValueError, r"gate_up has shape \(2, 4, 8\)"),
        (torch.ones(4, 16)[:, ::2], ValueError, "gate_up must be contiguous"),
    ],
)
def test_wrong_arguments_are_named(gate_up, error, message):
    with pytest.raises(error, match=message):
        swiglu_fwd(gate_up)


@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (torch.ones(4, 8), ValueError, r"dy has shape \(4, 8\), expected \(4, 4\)"),
        (torch.ones(4, 4, dtype=torch.int32), TypeError, "dy is torch.int32"),
        (torch.ones(4, 8)[:, ::2], ValueError, "dy must be contiguous"),
    ],
)
def test_wrong_gradients_are_named(dy, error, message):
    with pytest.raises(error, match=message):
        swiglu_bwd(dy, torch.ones(4, 8))
