"""What Inductor generates for a step: every kernel with its bytes, its source lines and its text.

`collected` hooks into Inductor's code generation. When a graph is lowered, the launches of its
kernels are described from the scheduler's nodes. The generated wrapper is then run on fake tensors,
where a kernel does nothing but enter its launch in the recorder.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.subjects.launches import Launch, Recorder
from bench.subjects.masked_loads import arguments_of, loads_of

# Operators that compute nothing: a kernel of these alone converts, copies or rearranges.
MOVES = frozenset(
    "convert_element_type _to_copy copy_ copy clone contiguous view reshape _unsafe_view expand "
    "permute transpose t unsqueeze squeeze select slice split split_with_sizes getitem cat full "
    "select_scatter slice_scatter index_select embedding iota arange empty".split()
)
MOST = ("registers", "stack", "local", "shared")  # the last three in bytes
SCATTERS = frozenset(("select_scatter", "slice_scatter"))


@dataclass
class Graph:
    """One compiled graph: its wrapper's text, its kernels' texts, and their launches in order."""

    direction: str
    source: str
    launches: list[Launch] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)  # name -> source


# Tile and warps of the templates. With 128 x 256, three products with epilogues spill.
TEMPLATE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
WITH_TEMPLATES = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "triton.num_decompose_k_splits": 0,  # graphs inside the graph, which are not followed here
}


@contextlib.contextmanager
def template_chosen() -> Iterator[None]:
    """Inductor takes the template nearest to `TEMPLATE` for every product, and times none."""
    from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplateCaller

    select = AlgorithmSelectorCache.__call__

    def unlikeness(choice: Any) -> list[int]:
        text = f"{choice.description}, "
        found = {name: re.search(rf"{name}=(\d+)", text) for name in TEMPLATE}
        return [abs(int(m.group(1)) - TEMPLATE[n]) if m else 10**6 for n, m in found.items()]

    def choose(self: Any, name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        templates = [one for one in choices if isinstance(one, TritonTemplateCaller)]
        chosen = [min(templates, key=unlikeness)] if templates else choices[:1]
        return select(self, name, chosen, *args, **kwargs)

    with mock.patch.object(AlgorithmSelectorCache, "__call__", choose):
        yield


@contextlib.contextmanager
def collected(recorder: Recorder) -> Iterator[list[Graph]]:
    """Hook into Inductor; the list gets every graph that is lowered inside the context."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graphs: list[Graph] = []
    calls: dict[int, list[tuple[str, Any, list[str]]]] = defaultdict(list)  # of each lowering
    generate = PythonWrapperCodegen.generate_kernel_call

    def generate_kernel_call(self: Any, kernel_name: str, call_args: Any, **options: Any) -> Any:
        node = V.graph.scheduler.current_node
        calls[id(V.graph)].append((kernel_name, node, [str(argument) for argument in call_args]))
        return generate(self, kernel_name, call_args, **options)

    def compile_to_module_lines(self: Any, code: Any) -> Any:
        graph = Graph("backward" if self.is_backward else "forward", code.value)
        graph.launches = list(_described(self, graph, calls.pop(id(self), [])))
        graphs.append(graph)
        return _replayed(graph, self.constants, recorder)

    with (
        mock.patch.object(PythonWrapperCodegen, "generate_kernel_call", generate_kernel_call),
        mock.patch.object(GraphLowering, "_compile_to_module_lines", compile_to_module_lines),
    ):
        yield graphs


def _described(
    lowering: Any, graph: Graph, calls: list[tuple[str, Any, list[str]]]
) -> Iterator[Launch]:
    """Describe each kernel call of a graph, in order."""
    pattern = r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    sources = dict(re.findall(pattern, graph.source, re.M | re.S))
    followed = {
        name: loads_of(source, name)
        for name, source in sources.items()
        if name.startswith("triton_poi")
    }
    counted = set()
    for name, node, arguments in calls:
        if node in counted:
            # A combo kernel's node may become several kernels: the first has all its bytes.
            yield Launch(name, "generated", graph.direction, detail="counted with the one before")
            continue
        counted.add(node)
        loads = followed.get(name)
        loaded = {}
        if loads:
            pointers = [a for a in arguments_of(_text_of(sources[name], name)) if "ptr" in a]
            loaded = {b: loads.get(p, 0.0) for p, b in zip(pointers, arguments, strict=False)}
        yield _launch(lowering, graph.direction, name, node, loaded)


def _text_of(source: str, name: str) -> str:
    return source[source.index("def " + name) :]


