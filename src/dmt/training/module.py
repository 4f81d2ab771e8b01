"""The training step that every LightningModule here shares: one step is one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.config_io import build_config
from dmt.distributed import all_reduce_mean
from dmt.errors import UserError
from dmt.training.optimization import (
    check_finite,
    clip_gradients,
    measure_gradients,
    no_sync,
)


class TrainingModule(pl.LightningModule):
    """A LightningModule whose training step is one optimizer step over micro-batches.

    The step sets the learning rate, accumulates the gradients of all micro-batches, clips them,
    checks that they are finite, updates the weights and logs. A subclass says what is trained:
    `total_steps`, `trained_model`, `get_lr`, `split_batch`, `compute_terms` and
    `configure_optimizers`; it may override `step_context`, `after_backward`, `before_update`,
    `after_update` and `extra_metrics`. Memory depends on the size of a micro-batch, the result
    does not.

    Args:
        config: settings, or their dict in a checkpoint; `optim`, `data.micro_batch_size` and
            `trainer.log_every` are read here.
    """

    def __init__(self, config: Config | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, Config):
            config = build_config(dict(config))
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings = config

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        raise NotImplementedError

    @property
    def trained_model(self) -> PreTrainedModel:
        """The model that is searched for the layer where values stopped being finite."""
        raise NotImplementedError

    def get_lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        raise NotImplementedError

    def split_batch(self, batch: Any) -> Sequence[Any]:
        """Split a batch into micro-batches, anything that `compute_terms` takes."""
        raise NotImplementedError

    def compute_terms(self, micro_batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch `()`, and terms by name.

        Losses and terms are summed over the micro-batches of a step. Terms are logged as
        `train/<name>`. A loss without gradient is not propagated.
        """
        raise NotImplementedError

    @contextmanager
    def step_context(self, step: int) -> Iterator[None]:
        """Enter what holds during a step, from its first micro-batch to `after_update`."""
        yield

    def after_backward(self, step: int) -> None:
        """Act when the gradients of a step are complete; called before they are clipped."""

    def before_update(self, step: int) -> None:
        """Act when the gradients of a step are complete and finite."""

    def after_update(self, step: int) -> None:
        """Act when the weights have been updated."""

    def extra_metrics(self) -> dict[str, float]:
        """Return more metrics of the step, to be logged beside its terms."""
        return {}

    def on_train_start(self) -> None:
        """Refuse a Trainer that scales the loss."""
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "precision='16-mixed' of the Trainer scales gradients, which are clipped and "
                "checked here; use bf16-mixed or 32-true"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop a Trainer that would continue after the last step of the schedule."""
        if self.global_step >= self.total_steps != self.trainer.max_steps:
            self.trainer.should_stop = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step."""
        with self.step_context(self.global_step):
            self._run_step(batch)

    def _run_step(self, batch: Any) -> None:
        step, optimizer = self.global_step, self.optimizers()
        lr = self.get_lr(step)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = lr * group["lr_scale"]
        optimizer.zero_grad()  # type: ignore[union-attr]
        micro_batches = self.split_batch(batch)
        total_loss = torch.zeros((), device=self.device)
        totals: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches, 1):
            with no_sync(self, is_last=index == len(micro_batches)):
                loss, terms = self.compute_terms(micro_batch)
                if loss.requires_grad:
                    self.manual_backward(loss)
            total_loss += loss.detach()
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
        self.after_backward(step)
        grad_norm = measure_gradients(optimizer)  # type: ignore[arg-type]
        # The only time in a step that the host waits for a GPU.
        check_finite(
            step + 1,
            total_loss,
            grad_norm,
            self.trained_model,
            lambda: [self.compute_terms(micro_batch) for micro_batch in micro_batches],
        )
        clip_gradients(optimizer, self.settings.optim.grad_clip, grad_norm)  # type: ignore[arg-type]
        self.before_update(step)
        optimizer.step()  # type: ignore[union-attr]
        self.after_update(step)
        self.log("loss", total_loss, prog_bar=True, logger=False)
        if step % self.settings.trainer.log_every == 0 or step == self.total_steps - 1:
            means = all_reduce_mean(torch.stack([value.float() for value in totals.values()]))
            metrics = {
                f"train/{name}": value for name, value in zip(totals, means.tolist(), strict=True)
            }
            self.log_metrics({"lr": lr} | metrics | self.extra_metrics(), step)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics to every logger at once.

        `self.log` would keep writing the last value of a stage that is over.
        """
        for logger in self.loggers:
            logger.log_metrics(metrics, step)
