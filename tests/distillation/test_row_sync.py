"""Associative memories in a whole run: rows and checkpoints are one, the saved student is the student, nothing leaks."""

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
from dmt.models.conversion import (
    convert_blocks,
    get_associative_memories,
    get_featural_memories,
    get_memories,
)
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations
from dmt.store import RowStore

ROWS = [
    "memory.kind=associative",
    "memory.write_start=0.2",
    "memory.min_distance=0.05",
    "store.flush_every=2",
]
ALONE = [
    "memory.base=none",
    "memory.k=8",
    "memory.mean_k=",
    "memory.write_start=0",
    "stages.layerwise_steps=0",
]


def rows_in(run):
    return rows_in_store(run / "memory.db")


def rows_in_store(place):
    """Rows of each layer by number: step, key, value."""
    with RowStore(str(place), read_only=True) as store:
        return {
            space.name: {
                int(n): (s, k.tobytes(), v.tobytes())
                for page in store.scan(space)
                for n, s, k, v in zip(
                    page.ids, page.metadata["step"], page.keys, page.values, strict=True
                )
            }
            for space in store.list_namespaces()
        }


def small(teacher, tmp_path, read_only=False, run=None, **changes):
    memory = AssociativeConfig(**{"k": 8, "write_start": 0.0, "min_distance": 0.01} | changes)
    config = replace(
        Config(),
        memory=memory,
        data=DataConfig(seq_len=16, batch_size=4, micro_batch_size=2),
        stages=StagesConfig(end_to_end_steps=4),
    )
    student, _ = convert_blocks(teacher, [memory] * LAYERS)
    made = DistillationModule(config, student, teacher)
    made.row_sync = RowStoreSync(
        StoreConfig(),
        RowStore(str(tmp_path / "rows.db"), hash_model(teacher), read_only),
        student,
        run or tmp_path,
    )
    return made


def taught(made, tokens, step=1):
    """One step's passes, without an optimiser: writes are offered and settled."""
    with made.row_sync.writes_enabled(1.0):
        for rows in tokens.split(2):
            made.end_to_end_loss(Batch.full_step(rows))
    made.row_sync.commit_step(step)


def test_a_student_with_empty_memories_is_its_base(teacher, tmp_path, tokens):
    made = small(teacher, tmp_path)
    plain, _ = convert_blocks(teacher, [FeaturalConfig(k=8)] * LAYERS)
    assert torch.equal(made.student(tokens).logits, plain(tokens).logits)
    taught(made, tokens)
    assert not torch.equal(made.student(tokens).logits, plain(tokens).logits)


def test_every_tensor_is_accounted_for(teacher):
    student, report = convert_blocks(
        teacher,
        [AssociativeConfig(k=8), FeaturalConfig(k=8), DenseConfig()],
    )
    assert list(get_associative_memories(student)) == [0]
    assert list(get_featural_memories(student)) == list(get_memories(student)) == [0, 1]
    fates = {transfer.target: transfer.status for transfer in report.transfers}
    assert fates["transformer.h.0.mlp.base.keys"] == "memory"
    assert fates["transformer.h.0.mlp.rows.keys"] == "new"


def test_what_comes_later_moves_nothing_before_it_while_writing(teacher, tmp_path, tokens):
    """In training, with rows of earlier steps: token t + 1 and the other sequence change, logits up to t do not, exactly."""
    made = small(teacher, tmp_path)
    taught(made, tokens)
    made.student.train()
    other = tokens.clone()
    other[0, 12:] = torch.randint(1, 300, (8,))
    said = []
    for given in (tokens, other):
        with made.row_sync.writes_enabled(1.0):
            made.end_to_end_loss(Batch.full_step(given))
            said.append(forward_with_activations(made.student, given).logits)
        for memory in get_associative_memories(made.student).values():
            memory.drop_pending()
    assert torch.equal(said[0][0, :12], said[1][0, :12])
    assert torch.equal(said[0][1:], said[1][1:])
    assert not torch.equal(said[0][0, 12:], said[1][0, 12:])


