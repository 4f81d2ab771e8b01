"""Keeps stored rows and the model that reads them in step: what a step wrote is on disk when the step ends.

What stored rows are taught: what each block of the student should have said.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import StoreConfig
from dmt.distributed import broadcast
from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.memory.associative import enable_writes
from dmt.memory.row_table import decayed_score
from dmt.models.architectures import get_architecture
from dmt.models.conversion import get_associative_memories
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
from dmt.store import RowStore
from dmt.store.records import Namespace, StepChanges
from dmt.training.checkpoints import NonFiniteError


@torch.no_grad()
def set_row_targets(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_outputs: ForwardOutputs,
    teacher_outputs: ForwardOutputs,
) -> None:
    """Tell the memories that wrote in the student's last pass what they should have answered.

    A memory should say what the teacher's own block says of what the student gives it. The topmost one has nobody above it
    that mends what went wrong below, or has learnt to live with it: it should say what makes the state after its layer
    the teacher's.

    Args:
        student, teacher: the models.
        seen, wanted: what they made of the same tokens, with blocks.
    """
    writing_memories = {
        layer: memory
        for layer, memory in get_associative_memories(student).items()
        if memory.is_writing
    }
    if not writing_memories:
        return
    blocks = get_architecture(teacher.config.model_type).blocks(teacher)
    top_layer = max(get_associative_memories(student))
    for layer, memory in writing_memories.items():
        if layer == top_layer:
            residual = student_outputs.layer_outputs[layer] - student_outputs.block_outputs[layer]
            memory.set_targets(teacher_outputs.layer_outputs[layer] - residual)
        else:
            memory.set_targets(blocks[layer](student_outputs.block_inputs[layer]))


@torch.no_grad()
def propose_rows(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, tag: str = ""
) -> None:
    """Let the student's memories offer rows for token ids `(batch, time)`, without a gradient; `settle` takes them in.

    How much rows count beside the base is set by what they would have said of this text (`AssociativeMemory.weigh`).
    """
    memories = get_associative_memories(student).values()
    with enable_writes(memories, tag):
        teacher_outputs = forward_teacher(teacher, tokens, capture_blocks=True)
        student_outputs = forward_with_activations(student, tokens, capture_blocks=True)
        set_row_targets(student, teacher, student_outputs, teacher_outputs)
        for memory in memories:
            memory.calibrate_null_logit()


ROW_STATS = ("score", "score_step", "last_read", "reads", "used")
"""What changes with every read, so that a checkpoint has it as of its step and the store only as of the last flush."""


class RowStoreSync:
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

    def __init__(
        self, config: StoreConfig, store: RowStore, student: PreTrainedModel, run_dir: Path
    ) -> None:
        self.memories = get_associative_memories(student)
        self.run_label = _run_label(run_dir)
        self.flush_every = config.flush_every
        self.store = store
        self.namespaces: dict[int, Namespace] = {
            layer: self.store.get_or_create_namespace(
                f"layer_{layer}", memory.width, memory.width, config.value_dtype
            )
            for layer, memory in self.memories.items()
        }
        self.step_metrics: dict[str, float] = {}
        self._checkpoint_steps = (0, 0)
        self.dirty = False
        """Whether a step has changed the model and is not in the store to its end: nothing to go on from."""

    def load_rows(self) -> None:
        """Take into the memories the rows that are there: of a new run those that other runs left in a shared store."""
        for layer, memory in self.memories.items():
            namespace = self.namespaces[layer]
            memory.rows.load_rows(
                self.store.scan(namespace), expected_rows=self.store.count(namespace)
            )
            stats = (
                memory.rows.stats
            )  # steps are counted anew, so what other runs warmed is as warm as when they ended
            stats.score[:] = decayed_score(
                stats.score,
                stats.score_step,
                int(stats.score_step.max(initial=0)),
                memory.insert_policy.decay,
            )
            stats.score_step[:] = 0
        self.store.next_id = int(broadcast(self.store.next_id))  # whoever only reads counts along

    def rollback_run(self) -> None:
        """Drop what this run wrote before it ended without a checkpoint, to begin it again. Not for a new run: one before it,
        whose folder is gone, may have had the same path, and its rows in a shared store are not this one's."""
        if not self.store.read_only:
            self.store.rewind(self.run_label, 0)

    @contextmanager
    def writes_enabled(self, progress: float | None) -> Iterator[bool]:
        """Enable writes of the memories whose `write_start` is reached.

        Args:
            progress: share of the training that is over, from 0 to 1; None for no writes.

        Yields:
            Whether any memory writes.
        """
        writing = [
            memory
            for memory in self.memories.values()
            if progress is not None and progress >= memory.write_start
        ]
        with enable_writes(writing):
            yield bool(writing)

    def commit_step(self, step: int) -> None:
        """End step number `step`: everything it wrote, in all layers, goes to the store in one transaction.

        Raises:
            UserError: the store cannot be written, in every process.
            NotFinite: what was offered is not.
        """
        changes: dict[Namespace, StepChanges] = {}
        now = broadcast(time.time())
        self.step_metrics = {}
        for layer, memory in self.memories.items():
            try:
                result = memory.commit_step(step, now, self.store.reserve_ids)
            except UserError:
                raise
            except ValueError:
                raise NonFiniteError(
                    step, f"what the memory of layer {layer} is given to keep"
                ) from None
            usage = memory.rows.pop_usage() if step % self.flush_every == 0 else None
            changes[self.namespaces[layer]] = StepChanges(result.inserts, result.removals, usage)
            removed_counts = {
                reason: sum(
                    len(ids) for ids, removal_reason in result.removals if removal_reason == reason
                )
                for reason in ("evicted", "merged")
            }
            self.step_metrics |= {f"knn/rows/layer_{layer}": len(memory.rows)}
            self.step_metrics |= {
                f"knn/inserted/layer_{layer}": sum(len(batch.ids) for batch in result.inserts)
            }
            self.step_metrics |= {
                f"knn/{reason}/layer_{layer}": count for reason, count in removed_counts.items()
            }
        commit_error: UserError | None = None
        if not self.store.read_only:
            try:
                self.store.commit(self.run_label, step, changes)
            except UserError as error:
                commit_error = error
        if broadcast(commit_error is not None):
            raise commit_error or UserError(
                f"store {self.store.url}: whoever writes to it could not at step {step}"
            )
        self.dirty = False

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` needs beside the store to go on as if nothing had happened: no keys, no values.

        Two checkpoints are kept, and this one is not yet: what left the memories before the older can leave the disk now.

        Raises:
            UserError: the store lacks what a step wrote, so that there is nothing to go on from here.
        """
        if self.dirty:
            raise UserError(
                f"store {self.store.url}: step {step} was not written to its end; go on from the checkpoint before"
            )
        if step > self._checkpoint_steps[1] and not self.store.read_only:
            self.store.purge(self.run_label, self._checkpoint_steps[0], other_runs=False)
            self._checkpoint_steps = (self._checkpoint_steps[1], step)
        return {"run": self.run_label} | {
            str(layer): _memory_state(memory) for layer, memory in self.memories.items()
        }

    def restore_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Be as at the end of step `step`, when `state` was taken: rows written later are dropped, those that left come back.

        Raises:
            UserError: the store does not hold the rows that the checkpoint speaks of.
        """
        self.run_label, self.dirty = state["run"], False  # a folder may have been renamed since
        if not self.store.read_only:
            self.store.rewind(self.run_label, step)
        self.store.next_id = int(
            broadcast(self.store.next_id)
        )  # and nobody reads before that is done
        self._checkpoint_steps = (0, 0)  # the one before this may be there still
        for layer, memory in self.memories.items():
            saved = state[str(layer)]
            rows = memory.rows
            namespace = self.namespaces[layer]
            rows.load_rows(
                self.store.scan(namespace), saved["ids"].numpy(), self.store.count(namespace)
            )
            if not torch.equal(rows.ids.cpu(), saved["ids"]):
                raise UserError(
                    f"store {self.store.url}: layer {layer} has {len(rows):,} rows, the checkpoint of step {step} "
                    f"{int((saved['ids'] >= 0).sum()):,} that are not the same; another run has written to it since, or it is "
                    "not the store that this run wrote"
                )
            for name in ROW_STATS:
                getattr(rows.stats, name)[:] = saved[name].numpy()
            memory.set_recent_hidden(saved["tape"], saved["tape_ids"])

    def close(self) -> None:
        """Write down usage that was not yet, and let others write."""
        try:
            if self.store.read_only:
                return
            usage = {
                self.namespaces[layer]: StepChanges(usage=memory.rows.pop_usage())
                for layer, memory in self.memories.items()
            }
            self.store.commit(self.run_label, 0, usage)
        finally:
            self.store.close()


def _memory_state(memory: AssociativeMemory) -> dict[str, torch.Tensor]:
    stats = {
        name: torch.as_tensor(np.array(getattr(memory.rows.stats, name))) for name in ROW_STATS
    }
    hidden, ids = memory.recent_hidden()
    return {"ids": memory.rows.ids.cpu().clone(), **stats, "tape": hidden, "tape_ids": ids}


def _run_label(run_dir: Path) -> str:
    """What marks the rows of a run in a store that several may share: a digest of its path and, for people, the end of it."""
    path = str(run_dir.resolve())
    return f"{hashlib.sha256(path.encode()).hexdigest()[:12]} {path[-60:]}"
