"""What a compiled step launches: the recorder that replays generated code on fake tensors.

Under the recorder every operator that the generated code calls is entered as a `Launch`: products
with their FLOPs, attention, custom operators as what they launch themselves, and the optimizer. The
kernels that Inductor generated enter their own launches (`lowered.py`). Nothing is computed.

Bytes are those that must move: every input once, every output once. They are a floor.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("generated", "product", "attention", "kernel", "other")
DIRECTIONS = ("forward", "backward", "update")
# FlashAttention works on blocks of 128 queries and keys.
BLOCK = 128

# Operators that launch nothing: they allocate, or make another view of the same memory.
FREE = frozenset(
    "empty empty_strided empty_like new_empty new_empty_strided as_strided view _unsafe_view "
    "reshape _reshape_alias t transpose permute select slice detach alias expand unsqueeze squeeze "
    "split split_with_sizes unbind lift_fresh set_ resize_ _local_scalar_dense is_pinned device "
    "_record_function_enter_new _record_function_exit".split()
)
COPIES = frozenset("copy_ clone _to_copy cat stack contiguous".split())
# They take a tensor for its shape alone.
FILLS = frozenset("new_zeros new_ones new_full zeros_like ones_like full_like".split())
PRODUCTS = frozenset(("mm", "addmm", "bmm"))

# Our kernels that look up rows: pointer -> the pointer whose elements bound those that move.
ROWS_OF = {
    "_embed_splice_fwd_kernel": {"table_ptr": "h_ptr", "image_ptr": "h_ptr"},
    "_embed_splice_bwd_chunks_kernel": {"dtable_ptr": "dh_ptr", "dimage_ptr": "dh_ptr"},
    "_embed_splice_bwd_parts_kernel": {"dtable_ptr": "parts_ptr", "dimage_ptr": "parts_ptr"},
}
# The rows of logits do not fit a multiprocessor, so the gradient reads them a second time.
READ_TWICE = {("_linear_cross_entropy_fwd_kernel", "logits_ptr")}


@dataclass
class Launch:
    """One kernel of the step. `read` and `written` are bytes, each element once."""

    name: str
    kind: str  # one of KINDS
    direction: str  # one of DIRECTIONS
    read: int = 0
    written: int = 0
    flops: int = 0
    detail: str = ""  # operators that were fused, or shapes
    where: str = ""  # source lines of the model
    atomic: bool = False
    moves_only: bool = False  # it converts, copies or rearranges, and computes nothing
    reduces: bool = False
    # A product's (m, k, n); what attention works on, see `attention_of`.
    shape: tuple[int, ...] = ()
    epilogue: bool = False  # a product of ours that works on its sums before it stores them
    attention: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.read + self.written


def size(tensor: Tensor) -> int:
    """The bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float32": "f32", "int64": "i64", "int32": "i32"}.get(name, name)


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