def test_generating_reads_and_does_not_write(teacher, tmp_path, tokens):
    made = small(teacher, tmp_path)
    taught(made, tokens)
    before = [len(memory.rows) for memory in get_associative_memories(made.student).values()]
    student = made.student.eval()
    cached, whole = (
        student.generate(
            tokens[:, :5], max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0
        )
        for use in (True, False)
    )
    assert torch.equal(cached, whole)
    other = tokens[:, :9].clone()
    other[:, 6:] = 7
    assert torch.equal(student(tokens[:, :9]).logits[:, :6], student(other).logits[:, :6])
    made.row_sync.commit_step(2)
    assert [
        len(memory.rows) for memory in get_associative_memories(made.student).values()
    ] == before


def test_the_micro_batch_does_not_change_what_is_written(teacher, tmp_path, tokens):
    written = []
    for parts in (1, 3):
        (tmp_path / str(parts)).mkdir()
        made = small(teacher, tmp_path / str(parts))
        with made.row_sync.writes_enabled(1.0):
            for rows in tokens.split(parts):
                made.end_to_end_loss(Batch.full_step(rows))
        made.row_sync.commit_step(1)
        written.append(
            [
                memory.rows.keys[: len(memory.rows)]
                for memory in get_associative_memories(made.student).values()
            ]
        )
    for one, three in zip(*written, strict=True):
        torch.testing.assert_close(one, three)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["memory.value_target=teacher"],
        [*ALONE, "memory.value_target=projection"],
        [*ALONE, "memory.value_target=teacher"],
    ],
    ids=str,
)
def test_a_run_writes_rows_saves_them_and_tells(words, tmp_path, changes, capsys):
    assert distill_main([*words, *ROWS, *changes]) == 0
    run = newest(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    stored = rows_in(run)
    for layer, memory in get_associative_memories(student).items():
        there = stored[f"layer_{layer}"]
        assert there
        assert set(memory.rows.index_by_id) == set(there)
        for number, place in memory.rows.index_by_id.items():
            assert memory.rows.keys[place].numpy().tobytes() == there[number][1]
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
    found = json.loads((run / "run.json").read_text())["knn"]
    assert {layer: kept["num_rows"] for layer, kept in found.items()} == {
        str(layer): len(stored[f"layer_{layer}"]) for layer in get_associative_memories(student)
    }
    assert all(0 < kept["null_weight"] < 1 for kept in found.values())
    assert "rows read for each token" in capsys.readouterr().err


def test_a_rule_says_when_its_layers_begin_to_write(words, tmp_path):
    rules = "student.layer_overrides=[{layers: 0, memory: {kind: dense}}, {layers: 2, memory: {write_start: 0.7}}]"
    assert distill_main([*words, *ROWS, rules]) == 0
    stored = rows_in(newest(tmp_path))
    assert {layer: min(step for step, *_ in rows.values()) for layer, rows in stored.items()} == {
        "layer_1": 6,
        "layer_2": 9,
    }


def test_a_saved_student_reads_the_same_rows(teacher, tmp_path, tokens):
    made = small(teacher, tmp_path)
    taught(made, tokens)
    made.student.eval().save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(again(tokens).logits, made.student(tokens).logits)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [*ALONE, "memory.value_target=projection"],
        ["memory.capacity=20", "memory.merge_distance=0.2", "memory.index=bf16"],
    ],
    ids=str,
)
def test_a_run_that_died_goes_on_to_the_same_rows_and_weights(words, tmp_path, changes):
    assert distill_main([*words, *ROWS, *changes]) == 0
    run = newest(tmp_path)
    whole, stored = weights(run), rows_in(run)
    last = max(int(p.stem[5:]) for p in (run / "checkpoints").iterdir())
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.stem == f"step_{last}":
            checkpoint.unlink()
    assert distill_main(["--resume", str(run)]) == 0
    again = rows_in(run)
    for layer, rows in stored.items():
        assert sorted(row for row in rows.values()) == sorted(row for row in again[layer].values())
    for name, value in whole.items():
        if not name.endswith(".ids"):  # numbers are never given out twice
            assert torch.equal(value, weights(run)[name]), name


