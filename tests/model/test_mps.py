"""MPS, the GPU of Apple's processors. No test has run on one: what it lacks is looked up.

A training step and a generation run on the CPU, with attention put together from its parts as MPS
has it, and every operator that ran is looked up in PyTorch's own list of those that MPS has.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.device import device_name, pick_device, pick_dtype, widest_float
from nanovlm_fast.generate import generate
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.packing.documents import Document
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting import metrics
from nanovlm_fast.training import optim
from nanovlm_fast.training.optim import apply_gradients
from nanovlm_fast.training.setup import check_mps
from tests.support.mps import Recorder, operators, runs_on_mps
from tests.support.runs import trainer

MPS = torch.device("mps")


def missing(recorder: Recorder) -> list[str]:
    # Marks for a profiler compute nothing.
    names = {name for name in recorder.names if not name.startswith("profiler::")}
    return sorted(
        name
        for name in names
        if not (name.startswith("aten::") and runs_on_mps(name.removeprefix("aten::")))
    )


def test_the_list_knows_what_mps_has_and_what_not():
    assert len(operators()) > 2000
    for name in (
        "mm",
        "add.Tensor",
        "_fused_adamw_",
        "reshape",
        "zeros_like",
        "_foreach_add_.List",
    ):
        assert runs_on_mps(name), name
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
    ):
        assert not runs_on_mps(name), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_training_step_needs_nothing_that_mps_lacks(loop, tmp_path, monkeypatch, optimizer):
    """Forward, backward, clipping, the update and the statistics: no operator, no float64."""
    monkeypatch.setattr(metrics, "widest_float", lambda device: widest_float(MPS))
    options = f"--optimizer {optimizer} --clip 1 --accumulate 2 --max-steps 2 --augment shift"
    subject = trainer(loop, tmp_path, options)
    step = subject.optimizer_step

    recorder = Recorder()

    def recorded(*args):
        with recorder, sdpa_kernel(SDPBackend.MATH):
            step(*args)
            subject.stats.peek()()

    monkeypatch.setattr(subject, "optimizer_step", recorded)
    subject.train()
    assert len(recorder.names) > 50
    assert missing(recorder) == []
    assert torch.float64 not in recorder.types, recorder.types[torch.float64]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_a_generation_needs_nothing_that_mps_lacks(loop, tmp_path, sampling):
    model = trainer(loop, tmp_path, "--max-steps 1").model.eval()
    config = model.config
    size = config.vit_img_size
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    length = config.image_tokens + 4
    rows = np.full(length, -1, np.int32)
    rows[: config.image_tokens] = np.arange(config.image_tokens)
    prompt = Document(np.ones(length, np.int64), rows, np.full(length, -100))
    recorder = Recorder()
    with recorder, sdpa_kernel(SDPBackend.MATH):
        generate(model, images, [prompt, prompt], eos_id=0, max_new_tokens=3, **sampling)
    assert missing(recorder) == []
    assert torch.float64 not in recorder.types, recorder.types[torch.float64]


def test_what_is_chosen_there(monkeypatch):
    with pytest.raises(ValueError, match="sees no GPU of Apple's"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == MPS
    # Not by itself: it has not been tried.
    assert pick_device("auto").type != "mps"
    assert pick_dtype("auto", MPS) == torch.float32
    for name in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"--dtype {name}: on MPS only float32"):
            pick_dtype(name, MPS)
    assert device_name(MPS) == "MPS"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops = choose_ops("all", MPS)
    assert ops.asleep and ops.backend == "sdpa" and ops.vision_backend == "sdpa"


def test_what_it_cannot_do_is_refused_by_name():
    check_mps(TrainConfig(), World())
    check_mps(TrainConfig(compile="auto"), World())
    with pytest.raises(ValueError, match="is for one process"):
        check_mps(TrainConfig(), World(size=2))
    for options, said in ((dict(compile="default"), "--compile"), (dict(tune="again"), "--tune")):
        with pytest.raises(ValueError, match=said):
            check_mps(TrainConfig(**options), World())


class OnMps:
    """A norm that says that it is on MPS."""

    def __init__(self, value: torch.Tensor):
        self.value = value
        self.device = MPS


def test_gradients_that_are_not_finite_are_skipped_by_the_host(monkeypatch):
    """The fused AdamW of MPS does not read `found_inf`."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    model = torch.nn.Module()
    model.weight = weight

    def step_by(gradient: float) -> None:
        weight.grad = torch.full((3,), gradient)
        apply_gradients(model, [optimizer])

    def there(optimizers, norm) -> torch.Tensor:
        # As on MPS: the optimizers are not told.
        return (norm.value - norm.value).ne(0).float()

    monkeypatch.setattr(optim, "skip_if_not_finite", there)
    monkeypatch.setattr(optim, "whole", OnMps)
    step_by(float("nan"))
    assert torch.equal(weight, torch.ones(3)) and not optimizer.state
    step_by(1.0)
    assert not torch.equal(weight, torch.ones(3))
