"""What a person sees while a run goes on, and how it stops without losing anything."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from dmt.config import LOSS_TERMS, Config
from dmt.distributed import all_reduce_max, all_reduce_sum
from dmt.evaluation.samples import format_samples_table, paired_samples
from dmt.memory.associative import RetrievalStats
from dmt.models.conversion import get_associative_memories, get_featural_memories, get_memories

ChartLayout = dict[str, dict[str, list[Any]]]
"""Groups of charts, as TensorBoard's custom scalars want them."""


def compute_slot_usage(reads: Tensor) -> dict[str, float]:
    """From reads per slot `(slots,)`: share of slots read at all, dead slots, and entropy as a share of its maximum."""
    reads = reads.cpu()
    fractions = reads.double() / reads.sum().clamp(min=1)
    entropy = (
        -(fractions * fractions.clamp(min=1e-300).log()).sum()
        / torch.tensor(float(max(2, len(reads)))).log()
    )
    dead = int((reads == 0).sum())
    return {"used": 1 - dead / len(reads), "dead": float(dead), "entropy": float(entropy)}


class SlotUsage(Callback):
    """Counts which slots validation text reads; logs dead slots, entropy and a histogram for every layer."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for memory in get_featural_memories(module.student).values():  # type: ignore[arg-type]
            memory.count_reads()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for layer, memory in get_featural_memories(module.student).items():  # type: ignore[arg-type]
            assert memory.read_counts is not None, "counting began with the validation"
            reads, tokens = (
                all_reduce_sum(memory.read_counts),
                int(all_reduce_sum(memory.read_counts.new_tensor(memory.counted_tokens))),
            )
            if not tokens:  # nobody asked it anything: that it read nothing would be no measurement
                memory.read_counts = None
                continue
            for name, value in (
                compute_slot_usage(reads) | {"read": float(reads.sum()) / tokens}
            ).items():
                trainer.logger.log_metrics(
                    {f"slots_{name}/layer_{layer}": value}, step=trainer.global_step
                )  # type: ignore[union-attr]
            if writer := get_tensorboard_writer(trainer):
                # Reads span orders of magnitude; their logarithm shows both the dead and the overworked.
                writer.add_histogram(
                    f"slot_reads_log10/layer_{layer}",
                    (reads + 1).float().log10(),
                    trainer.global_step,
                )
            memory.read_counts = None


class StoredRowUsage(Callback):
    """What validation text finds among stored rows: how near, how much is left to the base; how old and used rows are."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for memory in get_associative_memories(module.student).values():  # type: ignore[arg-type]
            memory.retrieval_stats = RetrievalStats()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for layer, memory in get_associative_memories(module.student).items():  # type: ignore[arg-type]
            assert memory.retrieval_stats is not None, "listening began with the validation"
            stats = memory.retrieval_stats.all_reduce(memory.rows.keys.device)
            if stats.num_tokens and len(
                memory.rows
            ):  # before there are rows there is nobody to share with
                trainer.logger.log_metrics(
                    {f"rows_base/layer_{layer}": stats.mean_null_weight}, step=trainer.global_step
                )  # type: ignore[union-attr]
            if (writer := get_tensorboard_writer(trainer)) and stats.nearest_distances:
                positions = sorted(memory.rows.index_by_id.values())
                histories = memory.rows.stats
                histograms = {
                    "rows_distance": torch.cat(stats.nearest_distances),
                    "rows_age_seconds": torch.as_tensor(time.time() - histories.created[positions]),
                    "rows_reads_log10": torch.as_tensor(histories.reads[positions] + 1).log10(),
                }
                for name, values in histograms.items():
                    writer.add_histogram(f"{name}/layer_{layer}", values, trainer.global_step)
            memory.retrieval_stats = None


