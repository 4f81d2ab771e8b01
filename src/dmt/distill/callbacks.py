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
from dmt.distill.continuing import continued, table
from dmt.memory.associative import Heard
from dmt.memory.together import largest, summed
from dmt.models.surgery import associative_of, featural_of, memories_of

Layout = dict[str, dict[str, list[Any]]]
"""Groups of charts, as TensorBoard's custom scalars want them."""


def usage(reads: Tensor) -> dict[str, float]:
    """From reads per slot `(slots,)`: share of slots read at all, dead slots, and entropy as a share of its maximum."""
    reads = reads.cpu()
    share = reads.double() / reads.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum() / torch.tensor(float(max(2, len(reads)))).log()
    dead = int((reads == 0).sum())
    return {"used": 1 - dead / len(reads), "dead": float(dead), "entropy": float(entropy)}


class SlotUsage(Callback):
    """Counts which slots validation text reads; logs dead slots, entropy and a histogram for every layer."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for memory in featural_of(module.student).values():  # type: ignore[arg-type]
            memory.count_reads()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for layer, memory in featural_of(module.student).items():  # type: ignore[arg-type]
            assert memory.reads is not None, "counting began with the validation"
            reads, tokens = summed(memory.reads), int(summed(memory.reads.new_tensor(memory.reads_tokens)))
            if not tokens:  # nobody asked it anything: that it read nothing would be no measurement
                memory.reads = None
                continue
            for name, value in (usage(reads) | {"read": float(reads.sum()) / tokens}).items():
                trainer.logger.log_metrics({f"slots_{name}/layer_{layer}": value}, step=trainer.global_step)  # type: ignore[union-attr]
            if board := tensorboard(trainer):
                # Reads span orders of magnitude; their logarithm shows both the dead and the overworked.
                board.add_histogram(f"slot_reads_log10/layer_{layer}", (reads + 1).float().log10(), trainer.global_step)
            memory.reads = None


class StoredRows(Callback):
    """What validation text finds among stored rows: how near, how much is left to the base; how old and used rows are."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for memory in associative_of(module.student).values():  # type: ignore[arg-type]
            memory.heard = Heard()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for layer, memory in associative_of(module.student).items():  # type: ignore[arg-type]
            assert memory.heard is not None, "listening began with the validation"
            heard = memory.heard.of_all(memory.rows.keys.device)
            if heard.tokens and len(memory.rows):  # before there are rows there is nobody to share with
                trainer.logger.log_metrics({f"rows_base/layer_{layer}": heard.share}, step=trainer.global_step)  # type: ignore[union-attr]
            if (board := tensorboard(trainer)) and heard.nearest:
                there = sorted(memory.rows.place_of.values())
                known = memory.rows.histories
                seen = {
                    "rows_distance": torch.cat(heard.nearest),
                    "rows_age_seconds": torch.as_tensor(time.time() - known.created[there]),
                    "rows_reads_log10": torch.as_tensor(known.reads[there] + 1).log10(),
                }
                for name, values in seen.items():
                    board.add_histogram(f"{name}/layer_{layer}", values, trainer.global_step)
            memory.heard = None


class Samples(Callback):
    """Writes how teacher and student go on from the same validation text, side by side."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not (board := tensorboard(trainer)):
            return
        for corpus in trainer.datamodule.corpora:  # type: ignore[attr-defined]
            found = continued(module.student, module.teacher, self.tokenizer, corpus.validation)  # type: ignore[arg-type]
            board.add_text(f"samples/{corpus.name}", table(found), trainer.global_step)


class Charts(Callback):
    """Groups curves that belong together: one measure of all corpora, or of all layers, on one chart."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (board := tensorboard(trainer)) and not trainer.global_step:
            corpora = [corpus.name for corpus in trainer.datamodule.corpora]  # type: ignore[attr-defined]
            board.add_custom_scalars(self.charts(module, corpora))

    def charts(self, module: Any, corpora: list[str]) -> Layout:
        """Charts by title, in groups; of curves that will be there, and no others."""
        measures = ("kl", "ratio", "agreement")
        found = {
            "losses": _stages(module.settings),
            "student against teacher": {name: _together([f"{corpus}/{name}" for corpus in corpora]) for name in measures},
            "layers": {"block error": _of_layers("block_error", memories_of(module.student))},
        }
        if slots := featural_of(module.student):
            titles = {"dead slots": "slots_dead", "usage entropy": "slots_entropy", "slots read per token": "slots_read"}
            found["layers"] |= {title: _of_layers(tag, slots) for title, tag in titles.items()}
        if stored := associative_of(module.student):
            titles = {
                "rows": "rows", "inserted in a step": "rows_inserted", "evicted in a step": "rows_evicted",
                "merged in a step": "rows_merged", "share of the base": "rows_base",
            }  # fmt: skip
            found["rows"] = {title: _of_layers(tag, stored) for title, tag in titles.items()}
        return found


def _together(tags: Iterable[str]) -> list[Any]:
    return ["Multiline", list(tags)]


def _of_layers(tag: str, layers: Iterable[int]) -> list[Any]:
    return _together(f"{tag}/layer_{layer}" for layer in layers)


def _stages(config: Config) -> dict[str, list[Any]]:
    """Loss and terms of each stage that there is."""
    found = {}
    if config.stages.layerwise_steps:
        found["layer by layer"] = _together(["layerwise/loss"])
    if config.stages.end_to_end_steps:
        terms = [term for term in LOSS_TERMS if getattr(config.loss, term)]
        found["end to end"] = _together(f"end_to_end/{term}" for term in ("loss", *terms))
    return found


class Progress(RichProgressBar):
    """Lightning's bar: steps, time gone and left, loss. A run is one pass of steps, so epochs are not spoken of."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training".ljust(len(self.validation_description))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received: int | None = None
        """Number of the signal that this process, or another that trains with it, was sent."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        mine: list[int] = []

        def note(number: int, _: FrameType | None) -> None:
            if mine:
                raise KeyboardInterrupt
            mine.append(number)
            self.received = self.received or number
            if trainer.world_size == 1:  # of several, none may stop before all know
                trainer.should_stop = True

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, note)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any) -> None:
        # One process may have been told alone; all stop after the same step, or the others would wait for it for ever.
        if told := int(largest(self.received or 0)):  # a signal may come at this very moment: it is for the step after
            self.received = told
            trainer.should_stop = True
            # At once: a validation may follow before training ends, and whoever sent the signal may not wait for it.
            trainer.save_checkpoint(self.folder / f"step_{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def tensorboard(trainer: pl.Trainer) -> Any:
    """TensorBoard's writer on the process that logs, else None."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
