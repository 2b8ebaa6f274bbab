"""`--stream bfloat16`: bfloat16 residual streams and working weights beside float32 masters."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model.ops import Ops, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.presets import preset
from nanovlm_fast.training.checkpoint import tensors_of
from nanovlm_fast.training.optim import KernelAdamW, apply_gradients, make_optimizers, set_lr
from nanovlm_fast.training.parallel import unsharded
from nanovlm_fast.training.steps import accumulate_gradients
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.model.test_parity import batch_of, mixed_samples
from tests.support import forks
from tests.support.runs import arguments, different_tensors, error_of, losses, train

BF16 = torch.bfloat16
STEPS = 6
NARROW = "--dtype bfloat16 --stream bfloat16"
AUTOCAST = autocast_to(BF16, torch.device("cpu"))


def a_model(small_config, stream: str = "bfloat16", working: bool = True) -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config, Ops(stream=stream))
    if working:
        model.keep_masters()
    return model


def a_batch(small_config, seed: int = 0) -> PackedBatch:
    return batch_of(mixed_samples(small_config, 9, np.random.default_rng(seed)), small_config)


def gradients(model: VisionLanguageModel, *batches: PackedBatch) -> dict[str, Tensor]:
    """The gradient of every parameter, in its own type."""
    accumulate_gradients(model, model, list(batches), 7.0, AUTOCAST)
    return {name: p.grad for name, p in model.named_parameters()}


def an_update(model: VisionLanguageModel, clip: float = 0.0, **options) -> list:
    """The optimizers after one update; each master and parameter has a gradient before it."""
    train = dataclasses.replace(preset("tiny")[1], optimizer="adamw", **options)
    optimizers = make_optimizers(model, train)
    set_lr(optimizers, 1.0)
    apply_gradients(model, optimizers, clip)
    return optimizers


# ---- what the model computes


def test_both_streams_and_their_gradients_are_bfloat16(small_config):
    model = a_model(small_config)
    seen: list[torch.dtype] = []

    def look(_block, taken: tuple, given: tuple) -> None:  # a vision block gives a bias or None too
        seen.extend(value.dtype for value in (taken[1], *given[:2]))
        given[0].register_hook(lambda gradient: seen.append(gradient.dtype))

    blocks = [*model.vision_encoder.blocks, *model.decoder.blocks]
    for block in blocks:
        block.register_forward_hook(look)
    with AUTOCAST():
        model(a_batch(small_config)).backward()
    assert len(seen) == 4 * len(blocks) and set(seen) == {BF16}


def test_working_weights_are_those_of_linear_layers(small_config):
    model = a_model(small_config)
    names = {name for name, p in model.named_parameters() if p.dtype == BF16}
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "decoder.head"
    }
    assert names == linear == set(model.masters.weights) and len(names) > 10
    for name, parameter in model.named_parameters():
        master = model.masters.of(parameter)
        assert (master is parameter) == (name not in names)
        assert master.dtype == torch.float32 and torch.equal(master.to(parameter.dtype), parameter)


def test_working_weights_compute_what_autocast_computes_to_the_bit(small_config):
    """Only where the rounding happens differs, so loss and gradients are the same bits."""
    batch = a_batch(small_config)
    ours = a_model(small_config, stream="float32")
    plain = a_model(small_config, stream="float32", working=False)
    losses_of = []
    for model in (ours, plain):
        with AUTOCAST():
            loss = model(batch)
        loss.backward()
        losses_of.append(loss.item())
    assert losses_of[0] == losses_of[1]
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == p.dtype and torch.equal(p.grad.float(), q.grad), name


# ---- gradients and updates


def test_micro_batches_add_up_in_float32(small_config):
    model = a_model(small_config)
    first = a_batch(small_config)
    second = a_batch(small_config, seed=1)
    parts = []
    for batch in (first, second):
        parts.append(gradients(model, batch))
        model.zero_grad()
    gradients(model, first, second)
    for name, parameter in model.named_parameters():
        summed = model.masters.of(parameter).grad
        expected = parts[0][name].float() + parts[1][name].float()
        assert summed.dtype == torch.float32 and torch.equal(summed, expected), name
    down = model.masters.weights["decoder.blocks.0.mlp.down_proj.weight"].grad
    assert (down != down.to(BF16)).float().mean() > 0.1, "the sums were rounded to bfloat16"


def test_an_update_too_small_for_bfloat16_reaches_the_masters(small_config):
    model = a_model(small_config)
    before = {name: one.clone() for name, one in model.masters.weights.items()}
    gradients(model, a_batch(small_config))
    small = dict(lr_projector=1e-6, lr_vision=1e-6, lr_language=1e-6, weight_decay=0.0)
    optimizers = an_update(model, **small)
    for name, master in model.masters.weights.items():
        if "mlp" in name:
            assert (master != before[name]).float().mean() > 0.9, name
        assert torch.equal(model.get_parameter(name), master.to(BF16)), name
    states = [slots for one in optimizers for slots in one.state.values()]
    assert {slot.dtype for slots in states for slot in slots.values()} == {torch.float32}
    assert all(p.grad is None for p in model.parameters())
    assert all(master.grad is None for master in model.masters.weights.values())


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_norm_and_the_clip_are_those_of_float32_gradients(small_config, clip):
    ours = a_model(small_config, stream="float32")
    plain = a_model(small_config, stream="float32", working=False)
    batch = a_batch(small_config)
    for model in (ours, plain):
        gradients(model, batch)
        an_update(model, clip)
    for name, weight in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_gradients_that_are_not_finite_change_nothing(small_config):
    model = a_model(small_config)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    gradients(model, a_batch(small_config))["decoder.norm.weight"][0] = float("nan")
    an_update(model, clip=1.0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


# ---- the kernel `adamw`, in Triton's interpreter


def updated(
    small_config, kernels: tuple[str, ...], stream: str, steps: list[int], optimizer: str
) -> dict:
    """Weights and optimizer state after steps of so many micro-batches, clipped."""
    model = a_model(small_config, stream, working=stream == "bfloat16")
    model.ops = dataclasses.replace(model.ops, kernels=kernels)
    optimizers = make_optimizers(model, dataclasses.replace(preset("tiny")[1], optimizer=optimizer))
    assert isinstance(optimizers[0], KernelAdamW) == bool(kernels)
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    for number, batches in enumerate(steps):
        set_lr(optimizers, 0.1 * (number + 1))
        gradients(model, *(a_batch(small_config, seed=seed) for seed in range(batches)))
        # Gradients stay allocated in graphs whose steps have several micro-batches.
        apply_gradients(model, optimizers, clip=0.5, keep_gradients=max(steps) > 1)
        for name, weight in model.masters.weights.items():
            rounded = weight.to(BF16)
            working = model.get_parameter(name)
            assert ((working - rounded).abs() <= rounded.abs() * 2**-7).all(), name
        # Triton's interpreter truncates, from where gradients and updates would part.
        model.masters.round()
    tensors = tensors_of(model, optimizers)
    return {**tensors.weights, **tensors.others}


@pytest.mark.parametrize(
    ("stream", "steps", "optimizer"),
    [
        ("bfloat16", [1, 1], "adamw"),
        ("bfloat16", [2, 1], "adamw"),
        ("bfloat16", [1], "muon"),
        ("float32", [1, 1], "adamw"),
    ],
)
def test_the_kernels_updates_are_those_of_pytorch(small_config, stream, steps, optimizer):
    """The same names, shapes and types too: a run may change between them when it resumes."""
    ours = updated(small_config, ("adamw",), stream, steps, optimizer)
    theirs = updated(small_config, (), stream, steps, optimizer)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            scale = 1e-6 * float(tensor.abs().max())
            torch.testing.assert_close(
                ours[name], tensor, rtol=1e-5, atol=scale, msg=lambda t, n=name: f"{n} {t}"
            )


def test_the_kernel_skips_what_is_not_finite(small_config):
    model = a_model(small_config)
    model.ops = dataclasses.replace(model.ops, kernels=("adamw",))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    gradients(model, a_batch(small_config))["MP.proj.weight"][0] = float("inf")
    (optimizer,) = an_update(model, clip=1.0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert {float(slots["step"]) for slots in optimizer.state.values()} == {0.0}
    assert all(p.grad is None for p in model.parameters())


def test_where_kernels_are_asleep_it_is_pytorchs(small_config):
    model = a_model(small_config, working=False)
    model.ops = choose_ops("adamw", "cpu")
    assert model.ops.updated_by_kernel  # in the interpreter
    model.ops = dataclasses.replace(model.ops, asleep=True)
    (optimizer,) = make_optimizers(model, dataclasses.replace(preset("tiny")[1], optimizer="adamw"))
    assert type(optimizer) is torch.optim.AdamW


# ---- what is saved and evaluated


def test_saved_and_evaluated_are_the_masters(small_config, tmp_path):
    model = a_model(small_config)
    gradients(model, a_batch(small_config))
    an_update(model)
    save_pretrained(tmp_path, model)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    down = stored["decoder.blocks.0.mlp.down_proj.weight"]
    assert (down != down.to(BF16)).any(), "rounded weights were saved"
    random = torch.get_rng_state()
    evaluated = unsharded(model)
    assert torch.equal(torch.get_rng_state(), random), "a resumed run would go on with another one"
    batch = a_batch(small_config)
    again = VisionLanguageModel(small_config)
    again.load_reference_state_dict(stored)
    assert torch.equal(evaluated.logits(batch), again.logits(batch))
    # The other way: what is read becomes the masters, and the working weights follow.
    empty = a_model(dataclasses.replace(small_config, init="scratch"))
    empty.load_reference_state_dict(stored)
    name = "decoder.blocks.0.mlp.down_proj.weight"
    assert torch.equal(empty.masters.weights[name], down)
    assert torch.equal(empty.get_parameter(name), down.to(BF16))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run in bfloat16, with Muon, whose last two checkpoints are there."""
    out = tmp_path_factory.mktemp("stream") / "run"
    options = f"{NARROW} --workers 0 --max-steps {STEPS} --no-final-eval --keep-checkpoints 2"
    result = train(out, options)
    assert result.returncode == 0, result.stderr
    assert "stream: bfloat16" in result.stdout
    return out


