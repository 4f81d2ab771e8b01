"""Keep the stored rows of a student in step with training and checkpoints.

What a step wrote is in the store when the step ends. The rows' targets come from the teacher.
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
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
from dmt.models.memories import get_associative_memories
from dmt.ops import CopyTask, run_copy_tasks
from dmt.store import RowStore
from dmt.store.records import Namespace, StepChanges
from dmt.training.optimization import NonFiniteError


@torch.no_grad()
def set_row_targets(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_outputs: ForwardOutputs,
    teacher_outputs: ForwardOutputs,
) -> None:
    """Set the targets of the rows that memories wrote in the student's last forward pass.

    The target is the output of the teacher's block for the student's block input. In the topmost
    memory it is what makes the state after its layer equal to the teacher's: no layer above can
    correct the errors of the layers below.

    Args:
        student: model whose memories wrote.
        teacher: model to imitate.
        student_outputs: the student's outputs for the tokens, with blocks.
        teacher_outputs: the teacher's outputs for the same tokens, with blocks.
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
    """Let the student's memories queue rows for a text; `commit_step` of a memory stores them.

    The null logit, which balances rows and base, is calibrated on the same text.

    Args:
        student: model whose memories write.
        teacher: model that gives the targets.
        tokens: token ids `(batch, time)`.
        tag: tag of the rows.
    """
    memories = get_associative_memories(student).values()
    with enable_writes(memories, tag):
        teacher_outputs = forward_teacher(teacher, tokens, capture_blocks=True)
        student_outputs = forward_with_activations(student, tokens, capture_blocks=True)
        set_row_targets(student, teacher, student_outputs, teacher_outputs)
        for memory in memories:
            memory.calibrate_null_logit()


# Statistics that every read changes: a checkpoint has them as of its step, the store as of the last
# flush.
ROW_STATS = ("score", "score_step", "last_read", "reads", "used")


class RowStoreSync:
    """The rows of all associative memories of a student in a store, one namespace per layer.

    Of several processes the first writes. The others read the store when they begin or resume, and
    compute the same rows from then on (`AssociativeMemory.commit_step`).

    Args:
        config: type of the values and interval between flushes of usage.
        store: an open store, closed with this; read-only in all processes but the first.
        student: the model with the memories.
        run_dir: folder of the run; its path marks the rows that the run writes.

    Attributes:
        step_metrics: rows stored, inserted, evicted and merged in the last step, by layer.
        dirty: whether a step has changed the model and is not committed to the store.

    Raises:
        UserError: the store has memories of another shape.
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

    def load_rows(self) -> None:
        """Load the rows in the store into the memories; other runs may have left some there."""
        for layer, memory in self.memories.items():
            namespace = self.namespaces[layer]
            memory.rows.load_rows(
                self.store.scan(namespace), expected_rows=self.store.count(namespace)
            )
            stats = memory.rows.stats
            # Steps begin at 0 again: scores are those at the end of the other runs.
            stats.score[:] = decayed_score(
                stats.score,
                stats.score_step,
                int(stats.score_step.max(initial=0)),
                memory.insert_policy.decay,
            )
            stats.score_step[:] = 0
        self.store.next_id = int(broadcast(self.store.next_id))  # readers count too

    def rollback_run(self) -> None:
        """Delete what this run wrote before it ended without a checkpoint.

        Not for a new run: a deleted run may have had the same path, and its rows in a shared store
        do not belong to this one.
        """
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
        """Commit everything that step `step` wrote, in all layers, in one transaction.

        Raises:
            UserError: the store cannot be written; raised in every process.
            NonFiniteError: a queued row is not finite.
        """
        changes: dict[Namespace, StepChanges] = {}
        now = broadcast(time.time())
        self.step_metrics = {}
        results = run_copy_tasks([self._commit_layer(layer, step, now) for layer in self.memories])
        for (layer, memory), result in zip(self.memories.items(), results, strict=True):
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
                f"store {self.store.url}: rank 0 failed to commit step {step}"
            )
        self.dirty = False

    def _commit_layer(self, layer: int, step: int, now: float) -> CopyTask[StepChanges]:
        memory = self.memories[layer]
        try:
            return (yield from memory.commit_step_task(step, now, self.store.reserve_ids))
        except UserError:
            raise
        except ValueError:
            raise NonFiniteError(step, f"a row written by layer {layer}") from None

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of `step` needs beside the store: ids and usage.

        Rows that left the memories before the older of the last two checkpoints are purged.

        Raises:
            UserError: the store lacks rows of a step.
        """
        if self.dirty:
            raise UserError(
                f"store {self.store.url}: step {step} was not committed; resume from the "
                "checkpoint before it"
            )
        if step > self._checkpoint_steps[1] and not self.store.read_only:
            self.store.purge(self.run_label, self._checkpoint_steps[0], other_runs=False)
            self._checkpoint_steps = (self._checkpoint_steps[1], step)
        return {"run": self.run_label} | {
            str(layer): _memory_state(memory) for layer, memory in self.memories.items()
        }

    def restore_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Restore the rows as of step `step`: later ones are deleted, removed ones return.

        Args:
            step: step of the checkpoint.
            state: what `checkpoint_state` returned then.

        Raises:
            UserError: the store does not have the rows of the checkpoint.
        """
        self.run_label, self.dirty = state["run"], False  # the folder may have been renamed since
        if not self.store.read_only:
            self.store.rewind(self.run_label, step)
        # Also a barrier: no process reads before the store is rewound.
        self.store.next_id = int(broadcast(self.store.next_id))
        self._checkpoint_steps = (0, 0)  # the checkpoint before this one may still exist
        for layer, memory in self.memories.items():
            saved = state[str(layer)]
            rows = memory.rows
            namespace = self.namespaces[layer]
            rows.load_rows(
                self.store.scan(namespace), saved["ids"].numpy(), self.store.count(namespace)
            )
            if not torch.equal(rows.ids.cpu(), saved["ids"]):
                num_saved = int((saved["ids"] >= 0).sum())
                raise UserError(
                    f"store {self.store.url}: layer {layer} has {len(rows):,} rows, the checkpoint "
                    f"of step {step} has {num_saved:,} other ones; another run has written to the "
                    "store since, or this run used another store"
                )
            for name in ROW_STATS:
                getattr(rows.stats, name)[:] = saved[name].numpy()
            memory.set_recent_hidden(saved["tape"], saved["tape_ids"])

    def close(self) -> None:
        """Flush the usage of rows and close the store."""
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
    """Return the mark of a run's rows in a shared store: a digest and the end of its path."""
    path = str(run_dir.resolve())
    return f"{hashlib.sha256(path.encode()).hexdigest()[:12]} {path[-60:]}"
