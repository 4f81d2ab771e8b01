"""Stored rows in complete runs: checkpoints, stores and saved students agree."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import LAYERS, make_llama, make_teacher, newest, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from dmt.cli.main import distill_main
from dmt.config import (
    AssociativeConfig,
    Config,
    DataConfig,
    DenseConfig,
    FeaturalConfig,
    StagesConfig,
    StoreConfig,
)
from dmt.distillation.losses import Batch
from dmt.distillation.module import DistillationModule
from dmt.distillation.row_sync import RowStoreSync, _run_label
from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.models.conversion import convert_blocks
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_associative_memories, get_featural_memories, get_memories
from dmt.store import RowStore
from dmt.training.optimization import NonFiniteError

ROWS = [
    "memory.kind=associative",
    "memory.write_start=0.2",
    "memory.min_distance=0.05",
    "store.flush_every=2",
]
ROWS_ONLY = [
    "memory.base=none",
    "memory.k=8",
    "memory.mean_k=",
    "memory.write_start=0",
    "stages.layerwise_steps=0",
]


def read_run_rows(run):
    return read_store_rows(run / "memory.db")


def read_store_rows(path):
    """Return `(step, key, value)` of each row by namespace and row ID."""
    with RowStore(str(path), read_only=True) as store:
        return {
            space.name: {
                int(row_id): (step, key.tobytes(), value.tobytes())
                for page in store.scan(space)
                for row_id, step, key, value in zip(
                    page.ids, page.metadata["step"], page.keys, page.values, strict=True
                )
            }
            for space in store.list_namespaces()
        }


def make_module(teacher, tmp_path, read_only=False, run=None, **changes):
    memory = AssociativeConfig(**{"k": 8, "write_start": 0.0, "min_distance": 0.01} | changes)
    config = replace(
        Config(),
        memory=memory,
        data=DataConfig(seq_len=16, batch_size=4, micro_batch_size=2),
        stages=StagesConfig(end_to_end_steps=4),
    )
    student, _ = convert_blocks(teacher, [memory] * LAYERS)
    module = DistillationModule(config, student, teacher)
    module.row_sync = RowStoreSync(
        StoreConfig(),
        RowStore(str(tmp_path / "rows.db"), hash_model(teacher), read_only),
        student,
        run or tmp_path,
    )
    return module


def teach_step(module, tokens, step=1):
    """Write the rows of one step, without an optimizer step."""
    with module.row_sync.writes_enabled(1.0):
        for micro_batch in tokens.split(2):
            module.end_to_end_loss(Batch.full_step(micro_batch))
    module.row_sync.commit_step(step)


def test_a_student_with_empty_memories_is_its_base(teacher, tmp_path, tokens):
    module = make_module(teacher, tmp_path)
    plain, _ = convert_blocks(teacher, [FeaturalConfig(k=8)] * LAYERS)
    assert torch.equal(module.student(tokens).logits, plain(tokens).logits)
    teach_step(module, tokens)
    assert not torch.equal(module.student(tokens).logits, plain(tokens).logits)


def test_the_report_has_the_status_of_every_tensor(teacher):
    student, report = convert_blocks(
        teacher,
        [AssociativeConfig(k=8), FeaturalConfig(k=8), DenseConfig()],
    )
    assert list(get_associative_memories(student)) == [0]
    assert list(get_featural_memories(student)) == list(get_memories(student)) == [0, 1]
    statuses = {transfer.target: transfer.status for transfer in report.transfers}
    assert statuses["transformer.h.0.mlp.base.keys"] == "memory"
    assert statuses["transformer.h.0.mlp.rows.keys"] == "new"


def test_writing_is_causal(teacher, tmp_path, tokens):
    """Logits of a token depend on no later token, exactly, while rows of this step are written."""
    module = make_module(teacher, tmp_path)
    teach_step(module, tokens)
    module.student.train()
    other = tokens.clone()
    other[0, 12:] = torch.randint(1, 300, (8,))
    logits = []
    for input_ids in (tokens, other):
        with module.row_sync.writes_enabled(1.0):
            module.end_to_end_loss(Batch.full_step(input_ids))
            logits.append(forward_with_activations(module.student, input_ids).logits)
        for memory in get_associative_memories(module.student).values():
            memory.drop_pending()
    assert torch.equal(logits[0][0, :12], logits[1][0, :12])
    assert torch.equal(logits[0][1:], logits[1][1:])
    assert not torch.equal(logits[0][0, 12:], logits[1][0, 12:])


def test_generation_reads_rows_and_writes_none(teacher, tmp_path, tokens):
    module = make_module(teacher, tmp_path)
    teach_step(module, tokens)
    before = [len(memory.rows) for memory in get_associative_memories(module.student).values()]
    student = module.student.eval()
    cached, uncached = (
        student.generate(
            tokens[:, :5], max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0
        )
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    other = tokens[:, :9].clone()
    other[:, 6:] = 7
    assert torch.equal(student(tokens[:, :9]).logits[:, :6], student(other).logits[:, :6])
    module.row_sync.commit_step(2)
    assert [
        len(memory.rows) for memory in get_associative_memories(module.student).values()
    ] == before


def test_written_rows_do_not_depend_on_the_micro_batch(teacher, tmp_path, tokens):
    written = []
    for parts in (1, 3):
        (tmp_path / str(parts)).mkdir()
        module = make_module(teacher, tmp_path / str(parts))
        with module.row_sync.writes_enabled(1.0):
            for rows in tokens.split(parts):
                module.end_to_end_loss(Batch.full_step(rows))
        module.row_sync.commit_step(1)
        written.append(
            [
                memory.rows.keys[: len(memory.rows)]
                for memory in get_associative_memories(module.student).values()
            ]
        )
    for single_rows, batched_rows in zip(*written, strict=True):
        torch.testing.assert_close(single_rows, batched_rows)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["memory.value_target=teacher"],
        [*ROWS_ONLY, "memory.value_target=projection"],
        [*ROWS_ONLY, "memory.value_target=teacher"],
    ],
    ids=str,
)
def test_a_run_saves_and_reports_its_rows(distill_args, tmp_path, changes, capsys):
    assert distill_main([*distill_args, *ROWS, *changes]) == 0
    run = newest(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    stored = read_run_rows(run)
    for layer, memory in get_associative_memories(student).items():
        rows_by_id = stored[f"layer_{layer}"]
        assert rows_by_id
        assert set(memory.rows.index_by_id) == set(rows_by_id)
        for row_id, index in memory.rows.index_by_id.items():
            assert memory.rows.keys[index].numpy().tobytes() == rows_by_id[row_id][1]
    checkpoint = torch.load(
        run / "checkpoints" / max(p.name for p in (run / "checkpoints").iterdir()),
        weights_only=True,
    )
    assert not [name for name in checkpoint["state_dict"] if ".rows." in name]
    head = (run / "metrics.csv").read_text().splitlines()[0]
    assert "knn/inserted/layer_0" in head
    assert "stored rows, layer 0" in (run / "report.md").read_text()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    for layer in range(LAYERS):
        for tag in ("rows", "inserted", "evicted", "merged", "null_weight"):
            assert f"knn/{tag}/layer_{layer}" in events.Tags()["scalars"]
        for tag in ("nearest_distance", "row_age_seconds", "log10_row_reads"):
            assert f"knn/{tag}/layer_{layer}" in events.Tags()["histograms"]
    layer_stats = json.loads((run / "run.json").read_text())["knn"]
    assert {layer: stats["num_rows"] for layer, stats in layer_stats.items()} == {
        str(layer): len(stored[f"layer_{layer}"]) for layer in get_associative_memories(student)
    }
    assert all(0 < stats["null_weight"] < 1 for stats in layer_stats.values())
    assert "rows read for each token" in capsys.readouterr().err


def test_layer_overrides_set_when_writing_starts(distill_args, tmp_path):
    overrides = (
        "student.layer_overrides=[{layers: 0, memory: {kind: dense}}, "
        "{layers: 2, memory: {write_start: 0.7}}]"
    )
    assert distill_main([*distill_args, *ROWS, overrides]) == 0
    stored = read_run_rows(newest(tmp_path))
    assert {layer: min(step for step, *_ in rows.values()) for layer, rows in stored.items()} == {
        "layer_1": 6,
        "layer_2": 9,
    }


def test_a_saved_student_reads_the_same_rows(teacher, tmp_path, tokens):
    module = make_module(teacher, tmp_path)
    teach_step(module, tokens)
    module.student.eval().save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(again(tokens).logits, module.student(tokens).logits)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [*ROWS_ONLY, "memory.value_target=projection"],
        ["memory.capacity=20", "memory.merge_distance=0.2", "memory.index=bf16"],
    ],
    ids=str,
)
def test_a_run_without_its_last_checkpoint_resumes_to_the_same_rows_and_weights(
    distill_args, tmp_path, changes
):
    assert distill_main([*distill_args, *ROWS, *changes]) == 0
    run = newest(tmp_path)
    expected, stored = weights(run), read_run_rows(run)
    last = max(int(p.stem[5:]) for p in (run / "checkpoints").iterdir())
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.stem == f"step_{last}":
            checkpoint.unlink()
    assert distill_main(["--resume", str(run)]) == 0
    resumed_rows = read_run_rows(run)
    for layer, rows in stored.items():
        assert sorted(row for row in rows.values()) == sorted(
            row for row in resumed_rows[layer].values()
        )
    for name, value in expected.items():
        if not name.endswith(".ids"):  # IDs are never used twice
            assert torch.equal(value, weights(run)[name]), name


def test_rows_deleted_before_the_oldest_checkpoint_are_purged(distill_args, tmp_path):
    assert (
        distill_main(
            [
                *distill_args,
                *ROWS,
                "memory.capacity=10",
                "memory.min_distance=0",
                "trainer.checkpoint_every=1",
            ]
        )
        == 0
    )
    with RowStore(str(newest(tmp_path) / "memory.db"), read_only=True) as store:
        deleted_steps = [
            step
            for space in store.list_namespaces()
            for page in store.scan(space, include_deleted=True)
            for step in page.metadata["deleted_step"]
            if step
        ]
    checkpoint_steps = sorted(int(p.stem[5:]) for p in (newest(tmp_path) / "checkpoints").iterdir())
    assert deleted_steps
    assert min(deleted_steps) >= checkpoint_steps[0]


def test_resuming_a_finished_run_loads_its_rows(distill_args, tmp_path):
    assert distill_main([*distill_args, *ROWS, "trainer.validate_every=0"]) == 0
    run = newest(tmp_path)
    before = weights(run)
    assert distill_main(["--resume", str(run)]) == 0
    assert all(torch.equal(value, weights(run)[name]) for name, value in before.items())


def test_a_run_with_another_store_cannot_be_resumed(distill_args, tmp_path, capsys):
    assert distill_main([*distill_args, *ROWS]) == 0
    run = newest(tmp_path)
    for file in run.glob("memory.db*"):
        file.unlink()
    assert distill_main(["--resume", str(run)]) == 2
    assert "this run used another store" in capsys.readouterr().err


def test_the_store_of_another_teacher_is_refused_before_a_folder_is_made(
    distill_args, tmp_path, tokenizer, capsys
):
    store_arg = f"store.url={tmp_path / 'shared.db'}"
    assert distill_main([*distill_args, *ROWS, store_arg]) == 0
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    before = newest(tmp_path)
    assert distill_main([*distill_args, *ROWS, store_arg, f"teacher={tmp_path / 'llama'}"]) == 2
    assert "belong to another model" in capsys.readouterr().err
    assert newest(tmp_path) == before


def test_a_shared_store_is_read_by_the_next_run(distill_args, tmp_path):
    store_arg = f"store.url={tmp_path / 'shared.db'}"
    for _ in range(2):
        assert distill_main([*distill_args, *ROWS, store_arg]) == 0
    with RowStore(str(tmp_path / "shared.db"), read_only=True) as store:
        runs = {
            run
            for space in store.list_namespaces()
            for page in store.scan(space)
            for run in page.metadata["run"]
        }
    assert {run[-9:] for run in runs} == {"version_0", "version_1"}


def test_a_new_run_in_the_folder_of_a_deleted_run_keeps_its_rows(distill_args, tmp_path):
    path = tmp_path / "shared.db"
    assert distill_main([*distill_args, *ROWS, f"store.url={path}"]) == 0
    before = {layer: set(rows) for layer, rows in read_store_rows(path).items()}
    shutil.rmtree(tmp_path / "logs")
    assert distill_main([*distill_args, *ROWS, f"store.url={path}", "memory.write_start=1"]) == 0
    assert {layer: set(rows) for layer, rows in read_store_rows(path).items()} == before
    assert sum(map(len, before.values())) > 10


def test_run_labels_of_paths_with_the_same_end_differ(tmp_path):
    end = "x" * 90
    assert _run_label(tmp_path / "a" / end) != _run_label(tmp_path / "b" / end)
    assert len(_run_label(tmp_path / end)) <= 80


def test_checkpoints_restore_usage_and_usage_is_flushed_in_batches(teacher, tmp_path, tokens):
    module = make_module(teacher, tmp_path)
    module.row_sync.flush_every = 3
    for step in (1, 2):
        teach_step(module, tokens, step)
    state, memory = module.row_sync.checkpoint_state(2), get_associative_memories(module.student)[0]
    score, reads = memory.rows.stats.score.copy(), memory.rows.stats.reads.copy()
    assert reads.sum() > 0

    def count_stored_reads():
        return sum(
            sum(page.metadata["reads"])
            for page in module.row_sync.store.scan(module.row_sync.namespaces[0])
        )

    assert count_stored_reads() == 0
    teach_step(module, tokens, 3)
    assert count_stored_reads() > 0
    module.row_sync.restore_checkpoint(2, state)
    assert (memory.rows.stats.score == score).all()
    assert (memory.rows.stats.reads == reads).all()


def test_the_store_has_usage(distill_args, tmp_path):
    assert distill_main([*distill_args, *ROWS]) == 0
    with RowStore(str(newest(tmp_path) / "memory.db"), read_only=True) as store:
        pages = [page for space in store.list_namespaces() for page in store.scan(space)]
    assert sum(sum(page.metadata["reads"]) for page in pages) > 0
    assert all(
        timestamp is None or timestamp > 1e9
        for page in pages
        for timestamp in page.metadata["last_read"]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["memory.kind=associative", "memory.base=none"],
            "memory.value_target=residual is the difference to a base",
        ),
        (
            ["memory.kind=associative", "memory.capacity=0"],
            "memory.capacity must be at least 1, got 0",
        ),
        (
            ["memory.kind=associative", "memory.min_distance=-1"],
            "memory.min_distance must be in [0, 2], got -1",
        ),
        (
            ["memory.kind=associative", "memory.lrfu_decay=2"],
            "memory.lrfu_decay must be in [0, 1], got 2",
        ),
        (["memory.kind=associative", "stages.end_to_end_steps=0"], "set stages.end_to_end_steps"),
        (
            ["memory.kind=associative", *ROWS_ONLY[:-1], "memory.value_target=teacher"],
            "set stages.layerwise_steps=0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictory_settings_are_refused(args, message, capsys):
    assert distill_main(args) == 2
    assert message in capsys.readouterr().err


def _run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    teacher = make_teacher()
    if rank:
        dist.barrier()  # the first process makes the store
    module = make_module(
        teacher, Path(folder), read_only=bool(rank), capacity=40, merge_distance=0.3
    )
    if not rank:
        dist.barrier()
    module.row_sync.load_rows()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = module.student

        def forward(self, tokens):
            return module.end_to_end_loss(Batch.full_step(tokens))[0]

    step = torch.nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    state = None
    for number in range(1, 7):
        tokens = torch.randint(0, teacher.config.vocab_size, (4, 16), generator=generator)[
            2 * rank : 2 * rank + 2
        ]
        optimizer.zero_grad()
        with module.row_sync.writes_enabled(1.0):
            step(tokens).backward()
        optimizer.step()
        module.row_sync.commit_step(number)
        if number == 3:
            state = module.row_sync.checkpoint_state(3)
        if number == 5:  # as a resumed run begins
            module.row_sync.restore_checkpoint(3, state)
    memories = module.row_sync.memories.items()
    tensors = {
        f"{layer}/{name}": tensor
        for layer, memory in memories
        for name, tensor in memory.rows.state_dict().items()
    }
    tensors |= {
        f"{layer}/score": torch.tensor(memory.rows.stats.score) for layer, memory in memories
    }
    torch.save(tensors | module.student.state_dict(), f"{folder}/{rank}.pt")
    module.row_sync.close()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_same_rows_and_one_writes_them(tmp_path):
    torch.multiprocessing.spawn(_run_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    stored = read_store_rows(tmp_path / "rows.db")
    for layer in range(LAYERS):
        ids = first[f"{layer}/ids"]
        assert 0 < len(stored[f"layer_{layer}"]) <= 40
        assert set(ids[ids >= 0].tolist()) == set(stored[f"layer_{layer}"])
        for index in (ids >= 0).nonzero().flatten().tolist():
            assert (
                stored[f"layer_{layer}"][int(ids[index])][1]
                == first[f"{layer}/keys"][index].numpy().tobytes()
            )


@pytest.mark.parametrize("variant", ["associative", "mixed"])
def test_the_shipped_variants_run(variant, distill_args, tmp_path):
    """They store rows of the configured layers, in the store and in the saved student."""
    assert (
        distill_main(
            [
                f"configs/{variant}.yaml",
                *[arg for arg in distill_args if not arg.startswith("memory.")],
            ]
        )
        == 0
    )
    run = newest(tmp_path)
    rows = read_run_rows(run)
    assert set(rows) == {
        f"layer_{layer}" for layer in ([LAYERS - 1] if variant == "associative" else [2])
    }
    assert all(rows.values())
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert {
        f"layer_{layer}": len(memory.rows)
        for layer, memory in get_associative_memories(student).items()
    } == {name: len(rows_of_layer) for name, rows_of_layer in rows.items()}
    assert json.loads((run / "run.json").read_text())["knn"]


def test_a_full_disk_stops_the_step_with_advice(teacher, tokens, tmp_path):
    module = make_module(teacher, tmp_path)
    module.row_sync.load_rows()
    teach_step(module, tokens)
    with module.row_sync.store.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON dmt_rows "
            "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
    with pytest.raises(
        UserError, match="the disk is full; nothing of this step was written; make room and resume"
    ):
        teach_step(module, tokens, 2)


@pytest.mark.parametrize("reason", ["a second signal", "numbers that are not finite"])
def test_an_interrupted_step_has_no_effect(distill_args, tmp_path, monkeypatch, capsys, reason):
    """The second layer fails after the optimizer step; at a signal the first has changed rows."""
    args = [
        *distill_args,
        *ROWS,
        "memory.write_start=0",
        "stages.end_to_end_steps=9",
        "trainer.checkpoint_every=2",
    ]
    assert distill_main(args) == 0
    original, calls = AssociativeMemory.commit_step_task, []

    def interrupt(count):
        raise KeyboardInterrupt(signal.SIGINT)

    def commit_step_task(memory, step, now, allocate_ids):
        calls.append(step)
        if step == 9 and calls.count(step) == 2:
            if reason == "a second signal":
                allocate_ids = interrupt
            else:
                memory._pending_writes[0].values[0, 0] = torch.nan
        return original(memory, step, now, allocate_ids)

    monkeypatch.setattr(AssociativeMemory, "commit_step_task", commit_step_task)
    exit_code = distill_main(args)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    if reason == "a second signal":
        assert exit_code == 130
        assert "after step 8" in message
    else:
        assert exit_code == 2
        assert message.startswith(
            "error: step 9: a row written by layer 1 is not finite; nothing of this step"
        )
        assert "the last good checkpoint is step_8.ckpt" in message
    monkeypatch.undo()
    run = tmp_path / "logs" / "version_1"
    assert distill_main(["--resume", str(run)]) == 0, capsys.readouterr().err
    uninterrupted, stopped = (
        json.loads((run.parent / name / "run.json").read_text())
        for name in ("version_0", "version_1")
    )
    assert uninterrupted["fidelity"] == stopped["fidelity"]


def test_no_layer_gets_rows_where_those_of_another_are_not_finite(teacher, tokens, tmp_path):
    module = make_module(teacher, tmp_path)
    teach_step(module, tokens)
    memories = module.row_sync.memories
    ids = [memory.rows.ids.clone() for memory in memories.values()]
    with module.row_sync.writes_enabled(1.0):
        module.end_to_end_loss(Batch.full_step(tokens.flip(1)))
    memories[max(memories)]._pending_writes[-1].keys[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=f"a row written by layer {max(memories)} is not"):
        module.row_sync.commit_step(2)
    assert all(map(torch.equal, ids, [memory.rows.ids for memory in memories.values()]))
    assert [len(memory.rows) for memory in memories.values()] == [int((x >= 0).sum()) for x in ids]


def test_rows_of_an_earlier_run_keep_their_scores(teacher, tokens, tmp_path):
    module = make_module(teacher, tmp_path)
    module.row_sync.load_rows()
    teach_step(module, tokens, 20_000)
    module.row_sync.close()
    again = make_module(teacher, tmp_path)
    again.row_sync.load_rows()
    for memory in again.row_sync.memories.values():
        stats = memory.rows.stats
        assert (stats.score_step == 0).all()
        assert (stats.score[(memory.rows.ids >= 0).numpy()] >= 1).all()
        assert stats.score.max() < 100
    teach_step(again, tokens, 1)
    assert all(memory.rows.stats.score.max() < 1_000 for memory in again.row_sync.memories.values())


def test_the_fingerprint_depends_on_weights_and_not_on_the_path(teacher, tmp_path):
    fingerprint = hash_model(teacher)
    teacher.config._name_or_path, teacher.config.transformers_version = str(tmp_path), "99.0"
    assert hash_model(teacher) == fingerprint
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    assert hash_model(teacher) != fingerprint


def test_a_run_keeps_its_label_when_its_folder_is_renamed(teacher, tokens, tmp_path):
    module = make_module(teacher, tmp_path)
    module.row_sync.load_rows()
    teach_step(module, tokens, 1)
    state = module.row_sync.checkpoint_state(1)
    teach_step(module, tokens, 2)
    module.row_sync.close()
    again = make_module(teacher, tmp_path, run=tmp_path / "elsewhere")
    assert again.row_sync.run_label != state["run"]
    again.row_sync.restore_checkpoint(1, state)
    assert again.row_sync.run_label == state["run"]
    assert {
        step
        for rows in read_store_rows(tmp_path / "rows.db").values()
        for step, _, _ in rows.values()
    } == {1}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{folder}", "cannot be opened"),
        ("{folder}/other.txt", "not a store"),
        ("{folder}/nowhere/rows.db", "cannot be opened"),
    ],
)
def test_a_store_that_cannot_be_opened_is_refused_before_a_folder_is_made(
    url, message, distill_args, tmp_path, capsys
):
    (tmp_path / "other.txt").write_text("not a database, but long enough to look like one " * 100)
    assert distill_main([*distill_args, *ROWS, f"store.url={url.format(folder=tmp_path)}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