def interrupted(run: Path, to: Path) -> Path:
    """A copy of the run as it was after its third step."""
    copy = shutil.copytree(run, to / "copy", symlinks=True)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    return copy


def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path):
    copy = interrupted(run, tmp_path)
    result = train(copy, "--resume --no-final-eval")
    assert result.returncode == 0, result.stderr
    assert different_tensors(copy, run) == []
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / "last" / file) for r in (copy, run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("options", ["--stream float32", "--stream float32 --dtype float32"])
def test_a_checkpoint_resumes_in_either_stream(run, tmp_path, options):
    copy = interrupted(run, tmp_path)
    result = train(copy, f"--resume --no-final-eval {options}")
    assert result.returncode == 0, result.stderr
    assert losses(copy)[STEPS] == pytest.approx(losses(run)[STEPS], rel=1e-2)
    back = train(copy, f"--resume --no-final-eval {NARROW} --max-steps {STEPS + 1}")
    assert back.returncode == 0, back.stderr
    model, _ = load_pretrained(copy)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_two_ranks_train_as_two_micro_batches(tmp_path):
    """Gradients are averaged in float32, so only the order of sums differs."""
    options = f"{NARROW} --optimizer adamw --max-steps {STEPS} --no-final-eval"
    two = tmp_path / "two"
    with (tmp_path / "log").open("ab") as log:
        argv = arguments(two, f"{options} --workers 1")
        assert forks.run_ranks(argv, 2, log) == 0, (tmp_path / "log").read_text()[-2000:]
    one = tmp_path / "one"
    result = train(one, f"{options} --workers 2 --accumulate 2")
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(two)[STEPS] < losses(two)[1] - 0.5, "nothing was learnt"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--stream bfloat16 --dtype float32", ("--dtype bfloat16", "--stream float32")),
        (f"{NARROW} --shard --optimizer adamw", ("--shard", "--stream float32")),
        ("--stream half", ("--stream", "bfloat16")),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, options, words):
    error = error_of(train(tmp_path / "run", f"--max-steps 1 {options}"))
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_without_the_option_is_a_float32_run():
    assert TrainConfig().stream == "float32"
