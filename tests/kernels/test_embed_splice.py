"""embed_splice: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch

from nanovlm_fast.kernels.embed_splice import (
    CHUNK,
    embed_splice,
    embed_splice_bwd,
    embed_splice_bwd_add,
    embed_splice_fwd,
    embed_splice_reference,
    embed_splice_tied,
    make_inputs,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    GPU,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    poisoned,
    transposed,
)

# positions, vocabulary, width, image tokens
SHAPES = [
    (199, 50, 64, 49), (33, 400, 576, 49), (1, 7, 960, 3), (CHUNK, 3, 123, 1),
    (CHUNK + 1, 1, 8, 5), (64, 5, 1, 100),
    (0, 7, 16, 5),
]  # fmt: skip


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype):
    check_parity(embed_splice, embed_splice_reference, make_inputs(*shape, dtype, DEVICE))


@on_the_gpu_too
def test_parity_at_nanovlms_size():
    positions, vocabulary, image_tokens = (
        (300, 2000, 98) if DEVICE == "cpu" else (32768, 49152, 256 * 49)
    )
    inputs = make_inputs(positions, vocabulary, 576, image_tokens, DTYPES[0], DEVICE)
    check_parity(embed_splice, embed_splice_reference, inputs)


@on_the_gpu_too
def test_image_tokens_of_another_dtype():
    other = torch.float32 if DEVICE == "cuda" else torch.float16
    check_parity(
        embed_splice, embed_splice_reference, make_inputs(40, 30, 16, 9, DTYPES[0], DEVICE, other)
    )


@on_the_gpu_too
def test_a_result_of_another_type():
    """A narrow stream from a float32 table, whose gradient is float32 all the same."""
    narrow = DTYPES[0] if GPU else torch.float16  # the interpreter truncates to bfloat16
    inputs = make_inputs(40, 30, 16, 9, torch.float32, DEVICE, narrow) | {"dtype": narrow}
    assert embed_splice(**inputs).dtype == narrow
    check_parity(embed_splice, embed_splice_reference, inputs)


@on_the_gpu_too
def test_no_images():
    """The reference gives image_tokens no gradient then; the operator gives an empty one."""
    inputs = make_inputs(40, 30, 16, 0, DTYPES[0], DEVICE)
    check_parity(embed_splice, embed_splice_reference, inputs, ("image_tokens",))
    inputs["table"].requires_grad_()
    images = inputs["image_tokens"].requires_grad_()
    embed_splice(**inputs).sum().backward()
    assert images.grad.shape == (0, 16)


@on_the_gpu_too
def test_not_contiguous():
    inputs = make_inputs(20, 30, 16, 9, DTYPES[0], DEVICE)
    inputs["table"] = torch.randn(30, 32, device=DEVICE).to(DTYPES[0])[:, ::2]
    inputs["image_tokens"] = torch.randn(16, 9, device=DEVICE).to(DTYPES[0]).t()
    inputs["input_ids"], inputs["image_rows"] = (
        inputs[name].repeat_interleave(3)[::3] for name in ("input_ids", "image_rows")
    )
    check_parity(embed_splice, embed_splice_reference, inputs)
    check_parity(transposed(embed_splice), transposed(embed_splice_reference), inputs)


def sums_exactly(keys: torch.Tensor, table_rows: int, image_rows: int, c: int = 3) -> None:
    """Compares both gradients to index_add on small integers.

    Every sum is exact, so any part that is lost or counted twice is detected.
    """
    dh = torch.randint(-8, 9, (len(keys), c), device=DEVICE).float()
    expected = torch.zeros(table_rows + image_rows, c, device=DEVICE).index_add_(0, keys.long(), dh)
    with poisoned():
        table, image = embed_splice_bwd(
            dh, keys, table_rows, image_rows, torch.float32, torch.float32
        )
    assert torch.equal(table, expected[:table_rows]) and torch.equal(image, expected[table_rows:])


@on_the_gpu_too
@pytest.mark.parametrize(
    "runs",
    [
        [1], [CHUNK], [CHUNK - 1, 1], [CHUNK - 1, 2], [CHUNK, 1], [1, CHUNK], [CHUNK, CHUNK],
        [2 * CHUNK], [CHUNK - 1, CHUNK + 2, CHUNK - 1], [3, 2 * CHUNK - 3, 5],
        [3, 2 * CHUNK - 2, 5], [5 * CHUNK + 3],
        [CHUNK // 2] * 7, [1] * 40, [1, 3 * CHUNK, 1, 1, 3 * CHUNK, 2], [7, 40 * CHUNK, 5],
        [31 * CHUNK], [32 * CHUNK], [33 * CHUNK], [33 * CHUNK + 1], [34 * CHUNK - 1, 1],
        [CHUNK - 1, 1 + 65 * CHUNK, 1],
    ],
    ids=str,
)  # fmt: skip
def test_runs_that_meet_the_borders_of_chunks(runs):
    """Runs of one key lie inside chunks, across their borders and along whole chunks.

    `runs` holds the lengths of the runs in sorted order. The keys are those of the table and of the
    images.
    """
    keys = torch.cat(
        [torch.full((n,), 2 * i + 1, dtype=torch.int32) for i, n in enumerate(runs)]
    ).to(DEVICE)
    keys = keys[torch.randperm(len(keys)).to(DEVICE)]  # every other row is shown by nobody: zeros
    rows = 2 * len(runs) + 1
    for table_rows in (rows, 1, rows // 2 + 1):
        sums_exactly(keys, table_rows, rows - table_rows)


@on_the_gpu_too
@pytest.mark.parametrize("seed", range(6))
def test_runs_of_random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 60, (), generator=generator))
    weights = torch.rand(rows, generator=generator) ** 6 + 1e-6  # some rows very frequent
    count = int(torch.randint(1, 900, (), generator=generator))
    keys = torch.multinomial(weights, count, replacement=True, generator=generator).int().to(DEVICE)
    table_rows = int(torch.randint(1, rows + 1, (), generator=generator))
    sums_exactly(keys, table_rows, rows - table_rows)


@on_the_gpu_too
def test_a_gradient_that_is_not_finite_stays_in_its_row():
    keys = torch.tensor([0, 1, 1, 2] * CHUNK, dtype=torch.int32, device=DEVICE)
    dh = torch.ones(len(keys), 8, device=DEVICE)
    dh[1] = float("inf")
    table, _ = embed_splice_bwd(dh, keys, 4, 0, torch.float32, torch.float32)
    assert table[1].isinf().all() and torch.equal(
        table[[0, 2, 3], 0].cpu(), torch.tensor([CHUNK, CHUNK, 0.0])
    )


@on_the_gpu_too
def test_documents_that_share_an_image():
    """Three documents show the same image, and its gradient is their sum.

    The token ids at the image's positions get no gradient.
    """
    rows = torch.tensor([0, 1, 2, -1] * 3, dtype=torch.int32, device=DEVICE)
    inputs = make_inputs(12, 5, 16, 4, torch.float32, DEVICE) | {"image_rows": rows}
    check_parity(embed_splice, embed_splice_reference, inputs)
    inputs["input_ids"].fill_(4)
    table = inputs["table"].requires_grad_()
    images = inputs["image_tokens"].requires_grad_()
    embed_splice(**inputs).sum().backward()
    assert images.grad[:, 0].tolist() == [3, 3, 3, 0] and table.grad[:, 0].tolist() == [
        0,
        0,
        0,
        0,
        3,
    ]


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(40, 30, 16, 9, DTYPES[0], DEVICE)
    check_compile(embed_splice, inputs)
    _, keys = embed_splice_fwd(**inputs)
    opcheck(
        embed_splice_bwd,
        torch.randn(40, 16, device=DEVICE, dtype=DTYPES[0]),
        keys,
        30,
        9,
        torch.float32,
        torch.float32,
    )
    inputs["table"].requires_grad_()
    inputs["image_tokens"].requires_grad_()
    opcheck(embed_splice_fwd, *inputs.values())


@on_the_gpu_too
@pytest.mark.parametrize("tokens", [0, 40, 400])
def test_a_table_of_two_uses_has_one_gradient(tokens):
    """What arrives for it is left as it is: somebody else may hold it."""

    def plain(**inputs):
        table = inputs["table"]
        return embed_splice_reference(**inputs), table.view_as(table)

    inputs = make_inputs(tokens, 30, 16, 9, DTYPES[0], DEVICE)
    check_parity(embed_splice_tied, plain, inputs)
    inputs["table"].requires_grad_()
    outputs = embed_splice_tied(**inputs)
    gradients = [torch.ones_like(output) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    assert gradients[1].eq(1).all()
    expected = inputs["table"].grad
    inputs["table"].grad = None
    # In whatever order of its axes it arrives.
    gradients[1] = gradients[1].t().contiguous().t()
    torch.autograd.backward(embed_splice_tied(**inputs), gradients)
    torch.testing.assert_close(inputs["table"].grad, expected)


@on_the_gpu_too
def test_compile_and_opcheck_of_a_table_of_two_uses():
    inputs = make_inputs(40, 30, 16, 9, DTYPES[0], DEVICE)
    check_compile(embed_splice_tied, inputs)
    _, keys = embed_splice_fwd(**inputs)
    dh = torch.randn(40, 16, device=DEVICE, dtype=DTYPES[0])
    opcheck(embed_splice_bwd_add, dh, keys, inputs["table"].clone(), 9, torch.float32)


@pytest.mark.parametrize("image_tokens", [4, 0])
def test_reference_gradients(image_tokens):
    inputs = make_inputs(9, 5, 3, image_tokens, torch.float32, "cpu")
    check_reference_gradients(
        embed_splice_reference, inputs, () if image_tokens else ("image_tokens",)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.ones(7, 8, dtype=torch.int32)}, TypeError, "table is torch.int32"),
        ({"table": torch.ones(7)}, ValueError, "table has shape"),
        ({"table": torch.ones(7, 0)}, ValueError, "V, C > 0"),
        ({"table": torch.ones(8, 7).t()}, ValueError, "table must be contiguous"),
        ({"image_tokens": torch.ones(3, 9)}, ValueError, "image_tokens has shape"),
        ({"image_tokens": torch.ones(8)}, ValueError, "image_tokens has shape"),
        (
            {"image_tokens": torch.ones(3, 8, dtype=torch.float64)},
            TypeError,
            "image_tokens is torch.float64",
        ),
        ({"input_ids": torch.zeros(4, dtype=torch.int32)}, TypeError, "input_ids is torch.int32"),
        ({"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "input_ids has shape"),
        ({"image_rows": torch.zeros(4, dtype=torch.int64)}, TypeError, "image_rows is torch.int64"),
        ({"image_rows": torch.zeros(5, dtype=torch.int32)}, ValueError, "image_rows has shape"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 7, 8, 3, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        embed_splice_fwd(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_ids_left_on_the_cpu_are_named():
    inputs = make_inputs(4, 7, 8, 3, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="input_ids is on cpu"):
        embed_splice(**inputs | {"input_ids": inputs["input_ids"].cpu()})