def test_what_left_before_the_last_checkpoint_but_one_leaves_the_disk(words, tmp_path):
    assert (
        distill_main(
            [
                *words,
                *ROWS,
                "memory.capacity=10",
                "memory.min_distance=0",
                "trainer.checkpoint_every=1",
            ]
        )
        == 0
    )
    with RowStore(str(newest(tmp_path) / "memory.db"), read_only=True) as store:
        gone = [
            step
            for space in store.list_namespaces()
            for page in store.scan(space, include_deleted=True)
            for step in page.metadata["deleted_step"]
            if step
        ]
    kept = sorted(int(p.stem[5:]) for p in (newest(tmp_path) / "checkpoints").iterdir())
    assert gone
    assert min(gone) >= kept[0]


def test_resuming_a_finished_run_finds_its_rows(words, tmp_path):
    assert distill_main([*words, *ROWS, "trainer.validate_every=0"]) == 0
    run = newest(tmp_path)
    before = weights(run)
    assert distill_main(["--resume", str(run)]) == 0
    assert all(torch.equal(value, weights(run)[name]) for name, value in before.items())


def test_a_store_that_is_not_the_runs_is_refused(words, tmp_path, capsys):
    assert distill_main([*words, *ROWS]) == 0
    run = newest(tmp_path)
    for file in run.glob("memory.db*"):
        file.unlink()
    assert distill_main(["--resume", str(run)]) == 2
    assert "this run used another store" in capsys.readouterr().err


def test_another_teachers_store_is_refused_before_a_folder_is_made(
    words, tmp_path, tokenizer, capsys
):
    place = f"store.url={tmp_path / 'shared.db'}"
    assert distill_main([*words, *ROWS, place]) == 0
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    before = newest(tmp_path)
    assert distill_main([*words, *ROWS, place, f"teacher={tmp_path / 'llama'}"]) == 2
    assert "belong to another model" in capsys.readouterr().err
    assert newest(tmp_path) == before


def test_a_shared_store_is_read_by_the_next_run(words, tmp_path):
    place = f"store.url={tmp_path / 'shared.db'}"
    for _ in range(2):
        assert distill_main([*words, *ROWS, place]) == 0
    with RowStore(str(tmp_path / "shared.db"), read_only=True) as store:
        runs = {
            run
            for space in store.list_namespaces()
            for page in store.scan(space)
            for run in page.metadata["run"]
        }
    assert {run[-9:] for run in runs} == {"version_0", "version_1"}


def test_a_new_run_in_the_place_of_one_that_was_deleted_leaves_its_rows(words, tmp_path):
    place = tmp_path / "shared.db"
    assert distill_main([*words, *ROWS, f"store.url={place}"]) == 0
    before = {layer: set(rows) for layer, rows in rows_in_store(place).items()}
    shutil.rmtree(tmp_path / "logs")
    assert distill_main([*words, *ROWS, f"store.url={place}", "memory.write_start=1"]) == 0
    assert {layer: set(rows) for layer, rows in rows_in_store(place).items()} == before
    assert sum(map(len, before.values())) > 10


def test_runs_are_told_apart_however_alike_their_paths_end(tmp_path):
    end = "x" * 90
    assert _run_label(tmp_path / "a" / end) != _run_label(tmp_path / "b" / end)
    assert len(_run_label(tmp_path / end)) <= 80


def test_a_checkpoint_brings_back_how_warm_rows_were_and_usage_is_flushed_in_batches(
    teacher, tmp_path, tokens
):
    made = small(teacher, tmp_path)
    made.row_sync.flush_every = 3
    for step in (1, 2):
        taught(made, tokens, step)
    known, memory = made.row_sync.checkpoint_state(2), get_associative_memories(made.student)[0]
    heat, reads = memory.rows.stats.score.copy(), memory.rows.stats.reads.copy()
    assert reads.sum() > 0

    def told():
        return sum(
            sum(page.metadata["reads"])
            for page in made.row_sync.store.scan(made.row_sync.namespaces[0])
        )

    assert told() == 0
    taught(made, tokens, 3)
    assert told() > 0
    made.row_sync.restore_checkpoint(2, known)
    assert (memory.rows.stats.score == heat).all()
    assert (memory.rows.stats.reads == reads).all()


