"""Models replicated or sharded over ranks: DDP and FSDP2."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard_model(model: nn.Module, compile_blocks: bool) -> None:
    """FSDP2, in place: weights, gradients and optimizer state of each block in equal parts on all ranks (ZeRO-3).

    A block's weights are whole only while it computes; they stay float32, and so does what travels. `compile_blocks`
    compiles block by block: FSDP's hooks, which fetch and free weights, run between them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [*model.vision_encoder.blocks, *model.decoder.blocks]
    if compile_blocks:  # the `layer` of a language block is part of its graph's key
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, 4 * len(blocks)
        )
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view"
    )  # nothing is changed in place
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(
    model: nn.Module, step_model: Any, recompute: bool
) -> nn.parallel.DistributedDataParallel:
    """DDP around the model or its compiled form: gradients are averaged bucket by bucket while backward runs.

    A compiled graph is cut at the buckets, so that the first are on their way before backward is through; recomputation
    cannot be cut. The first backward of a static graph must reduce: the warm-up's does.
    """
    if recompute:
        torch._dynamo.config.optimize_ddp = False
    device = next(model.parameters()).device
    ddp = nn.parallel.DistributedDataParallel
    # tables of cosines need no broadcasting; from PyTorch 2.12 on the option has another name
    name = next(
        n
        for n in ("forward_sync_buffers", "broadcast_buffers")
        if n in inspect.signature(ddp).parameters
    )
    return ddp(
        step_model,
        device_ids=[device.index] if device.type == "cuda" else None,
        **{name: False},
        gradient_as_bucket_view=True,
        static_graph=True,
    )


@contextlib.contextmanager
def reducing(step_model: Any, now: bool) -> Iterator[None]:
    """Forward and backward in here reduce gradients over the ranks if `now`, and else add them up on this one."""
    context: AbstractContextManager = contextlib.nullcontext()
    if isinstance(step_model, nn.parallel.DistributedDataParallel) and not now:
        context = step_model.no_sync()
    elif hasattr(step_model, "set_requires_gradient_sync"):
        step_model.set_requires_gradient_sync(now)
    with context:
        yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or of a sharded one all of it: every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_shard_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `tensor` where `parameter`, of the same shape, is sharded; else the tensor itself."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.detach().to(parameter.device)
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def unsharded(model: nn.Module) -> nn.Module:
    """The model, or of a sharded one a whole copy, on every rank: all must ask."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    copy = type(model)(model.config, model.ops).to(next(model.parameters()).device)
    copy.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    copy.extra_config = model.extra_config
    return copy
