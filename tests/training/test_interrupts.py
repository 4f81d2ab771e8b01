"""What a run that ends early says: after which step, and with which rate it goes on."""

import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dmt.config import Config, SleepConfig, StagesConfig
from dmt.errors import UserError
from dmt.training.interrupts import RunInterrupted, report_interruption
from dmt.training.optimization import NonFiniteError


@pytest.mark.parametrize(
    ("task", "step", "setting"),
    [
        ("distill", 3, "stages.layerwise_lr=0.1"),
        ("distill", 4, "stages.end_to_end_lr=0.2"),
        ("consolidate", 3, "stages.end_to_end_lr=0.2"),
        ("sleep", 3, "sleep.lr=0.05"),
    ],
)
def test_a_quarter_of_the_rate_of_the_step_is_suggested(tmp_path, task, step, setting):
    config = replace(
        Config(),
        task=task,
        stages=StagesConfig(layerwise_steps=3, layerwise_lr=0.4, end_to_end_lr=0.8),
        sleep=SleepConfig(lr=0.2),
    )
    with (
        pytest.raises(UserError, match=rf"step {step}: the loss is not .* {setting}$"),
        report_interruption(config, tmp_path, SimpleNamespace(received_signal=None)),
    ):
        raise NonFiniteError(step, "the loss")


@pytest.mark.parametrize(
    ("received_signal", "arguments", "signum"),
    [
        (signal.SIGTERM, [signal.SIGINT], signal.SIGTERM),
        (None, [signal.SIGHUP], signal.SIGHUP),
        (None, [], signal.SIGINT),  # Ctrl-C in a notebook
    ],
)
def test_an_interrupt_has_its_signal_and_leaves_the_handler(
    tmp_path, received_signal, arguments, signum
):
    before = signal.getsignal(signal.SIGINT)
    stop_callback = SimpleNamespace(received_signal=received_signal)

    def interrupt():
        with report_interruption(Config(), tmp_path, stop_callback):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Lightning does
            try:
                raise KeyboardInterrupt(*arguments)
            except KeyboardInterrupt:
                sys.exit(1)

    for newest, state in ((None, "before the first checkpoint; begin again"), (8, "after step 8;")):
        if newest is not None:
            (tmp_path / "checkpoints").mkdir()
            for step in (newest - 1, newest):
                (tmp_path / "checkpoints" / f"step_{step}.ckpt").touch()
        with pytest.raises(RunInterrupted, match=f"^stopped {state}") as caught:
            interrupt()
        assert caught.value.signum == signum
        assert signal.getsignal(signal.SIGINT) == before