class SideBySideSamples(Callback):
    """Writes how teacher and student go on from the same validation text, side by side."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not (writer := get_tensorboard_writer(trainer)):
            return
        for corpus in trainer.datamodule.corpora:  # type: ignore[attr-defined]
            samples = paired_samples(
                module.student, module.teacher, self.tokenizer, corpus.validation
            )  # type: ignore[arg-type]
            writer.add_text(
                f"samples/{corpus.name}", format_samples_table(samples), trainer.global_step
            )


class ChartGroups(Callback):
    """Groups curves that belong together: one measure of all corpora, or of all layers, on one chart."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (writer := get_tensorboard_writer(trainer)) and not trainer.global_step:
            corpora = [corpus.name for corpus in trainer.datamodule.corpora]  # type: ignore[attr-defined]
            writer.add_custom_scalars(self.build_layout(module, corpora))

    def build_layout(self, module: Any, corpora: list[str]) -> ChartLayout:
        """Charts by title, in groups; of curves that will be there, and no others."""
        metrics = ("kl", "ppl_ratio", "top1_agreement")
        groups = {
            "losses": _make_stage_charts(module.settings),
            "student against teacher": {
                name: _make_multiline([f"{corpus}/{name}" for corpus in corpora])
                for name in metrics
            },
            "layers": {
                "block error": _make_layer_chart("block_error", get_memories(module.student))
            },
        }
        if featural := get_featural_memories(module.student):
            titles = {
                "dead slots": "slots_dead",
                "usage entropy": "slots_entropy",
                "slots read per token": "slots_read",
            }
            groups["layers"] |= {
                title: _make_layer_chart(tag, featural) for title, tag in titles.items()
            }
        if associative := get_associative_memories(module.student):
            titles = {
                "rows": "rows",
                "inserted in a step": "rows_inserted",
                "evicted in a step": "rows_evicted",
                "merged in a step": "rows_merged",
                "share of the base": "rows_base",
            }
            groups["rows"] = {
                title: _make_layer_chart(tag, associative) for title, tag in titles.items()
            }
        return groups


def _make_multiline(tags: Iterable[str]) -> list[Any]:
    return ["Multiline", list(tags)]


def _make_layer_chart(tag: str, layers: Iterable[int]) -> list[Any]:
    return _make_multiline(f"{tag}/layer_{layer}" for layer in layers)


def _make_stage_charts(config: Config) -> dict[str, list[Any]]:
    """Loss and terms of each stage that there is."""
    charts = {}
    if config.stages.layerwise_steps:
        charts["layer by layer"] = _make_multiline(["layerwise/loss"])
    if config.stages.end_to_end_steps:
        terms = [term for term in LOSS_TERMS if getattr(config.loss, term)]
        charts["end to end"] = _make_multiline(f"end_to_end/{term}" for term in ("loss", *terms))
    return charts


class StepProgressBar(RichProgressBar):
    """Lightning's bar: steps, time gone and left, loss. A run is one pass of steps, so epochs are not spoken of."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training".ljust(len(self.validation_description))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {
            name: value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.received_signal: int | None = None
        """Number of the signal that this process, or another that trains with it, was sent."""
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        own_signals: list[int] = []

        def handle_signal(signum: int, _: FrameType | None) -> None:
            if own_signals:
                raise KeyboardInterrupt
            own_signals.append(signum)
            self.received_signal = self.received_signal or signum
            if trainer.world_size == 1:  # of several, none may stop before all know
                trainer.should_stop = True

        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[signum] = signal.signal(signum, handle_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any
    ) -> None:
        # One process may have been told alone; all stop after the same step, or the others would wait for it for ever.
        if signum := int(
            all_reduce_max(self.received_signal or 0)
        ):  # a signal may come at this very moment: it is for the step after
            self.received_signal = signum
            trainer.should_stop = True
            # At once: a validation may follow before training ends, and whoever sent the signal may not wait for it.
            trainer.save_checkpoint(self.checkpoint_dir / f"step_{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}


def get_tensorboard_writer(trainer: pl.Trainer) -> Any:
    """TensorBoard's writer on the process that logs, else None."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
