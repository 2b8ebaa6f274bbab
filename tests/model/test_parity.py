"""The packed model against the reference, per document: loss, logits and every gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model import packed as fast
from nanovlm_fast.model import reference
from nanovlm_fast.model.attention import unfit_for_flash
from nanovlm_fast.model.ops import KERNELS, Ops, choose_ops
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import IGNORE, Sample
from nanovlm_fast.packing.packer import Budget
from tests.support.kernel_checks import DEVICE, GPU
from tests.support.processes import ROOT
from tests.support.samples import SMALL, random_document, random_sample

# Heads as the 222M model has them, so that the attention's kernels are those of real runs.
HEADS_OF_64 = dict(
    vit_hidden_dim=128, vit_n_heads=2, lm_hidden_dim=192, lm_n_heads=3, lm_n_kv_heads=1,
    vit_n_blocks=1, lm_n_blocks=2,
)  # fmt: skip


def twins(config: VLMConfig) -> tuple[fast.VisionLanguageModel, reference.VisionLanguageModel]:
    packed, plain = fast.VisionLanguageModel(config), reference.VisionLanguageModel(config)
    plain.load_state_dict(packed.reference_state_dict())
    return packed, plain


def batch_of(samples: list[Sample], config: VLMConfig, spare: int = 13) -> PackedBatch:
    """All samples in one batch, with some padding of every kind."""
    longest = max(len(d) for s in samples for d in s.documents)
    tokens = sum(s.tokens for s in samples) + spare
    documents = sum(len(s.documents) for s in samples) + 2 + -(-spare // longest)
    images, labels = sum(len(s.images) for s in samples) + 1, sum(s.labels for s in samples) + 3
    return pack(
        samples,
        Budget(tokens, documents, images, labels, longest),
        config.image_tokens,
        config.vit_img_size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_without_images_trains_nothing_beside_a_frozen_language_model(small_config, dtype):
    """As a batch of mixed data may be, cut to what is in it: a step of zeros, and no error."""
    model = fast.VisionLanguageModel(small_config)
    model.decoder.requires_grad_(False)
    sample = random_sample(np.random.default_rng(0), small_config, n_images=0)
    batch = batch_of([sample], small_config).trimmed()
    assert len(batch.images) == 0
    with autocast_to(dtype, torch.device("cpu"))():
        loss = model(batch)
    loss.backward()
    found = [p.grad for p in (*model.vision_encoder.parameters(), *model.MP.parameters())]
    assert all(grad is not None and not grad.any() for grad in found)


def run_reference(
    model: reference.VisionLanguageModel, samples: list[Sample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, logits at labelled positions), each document by itself and without padding."""
    config, losses, logits = model.config, [], []
    for sample in samples:
        pixels = (
            torch.from_numpy(sample.images).float() / 255 - config.image_mean
        ) / config.image_std
        for document in sample.documents:
            text = torch.from_numpy(document.image_rows < 0)
            ids, labels = (
                torch.from_numpy(document.input_ids)[text],
                torch.from_numpy(document.labels)[text],
            )
            shown = pixels[None] if len(document) > int(text.sum()) else None
            out, loss = model(ids[None], shown, targets=labels[None])
            if (labels != IGNORE).any():
                losses.append(loss * (labels != IGNORE).sum())
                logits.append(out[0, labels != IGNORE])
    return torch.stack(losses).sum(), torch.cat(logits)


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, name: str, tolerance: float = 1e-5
) -> None:
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(scale, 1e-6), f"{name}: off by {error:.2e} at scale {scale:.2e}"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the reference's names, from either of the two models."""
    named = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return (
        named
        if isinstance(model, reference.VisionLanguageModel)
        else model.by_reference_name(named)
    )


def mixed_samples(config: VLMConfig, n_documents: int, rng: np.random.Generator) -> list[Sample]:
    """n_documents documents: with one image, with a shared image, with none and with two."""
    samples: list[Sample] = []
    kinds = [(1, 1), (1, 4), (0, 1), (2, 1), (2, 3)]
    while (left := n_documents - sum(len(s.documents) for s in samples)) > 0:
        n_images, documents = kinds[len(samples) % len(kinds)]
        samples.append(
            random_sample(rng, config, n_images, min(documents, left), f"sample-{len(samples)}")
        )
    return samples


