"""Where to compute and in which type, also for devices that this machine lacks."""

from __future__ import annotations

import contextlib

import pytest
import torch

from nanovlm_fast.device import autocast_to, make_current, pick_device, pick_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "has_bfloat16", "expected"),
    [
        ("auto", CPU, False, torch.float32),
        ("bfloat16", CPU, False, torch.bfloat16),
        ("float32", GPU, True, torch.float32),
        ("auto", GPU, True, torch.bfloat16),
        ("auto", GPU, False, torch.float16),  # a T4
        ("float16", CPU, False, torch.float16),
        ("float16", GPU, True, torch.float16),
        ("bfloat16", GPU, True, torch.bfloat16),
    ],
)
def test_the_type_follows_the_device(monkeypatch, capsys, name, device, has_bfloat16, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16
    )
    assert pick_dtype(name, device) == expected
    assert not capsys.readouterr().out, "`evaluate --json` prints one object, and nothing else"


def test_bfloat16_that_a_gpu_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 can only emulate it, use --dtype float16"):
        pick_dtype("bfloat16", GPU)


def test_autocast_computes_in_the_type():
    x = torch.randn(2, 2)
    with autocast_to(torch.bfloat16, CPU)():
        assert (x @ x).dtype == torch.bfloat16
    assert autocast_to(torch.float32, CPU) is contextlib.nullcontext and pick_device("cpu") == CPU


def test_a_numbered_gpu_is_made_the_current_one(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    devices = [torch.device(name) for name in ("cuda:1", "cuda", "cpu")]
    assert [make_current(device) for device in devices] == devices
    assert made == [torch.device("cuda:1")]  # "cuda" is the current one already
