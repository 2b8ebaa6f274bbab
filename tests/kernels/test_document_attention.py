"""document_attention: see kernel_checks.py for what is proved."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nanovlm_fast.kernels.document_attention import (
    LONGEST,
    cost,
    document_attention,
    document_attention_bwd,
    document_attention_fwd,
    document_attention_reference,
    fits,
    make_inputs,
)
from nanovlm_fast.kernels.rotary import rotary_reference
from nanovlm_fast.model.attention import sdpa
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    run,
)

TABLES = ("cos", "sin")
# tokens, longest document, query heads, key heads, size of a head
SHAPES = [
    (97, 40, 9, 3, 64),
    (150, 128, 3, 1, 64),
    (70, 70, 2, 2, 32),
    (1, 1, 3, 1, 64),
    (21, 17, 4, 2, 32),
    (0, 8, 9, 3, 64),
]


CASES = [
    (shape, dtype)
    for shape in SHAPES
    for dtype in DTYPES
    # On a device, only what the model uses: long float32 documents would compile for minutes.
    if DEVICE == "cpu" or fits(shape[1], shape[4], dtype)
]


@on_the_gpu_too
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_parity(shape, dtype):
    inputs = make_inputs(*shape, dtype, DEVICE, positions=64)
    check_parity(document_attention, document_attention_reference, inputs, TABLES)


def test_cost_counts_the_pairs_that_are_drawn():
    """And not those of documents that all have max_seqlen tokens, which are half as many again."""
    sizes = (50_000, 128, 1, 1, 32)
    ends = make_inputs(*sizes, torch.bfloat16, "cpu", positions=64)["cu_seqlens"]
    lengths = ends.diff().tolist()
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    counted = cost(*sizes, torch.bfloat16)
    assert counted["forward"][1] == pytest.approx(4 * pairs * 32, rel=0.03)
    assert counted["backward"][1] == pytest.approx(10 * pairs * 32, rel=0.03)


@on_the_gpu_too
def test_parity_at_the_models_size():
    tokens = 300 if DEVICE == "cpu" else 20736
    inputs = make_inputs(tokens, 128, 9, 3, 64, DTYPES[0], DEVICE)
    check_parity(document_attention, document_attention_reference, inputs, TABLES)


@on_the_gpu_too
def test_documents_do_not_see_each_other():
    inputs = make_inputs(60, 20, 3, 1, 32, torch.float32, DEVICE)
    before = document_attention(**inputs)
    begin, end = inputs["cu_seqlens"][1:3].tolist()
    inputs["qkv"][begin:end] += 1
    after = document_attention(**inputs)
    changed = (before != after).any(dim=1)
    assert changed[begin:end].all() and not changed[:begin].any() and not changed[end:].any()


@on_the_gpu_too
def test_it_is_rotary_and_then_attention():
    inputs = make_inputs(90, 33, 6, 2, 32, torch.float32, DEVICE)

    def in_two_steps(cu_seqlens, max_seqlen, n_q, n_kv, **of_rotary):
        heads = rotary_reference(**of_rotary, n_q=n_q, n_kv=n_kv)
        q, k, v = heads.unflatten(1, (n_q + 2 * n_kv, -1)).split([n_q, n_kv, n_kv], dim=1)
        return sdpa(q, k, v, cu_seqlens, max_seqlen).flatten(1)

    ours = run(document_attention, inputs, TABLES)
    for name, value in run(in_two_steps, inputs, TABLES).items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@on_the_gpu_too
def test_not_contiguous():
    inputs = make_inputs(12, 8, 2, 1, 32, DTYPES[0], DEVICE)
    inputs["qkv"] = torch.randn(12, 256, device=DEVICE).to(DTYPES[0])[:, ::2]
    inputs["sin"] = inputs["sin"].t().contiguous().t()
    check_parity(document_attention, document_attention_reference, inputs, TABLES)
    check_parity(
        lambda **i: document_attention(**i).t(),
        lambda **i: document_attention_reference(**i).t(),
        inputs,
        TABLES,
    )  # the gradient arrives transposed


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(14, 9, 2, 1, 32, DTYPES[0], DEVICE)
    check_compile(document_attention, inputs, TABLES)
    values = tuple(inputs.values())
    dout = torch.randn(14, 64, device=DEVICE).to(DTYPES[0])
    opcheck(document_attention_bwd, dout, *values)
    inputs["qkv"].requires_grad_()
    opcheck(document_attention_fwd, *inputs.values())


def test_reference_gradients():
    inputs = make_inputs(5, 3, 2, 1, 4, torch.float32, "cpu")
    check_reference_gradients(document_attention_reference, inputs, TABLES)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.ones(4, 128, dtype=torch.int32)}, TypeError, "qkv is torch.int32"),
        ({"qkv": torch.ones(4, 2, 64)}, ValueError, "qkv has shape"),
        ({"qkv": torch.ones(4, 132)}, ValueError, "heads have 33 columns"),
        ({"n_kv": 0}, ValueError, "n_kv is 0"),
        ({"n_q": 3, "n_kv": 2}, ValueError, "a multiple of n_kv"),
        ({"max_seqlen": 129}, ValueError, "max_seqlen is 129, expected 1 to 128"),
        ({"max_seqlen": 0}, ValueError, "max_seqlen is 0"),
        ({"cos": torch.ones(8192, 16, dtype=torch.bfloat16)}, TypeError, "cos is torch.bfloat16"),
        ({"cos": torch.ones(8192, 8)}, ValueError, "cos has shape"),
        ({"sin": torch.ones(8191, 16)}, ValueError, "sin has shape"),
        ({"position_ids": torch.zeros(5, dtype=torch.int32)}, ValueError, "position_ids has shape"),
        ({"cu_seqlens": torch.zeros(5, dtype=torch.int64)}, TypeError, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.zeros(1, 5, dtype=torch.int32)}, ValueError, "cu_seqlens has shape"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 4, 2, 1, 32, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        document_attention_fwd(**inputs)


def test_what_fits():
    assert fits(LONGEST, 64, torch.bfloat16) and fits(LONGEST // 2, 32, torch.float32)
    assert not fits(LONGEST + 1, 64, torch.float16)
    assert not fits(LONGEST // 2 + 1, 64, torch.float32)
    assert not fits(20, 128, torch.bfloat16)


def test_longer_documents_take_rotary_and_the_backend(small_config):
    config = dataclasses.replace(small_config, lm_hidden_dim=96, lm_n_heads=3, lm_n_kv_heads=1)
    losses = {}
    limit = LONGEST // 2  # in float32
    for longest in (limit, limit + 1):
        torch.manual_seed(0)
        model = VisionLanguageModel(config, choose_ops("document_attention"))
        ids = torch.randint(config.lm_vocab_size, (longest + 5,))
        batch = text_batch(ids, [0, longest, longest + 5], longest)
        fitting = model.ops.in_documents(longest, config.head_dim, torch.float32)
        assert fitting == (longest == limit)
        plain = VisionLanguageModel(config, choose_ops("none"))
        plain.load_state_dict(model.state_dict())
        losses[longest] = model(batch), plain(batch)
    for ours, expected in losses.values():
        torch.testing.assert_close(ours, expected)


def text_batch(ids: torch.Tensor, cu_seqlens: list[int], longest: int) -> PackedBatch:
    """Text alone, every position of which predicts token 1."""
    t = len(ids)
    positions = [torch.arange(end - start) for start, end in itertools.pairwise(cu_seqlens)]
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat(positions).int(),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        images=torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
        image_rows=torch.full((t,), -1, dtype=torch.int32),
        label_index=torch.arange(t),
        labels=torch.ones(t, dtype=torch.int64),
        max_seqlen=longest,
    )
