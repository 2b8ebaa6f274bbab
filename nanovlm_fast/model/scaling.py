"""Loss scaling for training in float16 (`--dtype float16`).

Gradients of activations are float16 there, and below 6e-8 they would become 0. The loss is
multiplied by a scale before the backward pass, and the gradients of the weights, which are float32,
are divided by it before they are measured and used. A scale that is too large makes gradients
overflow: the update is skipped and the scale halved. After 2,000 steps without that it is doubled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScaler(torch.amp.GradScaler):
    """PyTorch's scaler, and how often gradients overflowed. Never waits for the device.

    Used are `scale`, `unscale_` and `update`. Its `step` is not: that one decides optimizer by
    optimizer, so that Muon could step where AdamW is skipped, and it waits for the device wherever
    an optimizer is not a fused one. `optim.apply_gradients` skips all of them by the norm of all
    gradients. Where weights are sharded (DTensor), `unscale_` finds the overflows of all ranks.

    `kept` is what `state_of` gave in the run that is resumed.

    Shapes: `counts` (3,) float64 on the device.
    """

    def __init__(self, device: torch.device, kept: dict[str, Any] | None = None):
        super().__init__(device.type)
        kept = kept or {}
        if kept:
            if not (len(kept["counts"]) == 3 and 0 < kept["scale"] < float("inf")):
                raise ValueError("a scale above 0 and three counts are needed")
            state = {"scale": kept["scale"], "_growth_tracker": kept["growth_tracker"]}
            self.load_state_dict({**self.state_dict(), **state})
        # Now and not with the first loss: a checkpoint may be written before it.
        self._lazy_init_scale_growth_tracker(device)
        # Overflows in all; steps in a row until now whose scale was below 1, and most in a row
        # since the last line of the log.
        self.counts = torch.tensor(kept.get("counts", [0, 0, 0]), dtype=torch.float64).to(device)

    def count(self, skipped: Tensor, loss_is_bad: Tensor) -> Tensor:
        """Count a step after `update`; return 1.0 if it was skipped and was not an overflow.

        Both arguments are 0.0 or 1.0. A loss that is not finite is no overflow of gradients: it is
        computed without the scale, and no scale would help.
        """
        scale, _ = self._check_scale_growth_tracker("count")
        bad = skipped * loss_is_bad
        row = (self.counts[1] + 1) * (scale < 1)
        self.counts = torch.stack(
            [self.counts[0] + skipped - bad, row, torch.maximum(self.counts[2], row)]
        )
        return bad

    def begin_interval(self) -> None:
        """Forget the most steps in a row, now that they are in a line of the log."""
        self.counts[2].zero_()

    def readings(self) -> Tensor:
        """(READINGS,) float64 on the device, which `state_of` names."""
        scale, growth_tracker = self._check_scale_growth_tracker("readings")
        return torch.cat([torch.stack([scale.double(), growth_tracker.double()]), self.counts])


READINGS = 5


def state_of(readings: list[float]) -> dict[str, Any]:
    """What a resumed run's scaler begins with, of `readings` on the host."""
    scale, growth_tracker, *counts = readings
    return {"scale": scale, "growth_tracker": int(growth_tracker), "counts": counts}


def make_scaler(
    dtype: torch.dtype, device: torch.device, kept: dict[str, Any] | None = None
) -> LossScaler | None:
    """The scaler of a run that computes in `dtype`: None where the loss needs none.

    Raises ValueError if `kept`, from a checkpoint, is damaged.
    """
    if dtype != torch.float16:
        return None
    try:
        return LossScaler(device, kept)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        damaged = f"the checkpoint's loss_scale is damaged ({error!r:.80})"
        raise ValueError(f"{damaged}; --dtype float32 does without it") from error