def _launch(
    lowering: Any, direction: str, name: str, node: Any, loaded: dict[str, float]
) -> Launch:
    read, written, atomic = traffic(lowering, node, loaded)
    flops = int(node.estimate_flops() or 0)
    shape = _product_of(lowering, node, flops)
    origins = [fx for n in node.get_nodes() if n.node is not None for fx in n.node.origins]
    operators = Counter(filter(None, (_operator(fx) for fx in origins)))
    lines = Counter(filter(None, (source_line(fx) for fx in origins)))
    return Launch(
        name,
        "product" if shape else "generated",
        direction,
        read=read,
        written=written,
        flops=flops,
        shape=shape,
        epilogue=bool(shape),
        detail=" ".join(f"{k} x{n}" if n > 1 else k for k, n in operators.most_common(14)),
        where=", ".join(line for line, _ in lines.most_common(4)),
        atomic=atomic,
        moves_only=moves_only(set(operators)),
        reduces=name.startswith(("triton_per", "triton_red", "triton_mix")),
    )


def _product_of(lowering: Any, node: Any, flops: int) -> tuple[int, ...]:
    """(m, k, n) of a product that became a Triton template, () of all other kernels."""
    template = node.get_template_node()
    if template is None or not flops:
        return ()
    m, n = (int(lowering.sizevars.optimization_hint(size)) for size in template.get_size()[-2:])
    return m, flops // (2 * m * n), n


def _operator(fx: Any) -> str:
    """'add' of an FX node of aten.add.Tensor; '' of our operators, which launch by themselves."""
    target = getattr(fx, "target", "")
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    namespace, _, name = schema.name.partition("::")
    return "" if namespace == "nanovlm_fast" else name


def moves_only(operators: set[str]) -> bool:
    """Whether a kernel of these operators computes nothing.

    Adding tensors that were scattered into zeros is how a gradient is put together from parts, so
    that with a scatter an addition moves too.
    """
    rest = operators - MOVES
    return bool(operators) and (not rest or (rest == {"add"} and bool(operators & SCATTERS)))


def source_line(fx: Any) -> str:
    """'ops.py:41 rotary': the innermost frame of the project that an FX node comes from."""
    trace = fx.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', trace)
    ours = [frame for frame in frames if "nanovlm_fast" in frame[0] or "/kernels/" in frame[0]]
    if not ours:
        return ""
    file, line, function = ours[-1]
    return f"{file.rpartition('/')[2]}:{line} {function}"


@dataclass(frozen=True)
class Access:
    """Elements of a buffer that one index expression touches, of `whole` elements in all."""

    count: int
    whole: int
    element: int  # bytes
    index: str = "*"
    atomic: bool = False


def traffic(lowering: Any, node: Any, loaded: dict[str, float]) -> tuple[int, int, bool]:
    """(bytes read, bytes written, whether with atomics) of one generated kernel.

    Every element counts once, however often it is indexed. `loaded` gives the elements that are
    loaded under masks, by buffer.
    """
    inside = set(node.get_buffer_names())
    # Buffers that exist only in registers.
    gone = set(lowering.removed_buffers) | set(lowering.inplaced_to_remove)
    reads: dict[str, dict[str, Access]] = defaultdict(dict)
    writes: dict[str, dict[str, Access]] = defaultdict(dict)
    atomic = False
    for sides, dependencies, own in (
        (reads, node.read_writes.reads, inside),
        (writes, node.read_writes.writes, set()),
    ):
        for dependency in dependencies:
            found = _access(lowering, dependency)
            if found is None or dependency.name in gone or dependency.name in own:
                continue
            sides[dependency.name][found.index] = found
            atomic |= found.atomic
    return _bytes(reads, loaded), _bytes(writes, {}), atomic


def _access(lowering: Any, dependency: Any) -> Access | None:
    """What a dependency touches; None if it only orders two kernels, or is no buffer."""
    from torch._inductor.dependencies import MemoryDep, WeakDep
    from torch._inductor.utils import get_dtype_size

    buffer = None if isinstance(dependency, WeakDep) else lowering.try_get_buffer(dependency.name)
    if buffer is None:
        return None

    def hint(expression: Any) -> int:
        return int(lowering.sizevars.optimization_hint(expression, fallback=1))

    whole = hint(buffer.get_numel())
    element = get_dtype_size(buffer.get_dtype())
    if not isinstance(dependency, MemoryDep):
        return Access(whole, whole, element)
    if dependency.is_indirect():
        count = math.prod(hint(length) for length in dependency.size)  # one element per index
    else:
        count = hint(dependency.get_numel())
    atomic = "atomic" in (dependency.mode or "")
    return Access(min(count, whole), whole, element, str(dependency.index), atomic)


