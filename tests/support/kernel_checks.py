"""The proofs that every kernel takes: used by one short test file per kernel.

On a machine without a GPU, the kernels run in Triton's interpreter, in float32. conftest.py
switches it on before they are imported. On a machine with a GPU, `pytest -m gpu` runs the same
checks on it in bfloat16 and float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
on_the_gpu_too = pytest.mark.gpu  # marks the checks that `pytest -m gpu` repeats on a device


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run(
    op: Callable, inputs: dict, fixed: tuple[str, ...] = (), seed: int = 1
) -> dict[str, Tensor]:
    """Outputs ('out0', ...) and gradients ('d x', ...) of `op` under random upstream gradients.

    Every floating-point input is differentiated, except those named in `fixed`. The upstream
    gradients are drawn in float32 and are the same for every dtype of the same shapes.
    """
    leaves = {
        n: v.detach().clone().requires_grad_(n not in fixed) if is_float(v) else v
        for n, v in inputs.items()
    }
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    grads = [
        torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
        for o in outputs
        if o.requires_grad
    ]
    torch.autograd.backward([o for o in outputs if o.requires_grad], grads)
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    gradients = {f"d {n}": v.grad for n, v in leaves.items() if is_float(v) and v.requires_grad}
    assert all(g is not None for g in gradients.values()), [
        n for n, g in gradients.items() if g is None
    ]
    return results | gradients


def transposed(op: Callable) -> Callable:
    """`op` with its output transposed, so that the upstream gradient is not contiguous."""
    return lambda **inputs: op(**inputs).mT


def check_parity(
    op: Callable, reference: Callable, inputs: dict, fixed: tuple[str, ...] = ()
) -> None:
    """Check every output and gradient by the design's rule.

    The rule is max|out-gt| <= 2 max|ref-gt| + 1e-5 max|gt|, where gt is the reference in float32
    and ref is the reference in the inputs' own dtypes. A second run must give the same bits.
    """
    wide = {name: value.float() if is_float(value) else value for name, value in inputs.items()}
    truth, plain = run(reference, wide, fixed), run(reference, inputs, fixed)
    with poisoned():
        ours, again = run(op, inputs, fixed), run(op, inputs, fixed)
    assert ours.keys() == truth.keys()
    for name, gt in truth.items():
        out, ref = ours[name], plain[name]
        assert out.shape == ref.shape and out.dtype == ref.dtype, (
            f"{name}: {out.dtype} {out.shape}, not {ref.dtype} {ref.shape}"
        )
        assert torch.equal(out, again[name]), f"{name}: not the same bits in a second run"
        if gt.numel() == 0:
            continue
        error, allowed = (out - gt).abs().max(), 2 * (ref - gt).abs().max() + 1e-5 * gt.abs().max()
        assert error <= allowed, (
            f"{name}: error {error:.3e}, allowed {allowed:.3e} at scale {gt.abs().max():.3e}"
        )


def check_compile(op: Callable, inputs: dict, fixed: tuple[str, ...] = ()) -> None:
    """torch.compile(fullgraph=True) around the op gives what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    eager, traced = run(op, inputs, fixed), run(compiled, inputs, fixed)
    for name, value in eager.items():
        torch.testing.assert_close(
            traced[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_reference_gradients(
    reference: Callable, inputs: dict, fixed: tuple[str, ...] = ()
) -> None:
    """The reference's own gradients against finite differences, in float64."""
    names = [name for name, value in inputs.items() if is_float(value)]
    leaves = [inputs[name].double().requires_grad_(name not in fixed) for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: reference(**{**inputs, **dict(zip(names, values, strict=True))}), leaves
    )


def opcheck(op: Callable, *arguments: object) -> None:
    """PyTorch's own checks of a custom operator.

    They check the schema, the fake implementation and the autograd registration.
    """
    torch.library.opcheck(op, arguments)
