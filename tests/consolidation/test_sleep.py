"""Slot transfers: facts and rows move into slots; nothing else changes."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import LAYERS, SENTENCES, make_teacher
from page_checks import check_self_contained
from test_fact_store import make_fact_model
from test_tensorboard import load_events, read_charts

import dmt
from consolidation.conftest import FACTS, SMALL, save_student
from dmt.config import AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.consolidation import sleep
from dmt.consolidation.sleep import check_facts, plan_slot_transfer, select_latest_facts
from dmt.consolidation.slot_training import KFACParameters, ReplayLoss
from dmt.data.tokenizer import get_prefix_ids
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.editing.online import describe_rows, write_online
from dmt.errors import UserError
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import detach, disabled
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load
from dmt.store import RowStore
from dmt.store.facts import TRANSFERRED


@pytest.fixture
def transferred(student, tmp_path, transfer):
    """The folder of the student after its facts have moved into slots."""
    transfer(student, tmp_path / "run")
    return tmp_path / "run" / "student"


def read_files(folder):
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".json", ".db")
    }


def read_weights(folder):
    return load(folder)[0].state_dict()


def test_facts_move_into_slots_and_the_source_is_unchanged(student, tmp_path, transfer):
    before = read_files(student)
    result = transfer(student, tmp_path / "run")
    assert (result.facts, result.remaining_rows, result.recall_before) == (3, 0, 1.0)
    assert result.recall_after == 1.0
    assert result.rows > 0
    assert result.run_dir == tmp_path / "run"
    assert "3 facts" in repr(result)
    assert read_files(student) == before
    facts = plan_slot_transfer(student).facts
    with FactStore.open(tmp_path / "run" / "student") as fact_store:
        assert not fact_store.records
        assert len(fact_store.hooks) == 0
        history = fact_store.fact_table.read(include_deleted=True)
        assert {fact.deleted_reason for fact in history} == {TRANSFERRED}
        assert all(check_facts(fact_store.model, fact_store.tokenizer, facts))
    model, tokenizer = load(student)
    with disabled(model):  # the rows knew the facts, not the slots
        assert not all(check_facts(model, tokenizer, facts))


def test_only_slots_at_and_above_the_key_layer_change(student, transferred):
    before, after = read_weights(student), read_weights(transferred)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"keys", "key_bias", "values"}
    layers = {int(part) for name in changed for part in name.split(".") if part.isdigit()}
    assert layers == {1, 2}  # layer 1 is the key layer


def test_remaining_rows_match_as_before(student, tmp_path, transfer):
    with FactStore.open(student, read_only=True) as fact_store:
        num_rows_before = fact_store.fact_table.count_rows()
    result = transfer(student, tmp_path / "run", tag="day 1")
    assert (result.facts, result.recall_after) == (2, 1.0)
    assert result.rows + result.remaining_rows == num_rows_before
    with (
        FactStore.open(tmp_path / "run" / "student") as fact_store,
        FactStore.open(student, read_only=True) as source,
    ):
        (remaining,) = fact_store.records.values()
        assert remaining.tag == "day 2"
        assert result.remaining_rows == len(remaining.rows)
        assert check_facts(fact_store.model, fact_store.tokenizer, [remaining]) == [True]
        ids = torch.tensor(
            [
                get_prefix_ids(fact_store.tokenizer)
                + fact_store.tokenizer(remaining.prompt)["input_ids"]
            ]
        )
        with disabled(fact_store.model), disabled(source.model):
            # no slot has learned it
            assert check_facts(fact_store.model, fact_store.tokenizer, [remaining]) == [False]
            key_inputs = [
                forward_with_activations(model, ids, capture_blocks=True).block_inputs[1]
                for model in (fact_store.model, source.model)
            ]
        assert torch.equal(*key_inputs)


def test_the_teacher_does_not_predict_facts_that_remain_rows(student, tmp_path, transfer):
    plan = plan_slot_transfer(student, tag="day 1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sleep, "plan_slot_transfer", lambda *_: plan)
        result = transfer(student, tmp_path / "run", tag="day 1")
    assert len(plan.fact_store.hooks) == result.facts == 2


def test_a_second_transfer_replays_and_retains_the_first(student, tmp_path, transfer):
    transfer(student, tmp_path / "first", tag="day 1")
    plan = plan_slot_transfer(tmp_path / "first" / "student")
    assert {fact.prompt for fact in plan.retained_facts} == {fact.prompt for fact in FACTS[:2]}
    second = transfer(tmp_path / "first", tmp_path / "second")
    assert (second.retained, second.retained_before) == (2, 1.0)
    assert (second.retained_after, second.recall_after) == (1.0, 1.0)
    assert "earlier facts retained" in repr(second)
    with pytest.raises(UserError, match="has no facts or rows to transfer"):
        plan_slot_transfer(tmp_path / "second" / "student")


def test_contradicted_facts_are_not_replayed(transferred, tmp_path, transfer):
    with FactStore.open(transferred) as fact_store:
        fact_store.write_many([Fact("Ada Holbrook runs to the", " table", "Ada Holbrook", "day 3")])
    plan = plan_slot_transfer(transferred)
    assert "Ada Holbrook" not in {fact.subject for fact in plan.retained_facts}
    assert transfer(transferred, tmp_path / "again").recall_after == 1.0
    with FactStore.open(tmp_path / "again" / "student") as fact_store:
        history = fact_store.fact_table.read(include_deleted=True)
    # of two transferred facts with the same prompt the later one counts
    moved = [fact for fact in history if fact.deleted_reason == TRANSFERRED]
    (ada,) = (fact for fact in select_latest_facts(moved, []) if fact.subject == "Ada Holbrook")
    assert ada.answer == " table"
    # nor does it count if a stored fact has the same prompt
    assert ada not in select_latest_facts(moved, [ada])


def test_a_transferred_fact_is_not_restored_but_can_be_written_again(transferred):
    with FactStore.open(transferred) as fact_store:
        with pytest.raises(UserError, match="slots"):
            fact_store.restore(1)
        assert not fact_store.records
        (result,) = fact_store.write_many(FACTS[:1])
        assert result.status == "written"
        assert result.prob_before > 0.3


def test_rarely_used_facts_remain_rows(student):
    with FactStore.open(student) as fact_store:
        row = fact_store.records[2].rows[0]
        fact_store.fact_table.record_usage({row: 3})
    assert [fact.id for fact in plan_slot_transfer(student, min_hits=3).facts] == [2]
    with pytest.raises(UserError, match="no facts or rows with this tag and number of hits"):
        plan_slot_transfer(student, min_hits=4)
    with pytest.raises(UserError, match="no facts or rows with this tag and number of hits"):
        plan_slot_transfer(student, tag="nobody")


def test_students_without_trainable_slots_are_rejected(tokenizer, tmp_path):
    teacher = make_fact_model(make_teacher, tokenizer)
    plain = convert_blocks(teacher, [DenseConfig()] * LAYERS)[0]
    with pytest.raises(UserError, match="no featural memory, so it has no slots"):
        plan_slot_transfer(save_student(plain, tokenizer, tmp_path / "plain"))
    low = convert_blocks(teacher, [FeaturalConfig(k=64), DenseConfig(), DenseConfig()])[0]
    low_folder = save_student(low, tokenizer, tmp_path / "low")
    with FactStore.open(low_folder) as fact_store:
        fact_store.initialize(FACTS, prose=SENTENCES * 40, layers=(1, 2))
        fact_store.write_many(FACTS[:1])
    with pytest.raises(UserError, match="facts are matched at layer 1"):
        plan_slot_transfer(low_folder)
    offloaded = convert_blocks(teacher, [FeaturalConfig(k=64, offload="values")] * LAYERS)[0]
    with pytest.raises(UserError, match="memory-mapped or quantized"):
        plan_slot_transfer(save_student(offloaded, tokenizer, tmp_path / "offloaded"))


def test_a_student_without_facts_has_nothing_to_transfer(tokenizer, tmp_path):
    model = convert_blocks(
        make_fact_model(make_teacher, tokenizer), [FeaturalConfig(k=64)] * LAYERS
    )[0]
    folder = save_student(model, tokenizer, tmp_path / "new")
    message = "has no facts or rows to transfer; write facts with dmt memory write"
    with pytest.raises(UserError, match=message):
        plan_slot_transfer(folder)
    model = load(folder)[0]
    detach(model)
    with FactStore(model, tokenizer, RowStore(str(folder / "memory.db"), hash_model(model))):
        pass
    with pytest.raises(UserError, match="has no facts or rows"):
        plan_slot_transfer(folder)


def test_nothing_to_transfer_leaves_no_run_folder(student, tmp_path, transfer):
    with pytest.raises(UserError, match="no facts or rows with this tag"):
        transfer(student, tmp_path / "run", tag="nobody")
    assert not (tmp_path / "run").exists()


def test_a_failure_leaves_no_partial_student(student, tmp_path, transfer, monkeypatch):
    before = read_files(student)
    monkeypatch.setattr(sleep, "rebind_model", lambda *_: pytest.fail("power failure"))
    with pytest.raises(pytest.fail.Exception):
        transfer(student, tmp_path / "run", steps=1, lr=0.1)
    assert not (tmp_path / "run" / "student").exists()
    assert read_files(student) == before
    monkeypatch.undo()


def test_rows_of_associative_memory_move_into_slots(tokenizer, tmp_path, transfer):
    associative = AssociativeConfig(k=256, min_distance=0.05, merge_distance=0.0, capacity=64)
    configs = [FeaturalConfig(k=64)] * 2 + [associative]
    folder = save_student(
        convert_blocks(make_fact_model(make_teacher, tokenizer), configs)[0],
        tokenizer,
        tmp_path / "student",
    )
    with FactStore.open(folder) as fact_store:
        for tag, text in (
            ("monday", "the fox reads a table of rows"),
            ("tuesday", "every dog was born on March 3"),
        ):
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor(get_prefix_ids(tokenizer) + token_ids)
            write_online(fact_store.model, fact_store.db, ids, tag)
    tags = [row["tag"] for row in describe_rows(load(folder)[0])]
    result = transfer(folder, tmp_path / "first", steps=200, lr=0.1, tag="monday")
    assert (result.rows, result.remaining_rows) == (tags.count("monday"), tags.count("tuesday"))
    assert result.row_explained_share[2] > 0.5
    remaining = describe_rows(load(tmp_path / "first" / "student")[0])
    assert {row["tag"] for row in remaining} == {"tuesday"}
    last = transfer(tmp_path / "first", tmp_path / "last", steps=2, lr=0.01)
    assert last.remaining_rows == 0
    assert last.row_explained_share[2] < 0.2  # two short steps are not enough, and that shows
    assert "train/row_error/layer_2" in (tmp_path / "last" / "metrics.csv").read_text()


def test_a_run_has_curves_and_reports(student, tmp_path, transfer):
    transfer(student, tmp_path / "first", tag="day 1")
    run_dir = transfer(tmp_path / "first", tmp_path / "run", steps=4).run_dir
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["task"] == "sleep"
    assert record["slot_transfer"]["retained"] == 2
    assert set(record["seconds"]) == {"prepare", "train", "measure"}
    header = (run_dir / "metrics.csv").read_text().splitlines()[0]
    assert {"train/kl_new", "train/kl_replay", "train/kl_unrelated", "val/texts/kl"} <= set(
        header.split(",")
    )
    assert "recall of 1 transferred facts" in (run_dir / "report.md").read_text()
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "of the facts of earlier transfers retained" in page
    logged = load_events(run_dir)
    tags = logged.Tags()["scalars"]
    chart_tags = {
        tag for group in read_charts(logged).values() for names in group.values() for tag in names
    }
    assert chart_tags
    assert chart_tags <= set(tags)


def test_an_interrupted_transfer_resumes_to_equal_weights(student, tmp_path, transfer, monkeypatch):
    settings = {"trainer": {"checkpoint_every": 2}}
    transfer(student, tmp_path / "first", tag="day 1", steps=2)
    source = tmp_path / "first"
    transfer(source, tmp_path / "complete", steps=6, **settings)
    complete = read_weights(tmp_path / "complete" / "student")
    original, calls = KFACParameters.update_model, []

    def stop(parameters):
        calls.append(None)
        if len(calls) == 5:  # the first call is at the start of training
            raise OSError("power failure")
        original(parameters)

    monkeypatch.setattr(KFACParameters, "update_model", stop)
    with pytest.raises(OSError, match="power failure"):
        transfer(source, tmp_path / "run", steps=6, **settings)
    monkeypatch.setattr(KFACParameters, "update_model", original)
    assert not (tmp_path / "run" / "student").exists()
    for _ in range(2):  # in the middle; and after the last step, when only evaluation remains
        result = dmt.transfer_to_slots(source, output=tmp_path / "run", resume=True)
        assert result.recall_before == 1.0
        resumed = read_weights(tmp_path / "run" / "student")
        assert all(torch.equal(resumed[name], complete[name]) for name in complete)


def test_a_step_that_fails_half_way_leaves_the_random_state(
    student, tmp_path, transfer, monkeypatch
):
    complete = transfer(student, tmp_path / "complete", steps=4)
    original, calls = ReplayLoss.compute_loss, []

    def fail_once(loss, *args):
        result = original(loss, *args)
        calls.append(None)
        if len(calls) == 3:
            raise OSError("power failure")
        return result

    monkeypatch.setattr(ReplayLoss, "compute_loss", fail_once)
    with pytest.raises(OSError, match="power failure"):
        transfer(student, tmp_path / "run", steps=4)
    resumed = dmt.transfer_to_slots(student, output=tmp_path / "run", resume=True)
    assert resumed.kl == complete.kl


def test_resume_is_rejected_if_the_facts_have_changed(student, tmp_path, transfer, monkeypatch):
    transfer(student, tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run" / "student")
    with FactStore.open(student) as fact_store:
        fact_store.delete([1])
    with pytest.raises(UserError, match="has other facts than when this run began"):
        dmt.transfer_to_slots(student, output=tmp_path / "run", resume=True)


def test_wrong_arguments_are_rejected(student, tmp_path, transfer):
    for changes, message in (
        ({"lr": 2.0}, r"lr must be in \(0, 1\]"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"sleep": {"momentum": 1.0}}, "momentum must be in"),
        ({"sleep": {"size": 1}}, "size=1 is not a setting of sleep"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(student, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="is not a saved student"):
        transfer("embedded", tmp_path / "run")
    with pytest.raises(ValueError, match="give its folder"):
        dmt.transfer_to_slots(student, resume=True)
    assert not (tmp_path / "run").exists()
    assert SMALL["num_windows"] == 24


def test_a_signal_stops_at_the_end_of_a_step(student, tmp_path, transfer, monkeypatch):
    from dmt.cli.main import main

    original, calls = KFACParameters.update_model, []

    def stop(parameters):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        original(parameters)

    monkeypatch.setattr(KFACParameters, "update_model", stop)
    settings = [f"sleep.{name}={value}" for name, value in SMALL.items()]
    args = ["sleep", "--model", str(student), "--output", str(tmp_path / "run"), "--steps", "6"]
    args += [*settings, "trainer.num_threads=1", "trainer.progress_bar=false"]
    try:
        code = main(args)
    except SystemExit as system_exit:
        code = system_exit.code
    assert code == 128 + signal.SIGTERM
    monkeypatch.setattr(KFACParameters, "update_model", original)
    assert (tmp_path / "run" / "checkpoints" / "step_2.ckpt").exists()
    assert main(["distill", "--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "student" / "memory.db").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
