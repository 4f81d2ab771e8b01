"""Lightning callbacks: what a run shows while it trains, and how a signal stops it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from dmt import signals
from dmt.config import Config
from dmt.distributed import all_reduce_max
from dmt.evaluation.metrics import compute_slot_usage
from dmt.evaluation.samples import format_samples_table, paired_samples
from dmt.memory.associative import RetrievalStats, record_retrieval
from dmt.memory.usage import UsageCounts, record_usage
from dmt.models.memories import get_associative_memories, get_memories, get_slot_memories
from dmt.progress import ProgressLog

# Groups of charts for TensorBoard's custom scalars: group -> title -> chart.
ChartLayout = dict[str, dict[str, list[Any]]]


def get_last_step(trainer: pl.Trainer) -> int:
    """Return the last step counted from 0, under which its curves are logged.

    A resumed run replaces the curves from the step of its checkpoint on.
    """
    return max(0, trainer.global_step - 1)


def log_to_all(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Log metrics of the current step to every logger but the CSV file, which has the curves."""
    for run_logger in trainer.loggers:
        if not isinstance(run_logger, CSVLogger):
            run_logger.log_metrics(metrics, step=get_last_step(trainer))


class SlotUsage(Callback):
    """Log which slots validation text reads: dead slots, entropy and a histogram of each layer."""

    def __init__(self) -> None:
        self._recording = ExitStack()
        self._usage: dict[int, UsageCounts] = {}

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start counting reads."""
        memories = get_slot_memories(module.student)  # type: ignore[arg-type]
        self._usage = self._recording.enter_context(record_usage(memories))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, error: Any) -> None:
        """Stop recording."""
        self._recording.close()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the counts and stop counting."""
        self._recording.close()
        for layer, rank_counts in self._usage.items():
            counts = rank_counts.all_reduce()
            if not counts.tokens:  # a memory without queries has no usage
                continue
            usage = compute_slot_usage(counts.reads) | {"active_per_token": counts.mean_reads}
            log_to_all(
                trainer, {f"slots/{name}/layer_{layer}": value for name, value in usage.items()}
            )
            if writer := get_tensorboard_writer(trainer):
                # Reads span orders of magnitude.
                writer.add_histogram(
                    f"slots/log10_reads/layer_{layer}",
                    (counts.reads + 1).float().log10(),
                    get_last_step(trainer),
                )


class StoredRowUsage(Callback):
    """Log what validation text retrieves from stored rows: distance, weight of the base, age."""

    def __init__(self) -> None:
        self._recording = ExitStack()
        self._stats: dict[int, RetrievalStats] = {}

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start recording retrievals."""
        memories = get_associative_memories(module.student)  # type: ignore[arg-type]
        self._stats = self._recording.enter_context(record_retrieval(memories))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, error: Any) -> None:
        """Stop recording."""
        self._recording.close()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the statistics and stop recording."""
        self._recording.close()
        for layer, memory in get_associative_memories(module.student).items():  # type: ignore[arg-type]
            stats = self._stats[layer].all_reduce(memory.rows.keys.device)
            if stats.num_tokens and len(memory.rows):  # without rows the base has all the weight
                log_to_all(trainer, {f"knn/null_weight/layer_{layer}": stats.mean_null_weight})
            if (writer := get_tensorboard_writer(trainer)) and stats.nearest_distances:
                positions = sorted(memory.rows.index_by_id.values())
                row_stats = memory.rows.stats
                histograms = {
                    "nearest_distance": torch.cat(stats.nearest_distances),
                    "row_age_seconds": torch.as_tensor(time.time() - row_stats.created[positions]),
                    "log10_row_reads": torch.as_tensor(row_stats.reads[positions] + 1).log10(),
                }
                for name, values in histograms.items():
                    writer.add_histogram(
                        f"knn/{name}/layer_{layer}", values, get_last_step(trainer)
                    )


class SideBySideSamples(Callback):
    """Write how teacher and student continue the same validation text, side by side."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write samples of each corpus to TensorBoard."""
        if not (writer := get_tensorboard_writer(trainer)):
            return
        for corpus in trainer.datamodule.corpora:  # type: ignore[attr-defined]
            samples = paired_samples(
                module.student,  # type: ignore[arg-type]
                module.teacher,  # type: ignore[arg-type]
                self.tokenizer,
                corpus.validation,
            )
            writer.add_text(
                f"samples/{corpus.name}", format_samples_table(samples), get_last_step(trainer)
            )