@pytest.mark.parametrize("n_documents", [1, 2, 9, 50])
@pytest.mark.parametrize(
    "changes", [{}, {"lm_tie_weights": False, "lm_n_kv_heads": 6}, {"init": "scratch"}]
)
def test_loss_logits_and_gradients_equal_the_reference(small_config, n_documents, changes):
    config = VLMConfig(**{**vars(small_config), **changes})
    packed, plain = twins(config)
    samples = mixed_samples(config, n_documents, np.random.default_rng(n_documents))
    batch = batch_of(samples, config)
    loss, logits = packed(batch), packed.logits(batch)[: batch.n_labels]
    expected_loss, expected_logits = run_reference(plain, samples)
    assert_close(loss, expected_loss, "loss")
    assert_close(logits, expected_logits, "logits")
    upstream = torch.randn_like(
        expected_logits
    )  # random gradients reach what the loss alone might not
    (loss / batch.n_labels + (logits * upstream).sum()).backward()
    (expected_loss / batch.n_labels + (expected_logits * upstream).sum()).backward()
    ours, theirs = gradients(packed), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernels", [*(name for name in KERNELS if (ROOT / "kernels" / f"{name}.py").exists()), "all"]
)
def test_with_kernels_it_still_equals_the_reference(small_config, kernels):
    """Each kernel alone and all together, in Triton's interpreter where there is no GPU."""
    # heads of 32: the attention kernels take none that are smaller
    language = dict(lm_hidden_dim=96, lm_n_heads=3, lm_n_kv_heads=1)
    config = dataclasses.replace(small_config, vit_hidden_dim=96, vit_n_heads=3, **language)
    packed, plain = twins(config)
    packed.ops = choose_ops(kernels)
    assert packed.ops.kernels == (KERNELS if kernels == "all" else (kernels,))
    samples = mixed_samples(config, 6, np.random.default_rng(1))
    longest = max(len(document) for sample in samples for document in sample.documents)
    with_attention = kernels in ("document_attention", "all")
    assert packed.ops.in_documents(longest, config.head_dim, torch.float32) == with_attention
    assert packed.ops.in_images(16, 32, torch.float32) == (kernels in ("image_attention", "all"))
    expected, _ = run_reference(plain, samples)
    n_labels = sum(sample.labels for sample in samples)
    (expected / n_labels).backward()
    (packed.to(DEVICE)(batch_of(samples, config).to(DEVICE)) / n_labels).backward()
    ours, theirs = gradients(packed.cpu()), gradients(plain)
    for name, gradient in theirs.items():
        assert_close(ours[name].cpu(), gradient, name, tolerance=5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kernels", ["none", *KERNELS, "all"])
def test_as_a_run_computes_it_is_as_near_to_the_reference_as_plain_pytorch(kernels, compiled):
    """The attention that `auto` takes here, under autocast; twice the error of plain PyTorch.

    The reference is in float32 and takes one document at a time. On a CPU `none` and `all` run too,
    so that nothing here breaks unnoticed: `all` in float32, since Triton's interpreter cannot
    multiply bfloat16.
    """
    if not GPU and (kernels, compiled) not in (("none", False), ("none", True), ("all", True)):
        pytest.skip("on a CPU the test above has them")
    config = VLMConfig(**SMALL | HEADS_OF_64)
    dtype = torch.bfloat16 if GPU or kernels == "none" else torch.float32
    device = torch.device(DEVICE)
    _, plain = twins(config)
    samples = mixed_samples(config, 6, np.random.default_rng(2))
    batch = batch_of(samples, config).to(DEVICE)

    def run(ops: Ops, compile: bool = False) -> dict[str, torch.Tensor]:
        model = fast.VisionLanguageModel(config, ops)
        model.load_reference_state_dict(plain.state_dict())
        model.to(DEVICE)
        # A CPU checks the graph alone: its code generator would take half a minute.
        backend = "inductor" if GPU else "aot_eager"
        compiler = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        with autocast_to(dtype, device)():
            loss = (compiler if compile else model)(batch) / batch.n_labels
        loss.backward()
        return {"loss": loss.detach().cpu(), **gradients(model.cpu())}

    summed, _ = run_reference(plain, samples)
    (summed / batch.n_labels).backward()
    truth = {"loss": (summed / batch.n_labels).detach(), **gradients(plain)}
    chosen = choose_ops(kernels, device, "auto", dtype)
    assert (chosen.backend == "sdpa") == bool(unfit_for_flash(device, dtype))
    assert not chosen.asleep
    ref = run(Ops())
    ours = run(chosen, compiled)
    assert ours.keys() == truth.keys()
    floor = 1e-3 if dtype == torch.bfloat16 else 5e-5
    for name, gt in truth.items():
        error = (ours[name] - gt).norm()
        allowed = 2 * (ref[name] - gt).norm() + floor * gt.norm()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def test_only_text(small_config):
    packed, plain = twins(small_config)
    samples = [random_sample(np.random.default_rng(0), small_config, 0, 3)]
    expected, _ = run_reference(plain, samples)
    for batch in (batch_of(samples, small_config), batch_of(samples, small_config).trimmed()):
        assert_close(packed(batch), expected, "loss")


@pytest.mark.parametrize("changed", ["tokens", "image"])
def test_other_samples_change_nothing_bit_for_bit(small_config, changed):
    model = fast.VisionLanguageModel(small_config).eval()
    rng = np.random.default_rng(3)
    samples = mixed_samples(small_config, 12, rng)
    before = model.logits(batch_of(samples, small_config))
    target = samples[4]
    if changed == "tokens":
        for document in target.documents:
            document.input_ids[document.image_rows < 0] = rng.integers(
                0, 97, (document.image_rows < 0).sum()
            )
    else:
        target.images = 255 - target.images
    after = model.logits(batch_of(samples, small_config))
    start = sum(sample.labels for sample in samples[:4])
    end = start + target.labels
    assert not torch.equal(before[start:end], after[start:end])
    assert torch.equal(before[:start], after[:start])
    labels = sum(sample.labels for sample in samples)
    assert torch.equal(before[end:labels], after[end:labels])


def test_twenty_optimizer_steps_agree(small_config):
    packed, plain = twins(small_config)
    rng = np.random.default_rng(5)
    batches = [mixed_samples(small_config, 8, rng) for _ in range(20)]
    losses = []
    for model, run in (
        (packed, lambda s: packed(batch_of(s, small_config))),
        (plain, lambda s: run_reference(plain, s)[0]),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        curve = []
        for samples in batches:
            loss = run(samples) / sum(sample.labels for sample in samples)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert losses[0][-1] != losses[0][0]


def test_state_dict_goes_both_ways_unchanged(small_config):
    plain = reference.VisionLanguageModel(small_config)
    packed = fast.VisionLanguageModel(small_config)
    packed.load_reference_state_dict(plain.state_dict())
    saved = packed.reference_state_dict()
    assert list(saved) == list(plain.state_dict()) or set(saved) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saved[name], tensor), name


def test_the_same_graph_serves_every_batch(small_config):
    model = fast.VisionLanguageModel(small_config)
    rng = np.random.default_rng(7)
    budget = Budget(tokens=600, documents=40, images=6, labels=200, max_seqlen=64)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for n in (3, 9, 1):
        documents = [random_document(rng, small_config, 1, 10) for _ in range(n)]
        sample = Sample("s", rng.integers(0, 256, (1, 3, 32, 32)).astype(np.uint8), documents)
        batch = pack([sample], budget, small_config.image_tokens, small_config.vit_img_size)
        assert torch.equal(compiled(batch), model(batch))
    assert len(graphs) == 1
