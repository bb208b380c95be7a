"""The device that ``--device`` means."""

import pytest
import torch

from vitlinear.cli.device import choose_device
from vitlinear.errors import UserError


@pytest.mark.parametrize(("name", "number"), [("cuda", 3), ("cuda:1", 1), (None, 3)])
def test_a_gpu_has_its_number(
    name: str | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.cuda.set_device`` refuses one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert choose_device(name) == torch.device("cuda", number)


def test_each_process_touches_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(device))
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert choose_device(None) == torch.device("cuda", 2)
    assert touched == [torch.device("cuda", 2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, 2 are visible"):
        choose_device("cuda")


def test_no_such_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device warp cannot be used here"):
        choose_device("warp")