class ChartGroups(Callback):
    """Put curves that belong together on one chart: a metric of all corpora, or of all layers."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the layout to TensorBoard at the first step."""
        if (writer := get_tensorboard_writer(trainer)) and not trainer.global_step:
            corpora = [corpus.name for corpus in trainer.datamodule.corpora]  # type: ignore[attr-defined]
            writer.add_custom_scalars(self.build_layout(module, corpora))

    def build_layout(self, module: Any, corpora: list[str]) -> ChartLayout:
        """Return the charts of the curves that this run will have, by group and title."""
        metrics = ("kl", "ppl_ratio", "top1_agreement")
        groups = {
            "losses": _make_stage_charts(module.settings),
            "student vs teacher": {
                name: _make_multiline([f"val/{corpus}/{name}" for corpus in corpora])
                for name in metrics
            },
            "layers": {"FVU per layer": _make_layer_chart("val/fvu", get_memories(module.student))},
        }
        if slot_memories := get_slot_memories(module.student):
            titles = {
                "dead slots": "slots/dead",
                "usage entropy": "slots/usage_entropy",
                "active slots per token": "slots/active_per_token",
            }
            groups["layers"] |= {
                title: _make_layer_chart(tag, slot_memories) for title, tag in titles.items()
            }
        if associative := get_associative_memories(module.student):
            titles = {
                "rows": "knn/rows",
                "inserted per step": "knn/inserted",
                "evicted per step": "knn/evicted",
                "merged per step": "knn/merged",
                "null weight": "knn/null_weight",
            }
            groups["knn rows"] = {
                title: _make_layer_chart(tag, associative) for title, tag in titles.items()
            }
        return groups


def _make_multiline(tags: Iterable[str]) -> list[Any]:
    return ["Multiline", list(tags)]


def _make_layer_chart(tag: str, layers: Iterable[int]) -> list[Any]:
    return _make_multiline(f"{tag}/layer_{layer}" for layer in layers)


def _make_stage_charts(config: Config) -> dict[str, list[Any]]:
    """Return a chart of the loss and its terms for each stage."""
    charts = {}
    if config.stages.layerwise_steps:
        charts["layerwise"] = _make_multiline(["train/layerwise_loss"])
    if config.stages.end_to_end_steps:
        terms = ("loss", *config.loss.term_weights())
        charts["end to end"] = _make_multiline(f"train/{term}" for term in terms)
    return charts


class StepProgressBar(RichProgressBar):
    """Lightning's bar with steps, time and loss, but no epochs: a run is one pass of steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training".ljust(len(self.validation_description))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the metrics to show, without the number of the run."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class StepProgressLog(Callback):
    """Log a dated line with step, loss and time left, now and then."""

    def __init__(self) -> None:
        self._progress: ProgressLog | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember when training started."""
        self._progress = ProgressLog("step", trainer.max_steps, start=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any
    ) -> None:
        """Log a line if the last one is old enough."""
        if self._progress is None or not trainer.is_global_zero or not self._progress.is_due():
            return
        loss = trainer.progress_bar_metrics.get("loss")
        details = "" if loss is None else f"  loss {float(loss):.4g}"
        self._progress.update(trainer.global_step, details)


def make_progress_callback() -> Callback:
    """Return the progress display that suits the output: a notebook, a terminal or a log file."""
    if _is_notebook():
        return TQDMProgressBar()
    return StepProgressBar() if sys.stdout.isatty() else StepProgressLog()


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell" or "google.colab" in sys.modules


class StopOnSignal(Callback):
    """End the run after the current step on one of `SIGNALS`; a second signal ends it at once.

    It installs handlers only within `signals.stop_at_step_end`, that is in a command, and only in
    the main thread.

    Args:
        checkpoint_dir: Where the last checkpoint is saved.

    Attributes:
        received_signal: Number of the signal sent to this process or to one it trains with.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.received_signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        if not signals.stops_at_step_end():
            return
        own_signals: list[int] = []

        def handle_signal(signum: int, _: FrameType | None) -> None:
            if own_signals:
                raise KeyboardInterrupt
            own_signals.append(signum)
            self.received_signal = self.received_signal or signum
            if trainer.world_size == 1:  # several processes have to agree first
                trainer.should_stop = True

        self._previous_handlers = signals.handle_signals(handle_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any
    ) -> None:
        """Save and stop if any process received a signal."""
        # The signal may have reached one process alone, but all have to stop after the same step.
        # A signal during this call counts for the next step.
        if signum := int(all_reduce_max(self.received_signal or 0)):
            self.received_signal = signum
            trainer.should_stop = True
            # At once, because a validation may follow and the sender may not wait for it.
            trainer.save_checkpoint(self.checkpoint_dir / f"step_{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        signals.set_handlers(self._previous_handlers)
        self._previous_handlers = {}


def get_tensorboard_writer(trainer: pl.Trainer) -> Any:
    """Return TensorBoard's writer in the process that logs, else None."""
    for run_logger in trainer.loggers:
        if isinstance(run_logger, TensorBoardLogger) and trainer.is_global_zero:
            return run_logger.experiment
    return None
