"""The largest token budget that fits a device's memory, found by trials.

A trial says what a step of so many tokens takes. Beside what does not depend on them (weights,
gradients, optimizer) memory grows with the tokens, so two small trials predict the size that fits;
a third one confirms it, and more follow only where the prediction was wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.packing.waves import SMS, wave_fill

Trial = Callable[[int], float | None]  # tokens -> bytes at the peak; None: out of memory

# A tenth is left to fragmentation, and to batches that are unlike the one that was tried.
SPARE = 0.1
ROWS = 128  # of a tile: budgets are multiples of it
TRIES = 6
GAIN = 1.05  # a larger budget is tried only if it is larger by as much
MOST = 2**18  # tokens; a step of more has no faster tokens


def largest_budget(
    trial: Trial, memory: float, model: VLMConfig, longest: int, sms: int = SMS
) -> int:
    """Return the most tokens of a step that takes at most 90% of `memory` bytes.

    `longest` is the longest document, which must fit. The number is a multiple of 128 that fills
    the waves of `sms` multiprocessors well. Raises ValueError if no budget was found that fits.
    """
    room = (1 - SPARE) * memory
    least = rounded_up(max(longest, 8 * ROWS))
    sizes = [least, 2 * least]
    peaks = [trial(size) for size in sizes]
    if peaks[0] is None or peaks[0] > room:
        there = f"90% of {memory / 1e9:.1f} GB"
        raise ValueError(
            f"--tokens-per-batch auto: not even {least} tokens fit in {there}; --recompute blocks "
            "takes less memory"
        )
    if peaks[1] is None:
        return least
    best = sizes[1] if peaks[1] <= room else least
    slope = max((peaks[1] - peaks[0]) / least, 1e-9)
    fixed = peaks[0] - slope * least
    guess = (room - fixed) / slope
    for _ in range(TRIES):
        tokens = filling(guess, model, sms)
        if tokens <= GAIN * best:
            break
        used = trial(tokens)
        if used is None:
            guess = 0.8 * tokens
        elif used > room:
            guess = min(0.97, (room - fixed) / (used - fixed)) * tokens
        else:
            best = tokens
            guess = (room - fixed) / (used - fixed) * tokens
    return best


def rounded_up(tokens: int) -> int:
    return -(-tokens // ROWS) * ROWS


def filling(guess: float, model: VLMConfig, sms: int) -> int:
    """Of the multiples of 128 down to 95% of `guess`, the one that fills its waves best."""
    most = max(int(min(guess, MOST)) // ROWS, 1)
    least = max(int(0.95 * most), 1)
    sizes = [ROWS * n for n in range(least, most + 1)]
    # Of equals the largest.
    return max(sizes, key=lambda tokens: (round(wave_fill(tokens, model, sms), 3), tokens))
