"""One graph for a whole run: real mixed batches from the stream, counted by Dynamo itself."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from nanovlm_fast.config import TrainConfig, VLMConfig, fields_of
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, texts
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.model.compiling import print_nodes_by_name
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.presets import PRESETS
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.warmup import warm_up


@pytest.mark.parametrize("recompute", ["none", "norms_and_activations"])
def test_fifty_steps_of_real_batches_are_one_graph(recompute):
    """No graph breaks (fullgraph would raise), and nothing is compiled after the warm-up."""
    tiny = {
        **PRESETS["tiny"],
        "vit_n_blocks": 1,
        "tokens_per_batch": 600,
        "workers": 0,
        "look_ahead": 16,
    }
    config = VLMConfig(**fields_of(VLMConfig, tiny))
    train = TrainConfig(
        **fields_of(TrainConfig, tiny), data="easy_vqa", curriculum="what shape", augment="shift"
    )
    train.epochs = 1
    source = load_source("easy_vqa", "train")
    tokenizer = Tokenizer.train(texts(source, config.prompt), config.lm_vocab_size)
    load = SampleLoader(
        source, config, train, TextProcessor(tokenizer, config.prompt, config.image_tokens)
    )
    stream = PackedStream(load, measure_budget(load, train, probe=100), initial_states(1))
    stream.curriculum_end = 60  # both kinds of batches
    model = VisionLanguageModel(config, choose_ops("none", recompute=recompute))
    torch._dynamo.reset()
    counters.clear()
    compiler = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)
    warm_up(step, model, stream.budget, contextlib.nullcontext)
    assert compiler.frame_count == 1
    shapes = set()
    feed = Feed(iter(loader(stream)), torch.device("cpu"))
    for batch, packed in itertools.islice(feed, 50):
        step(packed).backward()
        shapes.add((batch.packed.n_tokens, batch.packed.n_images, batch.packed.n_documents))
        model.zero_grad()
    assert len(shapes) > 20, "the batches are too much alike to tell"
    assert compiler.frame_count == 1 and not counters["graph_break"]


def test_inductor_prints_a_node_without_what_it_reads(monkeypatch):
    """With the readers of readers, PyTorch 2.11 never came to the end of a step's kernels."""
    from torch._inductor.ir import ExternKernel

    for name in ("__str__", "__repr__"):
        monkeypatch.setattr(ExternKernel, name, getattr(ExternKernel, name))
    print_nodes_by_name()
    node = object.__new__(ExternKernel)
    object.__setattr__(node, "name", "buf3")
    object.__setattr__(node, "inputs", [node])  # would be printed without an end
    assert str(node) == repr(node) == "ExternKernel(buf3)"
