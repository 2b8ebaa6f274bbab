"""A run's state survives its file, and what ranks agree on is the sum of their shares."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.stream import initial_states
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import RunState
from nanovlm_fast.training.optim import apply_gradients
from nanovlm_fast.training.steps import StepData, Taken, agree, fill_with_padding

# The keys of every checkpoint since the first one; without `data` and `eval`, which may be absent.
KEYS = set(
    "step examples bad too_long seconds tokens capacity evaluated best_step best_accuracy "
    "interval spikes micro_batches stream".split()
)


def test_a_state_has_the_keys_of_older_checkpoints_and_comes_back_from_them():
    state = RunState(step=3, micro_batches=2, stream=initial_states(4))
    assert state.to_json().keys() == KEYS
    assert RunState.from_json(state.to_json()) == state
    state.data = {"examples": 9}
    state.eval = {"accuracy": 0.5}
    state.filled = {"images": 3, "image_room": 4, "labels": 5, "label_room": 8}
    assert state.to_json().keys() == KEYS | {"data", "eval", "filled"}
    assert RunState.from_json(state.to_json()) == state


def test_keys_of_another_version_are_kept_and_missing_ones_are_named():
    values = {**RunState(step=3).to_json(), "from_tomorrow": [1]}
    assert RunState.from_json(values).to_json() == values
    del values["spikes"], values["bad"]
    with pytest.raises(ValueError, match=r"^no bad, spikes: of another version\?$"):
        RunState.from_json(values)


@dataclasses.dataclass(frozen=True)
class Doubled(World):
    """Two ranks that report the same."""

    size: int = 2

    def sum(self, values: list[float]) -> list[float]:
        return [2 * value for value in values]


def test_agreeing_sums_and_leaves_the_batches_alone(small_config: VLMConfig):
    filled = {"images": 3, "image_room": 4, "labels": 5, "label_room": 8}
    step = StepData(taken=Taken(examples=3, tokens=70, capacity=100, filled=filled))
    agreed = agree(Doubled(), step, pending_skips=1, signalled=True)
    assert (agreed.n_labels, agreed.pending_skips, agreed.signals) == (0, 2, 2)
    twice = {"images": 6, "image_room": 8, "labels": 10, "label_room": 16}
    assert agreed.taken == Taken(6, 140, 200, twice) and step.batches == []


def test_padding_fills_up_with_batches_without_labels(small_config: VLMConfig):
    budget = Budget(64, 8, 2, 16, 64)
    real = pack([], budget, small_config.image_tokens, small_config.vit_img_size)
    step = StepData([real])
    fill_with_padding(step, 3, budget, small_config, torch.device("cpu"))
    assert step.batches[0] is real and len(step.batches) == 3
    assert all(batch.n_labels == 0 for batch in step.batches[1:])
    fill_with_padding(step, 1, budget, small_config, torch.device("cpu"))
    assert len(step.batches) == 3


@pytest.mark.parametrize("keep", [False, True])
def test_one_update_measures_clips_steps_and_zeroes(keep):
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    update = apply_gradients(layer, [optimizer], clip=1.0, keep_gradients=keep)
    assert update.norm.item() == pytest.approx(5) and update.skipped.item() == 0
    torch.testing.assert_close(before - layer.weight, torch.tensor([[0.6, 0.8]]))
    assert layer.weight.grad is None if not keep else not layer.weight.grad.any()