def _bytes(side: dict[str, dict[str, Access]], loaded: dict[str, float]) -> int:
    total = 0
    for name, accesses in side.items():
        first = next(iter(accesses.values()))
        count = min(sum(access.count for access in accesses.values()), first.whole)
        if name in loaded:
            count = min(count, round(loaded[name]))
        total += count * first.element
    return total


# ---- the generated wrapper on fake tensors


class _Replay:
    """Enters a graph's launches in the order in which its wrapper makes them."""

    def __init__(self, graph: Graph, recorder: Recorder):
        self.graph = graph
        self.recorder = recorder
        self.left = iter(graph.launches)

    def launch(self, name: str) -> None:
        launch = next(self.left)
        if launch.name != name:
            raise RuntimeError(f"{name} is launched where {launch.name} was generated")
        self.recorder.launches.append(launch)

    # What a wrapper calls while it is loaded: async_compile.triton(...) and .wait(...).

    def triton(self, name: str, source: str, device_str: str = "cuda") -> SimpleNamespace:
        self.graph.kernels[name] = source
        return SimpleNamespace(run=lambda *_, **__: self.launch(name))

    def wait(self, scope: Any) -> None:
        pass


def _replayed(graph: Graph, constants: dict[str, Any], recorder: Recorder) -> Any:
    """The generated module with a `call` that records and computes nothing."""
    replay = _Replay(graph, recorder)
    text = graph.source.replace("async_compile = AsyncCompile()", "async_compile = REPLAY")
    text = text.replace("async_compile.wait(globals())", "")
    name = f"compiled_step_{graph.direction}"
    space: dict[str, Any] = {"__name__": name, "REPLAY": replay, **constants}
    exec(compile(text, f"{name}.py", "exec"), space)
    # After the module has run, since it imports the real ones.
    space |= {
        "empty_strided_cuda": _allocate,
        "reinterpret_tensor": _reinterpret,
        "assert_size_stride": _ignore,
        "assert_alignment": _ignore,
        "copy_if_misaligned": lambda tensor: tensor,
        "get_raw_stream": lambda device: 0,
    }
    call = space["call"]

    def run(args: Any) -> Any:
        recorder.direction = graph.direction
        with recorder:
            return call(args)

    return SimpleNamespace(__file__=f"{name}.py", call=run)


def _allocate(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _ignore(*_: Any, **__: Any) -> None:
    pass


# ---- registers, spills and shared memory, by Triton and ptxas


def machine_code(sources: dict[str, str]) -> list[dict[str, Any]]:
    """Compile every configuration of every kernel for sm_90; one row each.

    A configuration is one choice of tile, warps and stages. Inductor times those of a kernel on the
    device and takes the fastest, so each of them may run. A row of one that does not compile has an
    `error`.
    """
    import torch._inductor.config as inductor
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None  # it would look for libcuda
    for launcher in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(inductor, launcher):  # they load what was compiled onto the device
            setattr(inductor, launcher, False)
    found = []
    for name, source in sources.items():
        tuner = getattr(PyCodeCache.load(source), name)
        found += [{"kernel": name, **_compiled(tuner, config)} for config in tuner.configs]
    return found


def _compiled(tuner: Any, config: Any) -> dict[str, Any]:
    from bench.codegen import resources

    tile = {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
    try:
        kernel = tuner._precompile_config(config).kernel
    except Exception as error:  # one configuration of many: Inductor leaves it out too
        return {"tile": tile, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    usage = resources(kernel.asm["cubin"])
    return {"tile": tile, "shared": kernel.metadata.shared, **usage}


def by_kernel(configurations: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kernel -> how many configurations it has and do not compile, and the most that one takes."""
    found: dict[str, dict[str, int]] = {}
    for row in configurations:
        kernel = found.setdefault(row["kernel"], dict.fromkeys(("configurations", "failed"), 0))
        kernel["configurations"] += 1
        kernel["failed"] += "error" in row
        for name in MOST:
            kernel[name] = max(kernel.get(name, 0), row.get(name, 0))
    return found


def spilled(kernel: dict[str, int]) -> bool:
    """Whether a kernel keeps values in local memory for lack of registers."""
    return kernel["stack"] > 0 or kernel["local"] > 0
