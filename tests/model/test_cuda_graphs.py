"""Every kernel inside a CUDA graph: the replay gives the bits of eager, on new inputs too."""

from __future__ import annotations

import pytest
import torch

from bench.harness.passes import as_tuple, leaves_of, results_of, upstream
from bench.subjects.operators import KERNELS
from bench.subjects.rivals import ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_replay_gives_eager_bits(kernel, dtype):
    first, second = (
        kernel.module.make_inputs(**kernel.small, dtype=dtype, device="cuda", seed=seed)
        for seed in (0, 1)
    )
    static = {
        name: value.clone() if torch.is_tensor(value) else value for name, value in first.items()
    }
    leaves = leaves_of(static)
    wanted = [v for v in leaves.values() if torch.is_tensor(v) and v.requires_grad]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results_of(ours(kernel), static)  # compiles
        outputs = [o for o in as_tuple(ours(kernel)(**leaves)) if o.requires_grad]
        given = upstream(outputs)
        del outputs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [o for o in as_tuple(ours(kernel)(**leaves)) if o.requires_grad]
        captured = [*outputs, *torch.autograd.grad(outputs, wanted, given)]
    for inputs in (first, second):
        with torch.no_grad():
            for name, value in inputs.items():
                if torch.is_tensor(value):
                    leaves[name].copy_(value)
        graph.replay()
        for replayed, eager in zip(captured, results_of(ours(kernel), inputs), strict=True):
            assert torch.equal(replayed, eager)
