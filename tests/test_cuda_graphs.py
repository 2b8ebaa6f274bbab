"""Every kernel inside a CUDA graph: the replay gives the bits of eager, on new inputs too."""

from __future__ import annotations

import pytest
import torch

from bench.kernels import leaves_of, results_of
from bench.registry import KERNELS, ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_replay_gives_eager_bits(kernel):
    first, second = (
        kernel.module.make_inputs(**kernel.small, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (0, 1)
    )
    static = {name: value.clone() if torch.is_tensor(value) else value for name, value in first.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results_of(ours(kernel), static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    generator = torch.Generator("cuda").manual_seed(7)
    leaves = leaves_of(static)
    with torch.cuda.stream(stream):
        outputs = ours(kernel)(**leaves)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    upstream = [torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype) for o in outputs]
    wanted = [v for n, v in leaves.items() if torch.is_tensor(v) and v.requires_grad]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        again = ours(kernel)(**leaves)
        again = [o for o in (again if isinstance(again, tuple) else (again,)) if o.requires_grad]
        captured = [*again, *torch.autograd.grad(again, wanted, upstream)]
    for inputs in (first, second):
        with torch.no_grad():
            for name, value in inputs.items():
                if torch.is_tensor(value):
                    leaves[name].copy_(value)
        graph.replay()
        for replayed, eager in zip(captured, results_of(ours(kernel), inputs), strict=True):
            assert torch.equal(replayed, eager)