class Recorder(TorchDispatchMode):
    """Enters what is called under it. `lengths` are the batch's documents, padding's included."""

    def __init__(self, lengths: Iterable[int]):
        super().__init__()
        self.lengths = tuple(length for length in lengths if length)
        self.launches: list[Launch] = []
        self.direction = "forward"
        self.peak = 0
        self._in_use = 0
        self._live: dict[StorageWeakRef, int] = {}
        self._inside = ""  # the custom operator that is being taken apart
        self._implementations = _custom_operators()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of new tensors, and let go of what was freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._live:
                self._live[reference] = storage.nbytes()
                self._in_use += storage.nbytes()
        for reference in [reference for reference in self._live if reference.expired()]:
            self._in_use -= self._live.pop(reference)
        self.peak = max(self.peak, self._in_use)

    @property
    def in_use(self) -> int:
        return self._in_use

    def enter(self, name: str, kind: str, **facts: Any) -> None:
        launch = Launch(f"{self._inside}{name}", kind, self.direction, **facts)
        if self._inside and kind == "other":
            launch.kind = "kernel"
        self.launches.append(launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "adamw" and func.namespace == "nanovlm_fast":
            # Its kernels get a table of addresses, in which no tensor shows that is moved.
            self.enter("adamw: _adamw_scalars_kernel", "kernel", read=_all_of(args[5]))
            self.enter("adamw: _adamw_kernel", "kernel", **_our_adamw(args))
            return None
        if func.namespace == "nanovlm_fast" and not self._inside:
            return self._taken_apart(name, args, kwargs)
        if name not in FREE and func._can_decompose():
            # As `linear` and `to`, which autograd takes apart, are still whole inside operators.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        results = tensors_in(out)
        self.hold(results)
        if name in FREE or (name == "_to_copy" and not results):
            return out
        inputs = tensors_in((args, kwargs))
        # A result that is an input, written in place, is read only if the operator says so.
        written_in_place = {_place(t) for t in results}
        distinct = {id(t): t for t in inputs}.values()
        read = sum(size(t) for t in distinct if _place(t) not in written_in_place)
        if name in FILLS:
            read = 0
        facts: dict[str, Any] = dict(read=read, written=sum(size(t) for t in results))
        if name in PRODUCTS:
            self._enter_product(name, args, kwargs, results[0], facts)
        elif "scaled_dot_product" in name or "varlen_attn" in name:
            self._enter_attention(name, inputs, facts)
        elif name in MUTATING:
            self.enter(name, "other", detail=_shapes(inputs), **MUTATING[name](args))
        else:
            facts |= dict(moves_only=name in COPIES, reduces="norm" in name or "sum" in name)
            self.enter(name, "other", detail=_shapes(inputs), **facts)
        return out

    def _taken_apart(self, name: str, args: tuple, kwargs: dict) -> Any:
        """Run the implementation of one of our operators, so that its launches are entered."""
        self._inside = f"{name}: "
        try:
            with self:
                return self._implementations[name](*args, **kwargs)
        finally:
            self._inside = ""

    def _enter_product(
        self, name: str, args: tuple, kwargs: dict, result: Tensor, facts: dict[str, Any]
    ) -> None:
        # The last two: addmm has the addend before them, mm.dtype has a type behind them.
        a, b = [value for value in args if isinstance(value, Tensor)][-2:]
        if a.dtype != b.dtype:
            raise TypeError(f"{name} of {a.dtype} and {b.dtype}: cuBLAS would refuse it")
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        batch = a.shape[0] if a.dim() == 3 else 1
        addend = args[0]
        if name == "addmm" and kwargs.get("beta", 1) and addend.dim() == 2:
            if _place(addend)[0] == _place(result)[0]:
                facts["read"] += size(addend)  # added to where it is
            else:  # cuBLAS adds to where the result goes: PyTorch copies the addend there first
                moved = dict(read=size(addend), written=size(addend))
                self.enter("copy of addmm's addend", "other", moves_only=True, **moved)
        kinds = f"{short(a.dtype)} -> {short(result.dtype)}"
        detail = f"{tuple(a.shape)} @ {tuple(b.shape)} {kinds}"
        flops = 2 * batch * m * k * n
        shape = (batch * m, k, n)
        self.enter(
            f"{name} {m}x{k}x{n}", "product", flops=flops, detail=detail, shape=shape, **facts
        )

    def _enter_attention(self, name: str, inputs: list[Tensor], facts: dict[str, Any]) -> None:
        backward = "backward" in name
        # A backward has the output's gradient before q, k, v.
        q, k = inputs[backward : backward + 2]
        if q.dim() == 4:  # (B, heads, N, D), every row of one length
            batch, heads, length, width = q.shape
            kv_heads = k.shape[1]
            lengths = (length,) * batch
            pairs = batch * length**2
            causal = False
        else:  # (T, heads, D), packed documents
            _, heads, width = q.shape
            kv_heads = k.shape[1]
            lengths = self.lengths
            pairs = sum(length * (length + 1) // 2 for length in lengths)
            causal = True
        flops = 4 * pairs * heads * width
        work = attention_of(lengths, heads, kv_heads, width, causal)
        self.enter(
            name,
            "attention",
            # Backward: scores again, and the gradients of weights, v, q and k: 5 products, not 2.
            flops=flops * 5 // 2 if backward else flops,
            detail=_shapes(inputs),
            attention=work,
            **facts,
        )


def attention_of(
    lengths: Iterable[int], heads: int, kv_heads: int, width: int, causal: bool
) -> dict[str, int]:
    """Sizes of attention: real rows, rows and pairs of whole blocks, and heads of `width`."""
    blocks = [-(-length // BLOCK) for length in lengths]
    met = [n * (n + 1) // 2 if causal else n * n for n in blocks]  # pairs of blocks that meet
    return {
        "rows": sum(lengths),
        "padded_rows": BLOCK * sum(blocks),
        "padded_pairs": BLOCK**2 * sum(met),
        "heads": heads,
        "kv_heads": kv_heads,
        "width": width,
    }


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _shapes(tensors: list[Tensor]) -> str:
    return " ".join(f"{short(t.dtype)}{tuple(t.shape)}" for t in tensors[:6])


def _all_of(values: Any) -> int:
    return sum(size(tensor) for tensor in tensors_in(values))


def _zero(args: tuple) -> dict[str, int]:
    return {"written": size(args[0])}


def _adamw(args: tuple) -> dict[str, int]:
    """Parameters and both moments are read and written; gradients are read."""
    parameters, gradients, first, second = (_all_of(some) for some in args[:4])
    state = parameters + first + second
    return {"read": state + gradients, "written": state}


def _our_adamw(args: tuple) -> dict[str, int]:
    """Masters and moments are read and written, gradients read, working weights written."""
    gradients, masters, first, second, working = (_all_of(some) for some in args[:5])
    state = masters + first + second
    return {"read": state + gradients, "written": state + working}


def _copy(args: tuple) -> dict[str, int]:
    return {"read": _all_of(args[1]), "written": _all_of(args[0])}


def _scale(args: tuple) -> dict[str, int]:
    return {"read": _all_of(args), "written": _all_of(args[0])}


# Operators that write what they are given. Their results do not tell what moves.
MUTATING: dict[str, Callable[[tuple], dict[str, int]]] = {
    "zero_": _zero,
    "fill_": _zero,
    "_fused_adamw_": _adamw,
    "_foreach_copy_": _copy,
    "_foreach_mul_": _scale,
    "_foreach_add_": _scale,
    "_foreach_sub_": _scale,
    "_foreach_lerp_": _scale,
}


# ---- our own kernels


def _custom_operators() -> dict[str, Callable]:
    """The implementations of our operators, by name without the namespace."""
    from torch._library import custom_ops

    found = {}
    for qualified, operator in custom_ops.OPDEFS.items():
        namespace, _, name = qualified.partition("::")
        if namespace == "nanovlm_fast":
            found[name] = operator._init_fn
    return found


@contextlib.contextmanager
def entered_kernels(recorder: Recorder) -> Iterator[None]:
    """Inside the context every launch of a hand-written Triton kernel only enters itself."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any = None, warmup: Any = None, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        name = self.fn.__name__
        read, written = traffic_of(name, pointers_of(self), values)
        facts: dict[str, Any] = dict(read=read, written=written)
        if name.startswith(("_document_attention", "_image_attention")):
            facts |= _our_attention(values, recorder.lengths)
            recorder.enter(name, "attention", **facts)
            return
        reduces = "tl.sum(" in self.src or "tl.max(" in self.src
        if shape := product_of(name, values):
            facts |= dict(shape=shape, flops=2 * math.prod(shape), epilogue="_mlp_" in name)
        recorder.enter(name, "kernel", reduces=reduces, **facts)

    with mock.patch.object(JITFunction, "run", run):
        yield


def traffic_of(name: str, uses: dict[str, set[str]], values: dict[str, Any]) -> tuple[int, int]:
    """Bytes that one launch of our kernel reads and writes, every element once.

    `uses` says which arguments it loads from and stores to, see `pointers_used`.
    """
    bounds = ROWS_OF.get(name, {})
    read = written = 0
    for pointer, value in values.items():
        if not isinstance(value, Tensor):
            continue
        count = size(value)
        if bound := bounds.get(pointer):
            count = min(count, values[bound].numel() * value.element_size())
        times = 2 if (name, pointer) in READ_TWICE else 1
        read += count * times * (pointer in uses["load"])
        written += count * (pointer in uses["store"])
    return read, written


def pointers_of(kernel: Any) -> dict[str, set[str]]:
    """`pointers_used` of a jitted function, with the jitted functions that it calls."""
    function = kernel.fn
    source = inspect.getsource(function)

    def called(name: str) -> dict[str, list[int]]:
        helper = function.__globals__.get(name)
        if not hasattr(helper, "fn"):
            return {}
        names = list(inspect.signature(helper.fn).parameters)
        uses = pointers_of(helper)
        return {what: [names.index(name) for name in uses[what]] for what in uses}

    return pointers_used(source[source.index("def ") :], called)


def pointers_used(
    source: str, called: Callable[[str], dict[str, list[int]]] = lambda name: {}
) -> dict[str, set[str]]:
    """Arguments of a Triton kernel that it loads from and stores to: {'load': ..., 'store': ...}.

    An address may pass through local variables: `block = x_ptr + offset`, then `tl.load(block)`. It
    may also be handed to another function: `called` gives the positions of that one's arguments.
    """
    tree = ast.parse(textwrap.dedent(source))
    arguments = [a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in n.args]
    origins = {name: {name} for name in arguments}
    for node in ast.walk(tree):  # in order: an address is made before it is used
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found = _origins(node.value, origins)
            origins.setdefault(node.targets[0].id, set()).update(found)
    uses: dict[str, set[str]] = {"load": set(), "store": set()}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if what := _memory_call(node):
            uses[what] |= _origins(node.args[0], origins)
        elif isinstance(node.func, ast.Name):
            for what, positions in called(node.func.id).items():
                for position in positions:
                    uses[what] |= _origins(node.args[position], origins)
    return {what: names & set(arguments) for what, names in uses.items()}


def _memory_call(node: ast.AST) -> str:
    """'load' or 'store' for tl.load(...) and tl.store(...), '' for everything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr if node.func.attr in ("load", "store") else ""
    return ""


def _origins(expression: ast.AST, origins: dict[str, set[str]]) -> set[str]:
    """The arguments that an address is made of. What was loaded is a value and no address."""
    if _memory_call(expression):
        return set()
    if isinstance(expression, ast.Name):
        return origins.get(expression.id, set())
    found: set[str] = set()
    for child in ast.iter_child_nodes(expression):
        found |= _origins(child, origins)
    return found


def product_of(name: str, values: dict[str, Any]) -> tuple[int, ...]:
    """(m, k, n) of our kernels that are a matrix product themselves, () of all others."""
    if name.startswith("_gelu_mlp"):
        return values["M"], values["K"], values["N"]
    if name.startswith("_swiglu_mlp"):  # N are the columns of gate alone
        both = 1 if "dgate_up_ptr" in values else 2
        return values["M"], values["K"], both * values["N"]
    if not name.startswith("_pixel_shuffle_proj"):
        return ()
    rows = values["M"]
    columns = values["N"]
    patch = values["S"] ** 2 * values["C"]
    if "dx_ptr" in values:
        return rows, columns, patch
    if "partials_ptr" in values:  # the gradient of the weight
        return patch, rows, columns
    return rows, patch, columns


def _our_attention(values: dict[str, Any], documents: tuple[int, ...]) -> dict[str, Any]:
    """FLOPs and sizes of our kernels for attention, as `Recorder` enters those of others.

    Both need one pass in the backward, without an accumulator in memory.
    """
    if "P" in values:  # inside images of P patches
        heads = kv_heads = values["HEADS"]
        width = values["D"]
        images = values["qkv_ptr"].numel() // (3 * heads * width * values["P"])
        lengths: tuple[int, ...] = (values["P"],) * images
        pairs = images * values["P"] ** 2
    else:  # inside documents, causal
        kv_heads = values["N_KV"]
        heads = values["GROUP"] * kv_heads
        width = 2 * values["HALF"]
        lengths = documents
        pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 4 * pairs * heads * width
    if "dqkv_ptr" in values:
        flops = flops * 5 // 2
    work = attention_of(lengths, heads, kv_heads, width, causal="P" not in values)
    return {"flops": flops, "attention": work | {"one_pass": 1}}
