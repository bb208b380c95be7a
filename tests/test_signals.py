"""Signals are noted, agreed on, and left as they were."""

import signal
from pathlib import Path

import pytest
import torch

from vitlinear.signals import Stopped, StopSignals

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_noted_once_and_given_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    second = []
    before = signal.signal(number, lambda *_: second.append(1))
    try:
        with StopSignals() as signals:
            assert signals.agreed(CPU, 3) == 0
            signal.raise_signal(number)
            hint = capfd.readouterr().err
            assert ("Ctrl-C again" in hint) == (number == signal.SIGINT)
            assert signals.agreed(CPU, 3) == signals.agreed(CPU) == number and not second
            signal.raise_signal(number)
            # An impatient Ctrl-C does what it did before. The others may come from both the
            # launcher and the queue, and the second must not end the run that saves its state.
            impatient = [1] if number == signal.SIGINT else []
            assert second == impatient
            assert signals.agreed(CPU) == number
        signal.raise_signal(number)
        assert second == [*impatient, 1]
    finally:
        signal.signal(number, before)


def test_the_message_says_how_to_go_on() -> None:
    stop = Stopped(signal.SIGTERM, "update 7, in epoch 2", Path("a/run"))
    assert str(stop).startswith("stopped by SIGTERM after update 7, in epoch 2, state saved")
    assert "--resume a/run" in str(stop) and stop.exit_status == 143