def test_usage_is_written_down(words, tmp_path):
    assert distill_main([*words, *ROWS]) == 0
    with RowStore(str(newest(tmp_path) / "memory.db"), read_only=True) as store:
        pages = [page for space in store.list_namespaces() for page in store.scan(space)]
    assert sum(sum(page.metadata["reads"]) for page in pages) > 0
    assert all(when is None or when > 1e9 for page in pages for when in page.metadata["last_read"])


@pytest.mark.parametrize(
    ("words_given", "said"),
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
            ["memory.kind=associative", *ALONE[:-1], "memory.value_target=teacher"],
            "set stages.layerwise_steps=0",
        ),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_makes_no_sense_is_refused(words_given, said, capsys):
    assert distill_main(words_given) == 2
    assert said in capsys.readouterr().err


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    teacher = make_teacher()
    if rank:
        dist.barrier()  # the first process makes the store
    made = small(teacher, Path(folder), read_only=bool(rank), capacity=40, merge_distance=0.3)
    if not rank:
        dist.barrier()
    made.row_sync.load_rows()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = made.student

        def forward(self, tokens):
            return made.end_to_end_loss(Batch.full_step(tokens))[0]

    step = torch.nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(made.student.parameters(), lr=0.01)
    drawn = torch.Generator().manual_seed(3)
    known = None
    for number in range(1, 7):
        tokens = torch.randint(0, teacher.config.vocab_size, (4, 16), generator=drawn)[
            2 * rank : 2 * rank + 2
        ]
        optimizer.zero_grad()
        with made.row_sync.writes_enabled(1.0):
            step(tokens).backward()
        optimizer.step()
        made.row_sync.commit_step(number)
        if number == 3:
            known = made.row_sync.checkpoint_state(3)
        if number == 5:  # as a resumed run begins
            made.row_sync.restore_checkpoint(3, known)
    memories = made.row_sync.memories.items()
    found = {
        f"{layer}/{n}": t for layer, memory in memories for n, t in memory.rows.state_dict().items()
    }
    found |= {f"{layer}/heat": torch.tensor(memory.rows.stats.score) for layer, memory in memories}
    torch.save(found | made.student.state_dict(), f"{folder}/{rank}.pt")
    made.row_sync.close()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_that_train_together_end_with_the_same_rows_and_one_of_them_writes(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    stored = rows_in_store(tmp_path / "rows.db")
    for layer in range(LAYERS):
        ids = first[f"{layer}/ids"]
        assert 0 < len(stored[f"layer_{layer}"]) <= 40
        assert set(ids[ids >= 0].tolist()) == set(stored[f"layer_{layer}"])
        for place in (ids >= 0).nonzero().flatten().tolist():
            assert (
                stored[f"layer_{layer}"][int(ids[place])][1]
                == first[f"{layer}/keys"][place].numpy().tobytes()
            )


@pytest.mark.parametrize("variant", ["associative", "mixed"])
def test_the_shipped_variants_run_like_the_default(variant, words, tmp_path):
    """From their own files, on a small teacher: rows in the layers they name, on disk and in the saved student."""
    assert (
        distill_main(
            [f"configs/{variant}.yaml", *[word for word in words if not word.startswith("memory.")]]
        )
        == 0
    )
    run = newest(tmp_path)
    rows = rows_in(run)
    assert set(rows) == {
        f"layer_{layer}" for layer in ([LAYERS - 1] if variant == "associative" else [2])
    }
    assert all(rows.values())
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert {
        f"layer_{layer}": len(memory.rows)
        for layer, memory in get_associative_memories(student).items()
    } == {name: len(found) for name, found in rows.items()}
    assert json.loads((run / "run.json").read_text())["knn"]


def test_a_store_that_cannot_be_written_stops_the_run_with_its_reason(teacher, tokens, tmp_path):
    made = small(teacher, tmp_path)
    made.row_sync.load_rows()
    taught(made, tokens)
    with made.row_sync.store.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON dmt_rows BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
    with pytest.raises(
        UserError, match="the disk is full; nothing of this step was written; make room and resume"
    ):
        taught(made, tokens, 2)


@pytest.mark.parametrize("why", ["a second signal", "numbers that are not finite"])
def test_a_step_that_does_not_end_is_as_if_it_had_not_been(
    words, tmp_path, monkeypatch, capsys, why
):
    """The model has moved and one layer has its rows when the second fails: nothing of that is gone on from."""
    given = [
        *words,
        *ROWS,
        "memory.write_start=0",
        "stages.end_to_end_steps=9",
        "trainer.checkpoint_every=2",
    ]
    assert distill_main(given) == 0
    plain, calls = AssociativeMemory.commit_step, []

    def settle(memory, step, now, take_ids):
        calls.append(step)
        if step == 9 and calls.count(step) == 2:
            if why == "a second signal":
                raise KeyboardInterrupt(signal.SIGINT)
            memory._pending_writes[0].values[0, 0] = torch.nan
        return plain(memory, step, now, take_ids)

    monkeypatch.setattr(AssociativeMemory, "commit_step", settle)
    ended = distill_main(given)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if why == "a second signal":
        assert ended == 130
        assert "after step 8" in said
    else:
        assert ended == 2
        assert said.startswith(
            "error: step 9: a row written by layer 1 is not finite; nothing of this step"
        )
        assert "the last good checkpoint is step_8.ckpt" in said
    monkeypatch.undo()
    run = tmp_path / "logs" / "version_1"
    assert distill_main(["--resume", str(run)]) == 0, capsys.readouterr().err
    alone, stopped = (
        json.loads((run.parent / name / "run.json").read_text())
        for name in ("version_0", "version_1")
    )
    assert alone["fidelity"] == stopped["fidelity"]


def test_rows_that_another_run_left_are_as_warm_as_when_it_ended(teacher, tokens, tmp_path):
    made = small(teacher, tmp_path)
    made.row_sync.load_rows()
    taught(made, tokens, 20_000)
    made.row_sync.close()
    again = small(teacher, tmp_path)
    again.row_sync.load_rows()
    for memory in again.row_sync.memories.values():
        known = memory.rows.stats
        assert (known.score_step == 0).all()
        assert (known.score[(memory.rows.ids >= 0).numpy()] >= 1).all()
        assert known.score.max() < 100
    taught(again, tokens, 1)
    assert all(memory.rows.stats.score.max() < 1_000 for memory in again.row_sync.memories.values())


def test_a_teacher_is_known_by_its_weights_and_not_by_where_it_lies(teacher, tmp_path):
    known = hash_model(teacher)
    teacher.config._name_or_path, teacher.config.transformers_version = str(tmp_path), "99.0"
    assert hash_model(teacher) == known
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    assert hash_model(teacher) != known


def test_a_run_keeps_its_name_when_its_folder_gets_another(teacher, tokens, tmp_path):
    made = small(teacher, tmp_path)
    made.row_sync.load_rows()
    taught(made, tokens, 1)
    state = made.row_sync.checkpoint_state(1)
    taught(made, tokens, 2)
    made.row_sync.close()
    again = small(teacher, tmp_path, run=tmp_path / "elsewhere")
    assert again.row_sync.run_label != state["run"]
    again.row_sync.restore_checkpoint(1, state)
    assert again.row_sync.run_label == state["run"]
    assert {
        step
        for rows in rows_in_store(tmp_path / "rows.db").values()
        for step, _, _ in rows.values()
    } == {1}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{folder}", "cannot be opened"),
        ("{folder}/other.txt", "not a store"),
        ("{folder}/nowhere/rows.db", "cannot be opened"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_before_a_folder_is_made(
    place, said, words, tmp_path, capsys
):
    (tmp_path / "other.txt").write_text("not a database, but long enough to look like one " * 100)
    assert distill_main([*words, *ROWS, f"store.url={place.format(folder=tmp_path)}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
