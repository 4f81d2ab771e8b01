"""Keeps stored rows and the model that reads them in step: what a step wrote is on disk when the step ends."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dmt.config import StoreConfig
from dmt.distill.finite import NotFinite
from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.memory.heat import cooled
from dmt.memory.together import agreed
from dmt.models.surgery import associative_of
from dmt.records import Changes, Namespace
from dmt.store import Store

HISTORIES = ("heat", "heat_step", "last_read", "reads", "used")
"""What changes with every read, so that a checkpoint has it as of its step and the store only as of the last flush."""


class Keeper:
    """The rows of all associative memories of a student in a store, one namespace a layer.

    Of several processes that train together the first writes; the others read the same store when they begin or resume,
    and from then on come to the same rows by themselves (`AssociativeMemory.settle`).

    Args:
        config: where and how.
        store: an open store; closed with this. Of all processes but the first: opened for reading only.
        student: its associative memories are watched over.
        run: the folder of the run; its path marks the rows that the run writes.

    Raises:
        UserError: the store has other memories than the student.
    """

    def __init__(self, config: StoreConfig, store: Store, student: PreTrainedModel, run: Path) -> None:
        self.memories = associative_of(student)
        self.run = _name(run)
        self.flush_every = config.flush_every
        self.store = store
        self.spaces: dict[int, Namespace] = {
            layer: self.store.namespace(f"layer_{layer}", memory.width, memory.width, config.value_type)
            for layer, memory in self.memories.items()
        }
        self.written: dict[str, float] = {}
        self._checkpoints = (0, 0)
        self.unsettled = False
        """Whether a step has changed the model and is not in the store to its end: nothing to go on from."""

    def begin(self) -> None:
        """Take into the memories the rows that are there: of a new run those that other runs left in a shared store."""
        for layer, memory in self.memories.items():
            space = self.spaces[layer]
            memory.rows.rebuild(self.store.scan(space), expected=self.store.count(space))
            known = memory.rows.histories  # steps are counted anew, so what other runs warmed is as warm as when they ended
            known.heat[:] = cooled(known.heat, known.heat_step, int(known.heat_step.max(initial=0)), memory.policy.decay)
            known.heat_step[:] = 0
        self.store.next_id = int(agreed(self.store.next_id))  # whoever only reads counts along

    def take_back(self) -> None:
        """Drop what this run wrote before it ended without a checkpoint, to begin it again. Not for a new run: one before it,
        whose folder is gone, may have had the same path, and its rows in a shared store are not this one's."""
        if not self.store.read_only:
            self.store.rewind(self.run, 0)

    def write(self, progress: float | None) -> bool:
        """Let those memories write whose share of the training, 0 to 1, is over; none without; whether any does."""
        for memory in self.memories.values():
            memory.writing = progress is not None and progress >= memory.write_from
        return any(memory.writing for memory in self.memories.values())

    def settle(self, step: int) -> None:
        """End step number `step`: everything it wrote, in all layers, goes to the store in one transaction.

        Raises:
            UserError: the store cannot be written, in every process.
            NotFinite: what was offered is not.
        """
        changes: dict[Namespace, Changes] = {}
        now = agreed(time.time())
        self.written = {}
        for layer, memory in self.memories.items():
            try:
                made = memory.settle(step, now, self.store.take_ids)
            except ValueError:
                raise NotFinite(step, f"what the memory of layer {layer} is given to keep") from None
            usage = memory.rows.take_usage() if step % self.flush_every == 0 else None
            changes[self.spaces[layer]] = Changes(made.inserts, made.removals, usage)
            gone = {why: sum(len(ids) for ids, reason in made.removals if reason == why) for why in ("evicted", "merged")}
            self.written |= {f"rows/layer_{layer}": len(memory.rows)}
            self.written |= {f"rows_inserted/layer_{layer}": sum(len(part.ids) for part in made.inserts)}
            self.written |= {f"rows_{why}/layer_{layer}": number for why, number in gone.items()}
        failed: UserError | None = None
        if not self.store.read_only:
            try:
                self.store.commit(self.run, step, changes)
            except UserError as error:
                failed = error
        if agreed(failed is not None):
            raise failed or UserError(f"store {self.store.place}: whoever writes to it could not at step {step}")
        self.unsettled = False

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` needs beside the store to go on as if nothing had happened: no keys, no values.

        Two checkpoints are kept, and this one is not yet: what left the memories before the older can leave the disk now.

        Raises:
            UserError: the store lacks what a step wrote, so that there is nothing to go on from here.
        """
        if self.unsettled:
            raise UserError(f"store {self.store.place}: step {step} was not written to its end; go on from the checkpoint before")
        if step > self._checkpoints[1] and not self.store.read_only:
            self.store.purge(self.run, self._checkpoints[0], others=False)
            self._checkpoints = (self._checkpoints[1], step)
        return {"run": self.run} | {str(layer): _state(memory) for layer, memory in self.memories.items()}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Be as at the end of step `step`, when `state` was taken: rows written later are dropped, those that left come back.

        Raises:
            UserError: the store does not hold the rows that the checkpoint speaks of.
        """
        self.run, self.unsettled = state["run"], False  # a folder may have been renamed since
        if not self.store.read_only:
            self.store.rewind(self.run, step)
        self.store.next_id = int(agreed(self.store.next_id))  # and nobody reads before that is done
        self._checkpoints = (0, 0)  # the one before this may be there still
        for layer, memory in self.memories.items():
            known = state[str(layer)]
            rows = memory.rows
            space = self.spaces[layer]
            rows.rebuild(self.store.scan(space), known["ids"].numpy(), self.store.count(space))
            if not torch.equal(rows.ids.cpu(), known["ids"]):
                raise UserError(
                    f"store {self.store.place}: layer {layer} has {len(rows):,} rows, the checkpoint of step {step} "
                    f"{int((known['ids'] >= 0).sum()):,} that are not the same; another run has written to it since, or it is "
                    "not the store that this run wrote"
                )
            for name in HISTORIES:
                getattr(rows.histories, name)[:] = known[name].numpy()
            memory.set_tape(known["tape"], known["tape_ids"])

    def close(self) -> None:
        """Write down usage that was not yet, and let others write."""
        try:
            if self.store.read_only:
                return
            usage = {self.spaces[layer]: Changes(usage=memory.rows.take_usage()) for layer, memory in self.memories.items()}
            self.store.commit(self.run, 0, usage)
        finally:
            self.store.close()


def _state(memory: AssociativeMemory) -> dict[str, torch.Tensor]:
    histories = {name: torch.as_tensor(np.array(getattr(memory.rows.histories, name))) for name in HISTORIES}
    hidden, ids = memory.tape()
    return {"ids": memory.rows.ids.cpu().clone(), **histories, "tape": hidden, "tape_ids": ids}


def _name(run: Path) -> str:
    """What marks the rows of a run in a store that several may share: a digest of its path and, for people, the end of it."""
    path = str(run.resolve())
    return f"{hashlib.sha256(path.encode()).hexdigest()[:12]} {path[-60:]}"
