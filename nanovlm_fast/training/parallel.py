"""The model on several ranks: replicated (DDP, or `Averaging`) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm_fast.model.lora import merged_state
from nanovlm_fast.model.packed import VisionBlock, VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch


def shard_model(model: VisionLanguageModel, compiling: dict[str, Any] | None) -> None:
    """Shard weights, gradients and optimizer state over all ranks, in place (FSDP2, ZeRO-3).

    A block's weights are whole only while it computes. They stay float32, and so does what travels.
    With `compiling`, the arguments of torch.compile, blocks are compiled one by one, because FSDP's
    hooks, which gather and free weights, run between them.
    """
    # Imported here, because a run in one process needs none of it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [*model.vision_encoder.blocks, *model.decoder.blocks]
    if compiling:
        # The `layer` of a language block is part of its graph's key, so each block is a
        # recompilation of the same function, and the default limit is 8.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
        for block in blocks:
            block.compile(**compiling)
    # The views are not changed in place, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.vision_encoder.blocks:
        assert isinstance(block, VisionBlock)
        block.keeps_last_bias = True
    # From the inside out: the outermost call takes the parameters that no block has taken.
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(
    model: nn.Module, step_model: Any, recompute: bool
) -> nn.parallel.DistributedDataParallel:
    """Wrap the model or its compiled form in DDP, which averages gradients during backward.

    Gradients are reduced bucket by bucket. A compiled graph is cut at the buckets, so that the
    first ones are on their way before backward is done. The first backward of a static graph must
    reduce; the warm-up's does.
    """
    # DDP's cuts cannot go through a region that is recomputed.
    if recompute:
        torch._dynamo.config.optimize_ddp = False
    device = next(model.parameters()).device
    ddp = nn.parallel.DistributedDataParallel
    options: dict[str, Any] = {}
    # Buffers are tables of cosines, the same on all ranks. The option that keeps DDP from
    # broadcasting them before every forward has another name from PyTorch 2.12 on.
    for name in ("forward_sync_buffers", "broadcast_buffers"):
        if name in inspect.signature(ddp).parameters:
            options[name] = False
            break
    return ddp(
        step_model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=True,
        **options,
    )


# Values per all-reduce of `Averaging`: 128 MB of float32, which amortise a collective's latency.
BUCKET = 2**25


class Averaging:
    """A model with working weights on several ranks: gradients are averaged after the backward.

    DDP would add them up in bfloat16, rank by rank. Here their float32 sums travel, once per step
    and after the last backward: as exact as without working weights, and not hidden behind it.
    """

    def __init__(self, model: VisionLanguageModel, step_model: Callable[[PackedBatch], Tensor]):
        self.model = model
        self.step_model = step_model
        self.masters = model.masters

    def __call__(self, batch: PackedBatch) -> Tensor:
        return self.step_model(batch)

    @torch.no_grad()
    def average(self) -> None:
        """Average every gradient over the ranks, in float32. A collective."""
        self.masters.add_gradients()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        weights = self.masters.of_all(trained)
        for weight in weights:
            # A rank without a gradient contributes zeros: all ranks reduce the same buckets.
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat.div_(dist.get_world_size()))
            parts = flat.split([gradient.numel() for gradient in bucket])
            shaped = [part.view_as(one) for part, one in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, shaped)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into runs of at most BUCKET values, or of one tensor that is larger."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@contextlib.contextmanager
def reducing(step_model: Any, now: bool) -> Iterator[None]:
    """Reduce gradients over the ranks in this block if `now`, else accumulate them on this rank.

    Both forward and backward must be in the block.
    """
    context: AbstractContextManager = contextlib.nullcontext()
    if isinstance(step_model, nn.parallel.DistributedDataParallel) and not now:
        context = step_model.no_sync()
    elif hasattr(step_model, "set_requires_gradient_sync"):  # FSDP2's
        step_model.set_requires_gradient_sync(now)
    with context:
        yield
    if isinstance(step_model, Averaging) and now:
        step_model.average()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one. A collective: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_shard_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `tensor` if the `parameter` of the same shape is sharded; else all."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    tensor = tensor.detach().to(parameter.device)
    # No source rank: all ranks have read the same file, so nothing is sent.
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def unsharded(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model itself, or a whole float32 copy of one that is sharded or has working weights.

    Every rank gets it, and must call it: gathering shards is a collective. In a copy, adapters are
    merged into what they adapt.
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if not (sharded or model.masters):
        return model
    # As `evaluate` computes it later: the checkpoint does not know the stream it was trained with.
    ops = dataclasses.replace(model.ops, stream="float32")
    device = next(model.parameters()).device
    # An evaluation must not move the run's random state, from which initial weights are drawn.
    with torch.random.fork_rng(devices=[]):
        # Not type(model): `fully_shard` has replaced the class of the sharded one by a subclass.
        copy = VisionLanguageModel(model.config, ops).to(device)
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(merged_state(model, state))
    copy.extra_config = model.extra_config
    return copy
