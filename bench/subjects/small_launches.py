"""One small forward and backward of every kernel: what bench/sanitize.sh runs under its tools.

python -m bench.subjects.small_launches --device cuda
"""

from __future__ import annotations

import sys

import torch

from bench.harness.passes import results_of
from bench.harness.timing import synchronize
from bench.subjects.operators import KERNELS, UPDATES
from bench.subjects.rivals import ours
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import make_current, pick_device

# Sizes that make more than one iteration of the pipelined loops: races appear between iterations.
LARGER: dict[str, dict] = {
    "rms_norm": dict(m=4500, n=576, residual=torch.float32),
    "layer_norm": dict(m=2500, n=768, residual=torch.float32),
    "pixel_shuffle_proj": dict(batch=3, height=14, width=14, channels=192, n=576, factor=2),
    "gelu_mlp": dict(m=150, c=320, inner=256),
    "swiglu_mlp": dict(m=150, c=320, inner=256),
    # Tiles of 128 and 256 keys, as in training; images of 196 patches end within a tile.
    "document_attention": dict(t=300, max_seqlen=128, n_q=9, n_kv=3, head_dim=64),
    "image_attention": dict(n=2, patches=196, n_heads=2, head_dim=64),
    "linear_cross_entropy": dict(rows=40, vocabulary=20000, width=64),
}


def make_parser() -> Parser:
    about = __doc__.splitlines()[0]
    parser = Parser(prog="python -m bench.subjects.small_launches", description=about)
    parser.add_argument("--device", default="auto")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    device = make_current(pick_device(make_parser().parse_args(argv).device))
    for kernel in KERNELS:
        sizes = LARGER.get(kernel.name, kernel.small)
        for dtype in (torch.bfloat16, torch.float32):
            inputs = kernel.module.make_inputs(**sizes, dtype=dtype, device=device.type)
            results_of(ours(kernel), inputs)
            synchronize()
        print(kernel.name, "ran")
    for kernel in UPDATES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = kernel.module.make_inputs(**kernel.small, dtype=dtype, device=device.type)
            # Without a GPU only the reference can run, as it does for the kernels above.
            (kernel.call if device.type == "cuda" else kernel.reference)(**inputs)
            synchronize()
        print(kernel.name, "ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
