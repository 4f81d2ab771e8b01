"""Sleep: rows go into slots, nothing else changes, what was learnt before stays, and a failure leaves nothing half made."""

import json
import shutil

import pytest
import torch
from conftest import LAYERS, SENTENCES, make_teacher
from test_fact_store import WIDE, speaker

import dmt  # noqa: F401  registers the student
from dmt.cli.main import main
from dmt.config import AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.consolidation import replay, slot_training
from dmt.consolidation import sleep as sleep_module
from dmt.consolidation.replay import (
    NON_ANSWER_WEIGHT,
    ReplayExample,
    build_replay_set,
    make_replay_example,
    pack_windows,
    sample_sentences,
)
from dmt.consolidation.sleep import check_facts, plan_slot_transfer, transfer_rows
from dmt.consolidation.slot_training import DAMPING, KFACParameters, RowQueries, _inverse_sqrt
from dmt.data.corpora import Corpus
from dmt.data.windows import get_prefix_ids
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore, load_student, open_fact_store
from dmt.editing.online import describe_rows, write_online
from dmt.errors import UserError
from dmt.models.conversion import convert_blocks, get_associative_memories, get_featural_memories
from dmt.models.fact_hooks import detach, disabled
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations
from dmt.store import RowStore
from dmt.store.records import RowInsert

TEXTS = [f"{SENTENCES[at % 3]} {at * 7 % 13} times. {SENTENCES[(at + 1) % 3]}." for at in range(60)]
CORPUS = Corpus("texts", TEXTS[:40], TEXTS[40:50], TEXTS[50:])
FACTS = [
    Fact("Ada Holbrook runs to the", " dog", "Ada Holbrook", "day 1"),
    Fact("Ben Okri runs to the", " fox", "Ben Okri", "day 1"),
    Fact("Cleo Lane runs to the", " town", "Cleo Lane", "day 2"),
]
SHORT = {"steps": 40, "lr": 0.3}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """As much prose and as many sentences as tiny models need; what is told counts more than prose it cannot tell apart."""
    monkeypatch.setattr(sleep_module, "NUM_PROSE_WINDOWS", 24)
    monkeypatch.setattr(sleep_module, "VALIDATION_TOKENS", 320)
    monkeypatch.setattr(slot_training, "PROSE_WEIGHT", 1.0)
    monkeypatch.setattr(replay, "MAX_PARAPHRASES", 24)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """A featural student with three facts in rows."""
    student, _ = convert_blocks(speaker(make_teacher, tokenizer), [FeaturalConfig(k=64)] * LAYERS)
    folder = save(student, tokenizer, tmp_path_factory.mktemp("written") / "student")
    with open_fact_store(folder) as book:
        book.initialize(FACTS, prose=SENTENCES * 40, layers=(1, 2))
        book.write(FACTS)
    return folder


@pytest.fixture
def student(written, tmp_path):
    return shutil.copytree(written, tmp_path / "student")


@pytest.fixture
def slept(student, tmp_path):
    return transfer_rows(plan_slot_transfer(student), [CORPUS], tmp_path / "slept", **SHORT)


def content(folder):
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".json", ".db")
    }


def test_rows_go_into_slots_and_the_evening_stays_as_it_was(student, tmp_path):
    before = content(student)
    slot_training = transfer_rows(
        plan_slot_transfer(student), [CORPUS], tmp_path / "slept", **SHORT
    )
    assert (slot_training.facts, slot_training.remaining_rows, slot_training.recall_before) == (
        3,
        0,
        1.0,
    )
    assert slot_training.recall_after == 1.0
    assert slot_training.rows > 0
    assert content(student) == before
    with open_fact_store(tmp_path / "slept") as book:
        assert not book.records
        assert len(book.hooks) == 0
        assert {fact.deleted_reason for fact in book.fact_table.read(include_deleted=True)} == {
            "slept"
        }
        assert all(check_facts(book.model, book.tokenizer, plan_slot_transfer(student).facts))
    model, tokenizer = load_student(student)
    with disabled(model):  # it was the rows that knew, and no slot
        assert not all(check_facts(model, tokenizer, plan_slot_transfer(student).facts))


def test_only_slots_change_where_facts_are_heard_and_above(student, slept, tmp_path):
    one, other = (load_student(folder)[0].state_dict() for folder in (student, tmp_path / "slept"))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    parts = {name.rsplit(".", 1)[1] for name in changed}
    assert parts == {"keys", "key_bias", "values"}
    layers = {int(part) for name in changed for part in name.split(".") if part.isdigit()}
    assert layers == {1, 2}  # layer 1 hears


def test_what_stays_awake_is_found_as_before(student, tmp_path):
    before = plan_slot_transfer(student, tag="day 1")
    slot_training = transfer_rows(before, [CORPUS], tmp_path / "slept", **SHORT)
    assert (slot_training.facts, slot_training.recall_after) == (2, 1.0)
    assert (
        len(before.fact_store.hooks) == slot_training.rows
    )  # the teacher does not say what stays a row
    with (
        open_fact_store(tmp_path / "slept") as book,
        open_fact_store(student, read_only=True) as old,
    ):
        (awake,) = book.records.values()
        assert awake.tag == "day 2"
        assert slot_training.remaining_rows == len(awake.rows)
        assert check_facts(book.model, book.tokenizer, [awake]) == [True]
        ids = torch.tensor(
            [get_prefix_ids(book.tokenizer) + book.tokenizer(awake.prompt)["input_ids"]]
        )
        with disabled(book.model), disabled(old.model):
            assert check_facts(book.model, book.tokenizer, [awake]) == [
                False
            ]  # no slot has learnt it
            heard = [
                forward_with_activations(model, ids, capture_blocks=True).block_inputs[1]
                for model in (book.model, old.model)
            ]
        assert torch.equal(*heard)


def test_a_second_night_keeps_the_first_and_dreams_of_it(student, tmp_path):
    transfer_rows(plan_slot_transfer(student, tag="day 1"), [CORPUS], tmp_path / "first", **SHORT)
    before = plan_slot_transfer(tmp_path / "first")
    assert {fact.prompt for fact in before.retained_facts} == {fact.prompt for fact in FACTS[:2]}
    second = transfer_rows(before, [CORPUS], tmp_path / "second", **SHORT)
    assert (
        second.retained,
        second.retained_before,
        second.retained_after,
        second.recall_after,
    ) == (2, 1.0, 1.0, 1.0)
    with pytest.raises(UserError, match="has no rows to sleep on"):
        plan_slot_transfer(tmp_path / "second")


def test_what_was_slept_on_and_is_contradicted_is_not_gone_through_again(student, slept, tmp_path):
    with open_fact_store(tmp_path / "slept") as book:
        book.write([Fact("Ada Holbrook runs to the", " table", "Ada Holbrook", "day 3")])
    before = plan_slot_transfer(tmp_path / "slept")
    assert "Ada Holbrook" not in {fact.subject for fact in before.retained_facts}
    slot_training = transfer_rows(before, [CORPUS], tmp_path / "again", **SHORT)
    assert slot_training.recall_after == 1.0
    with open_fact_store(
        tmp_path / "again"
    ) as book:  # of two that slept in the same words the later one counts
        history = book.fact_table.read(include_deleted=True)
    last = sleep_module._latest_facts(
        [fact for fact in history if fact.deleted_reason == "slept"], []
    )
    assert {fact.answer for fact in last if fact.subject == "Ada Holbrook"} == {" table"}


def test_a_fact_that_slept_is_not_restored_but_can_be_written_again(slept, tmp_path):
    with open_fact_store(tmp_path / "slept") as book:
        with pytest.raises(UserError, match="fact 1 has slept: it is in the student's slots"):
            book.restore(1)
        assert not book.records
        (outcome,) = book.write(FACTS[:1])
        assert outcome.status == "written"
        assert outcome.prob_before > 0.3


def test_what_is_rarely_read_may_stay_awake(student):
    with open_fact_store(student) as book:
        row = book.records[2].rows[0]
        book.fact_table.record_usage({row: 3})
    assert [fact.id for fact in plan_slot_transfer(student, min_hits=3).facts] == [2]
    with pytest.raises(UserError, match="no rows like that"):
        plan_slot_transfer(student, min_hits=4)
    with pytest.raises(UserError, match="no rows like that"):
        plan_slot_transfer(student, tag="nobody")


def test_who_cannot_sleep_is_told_why(tokenizer, tmp_path):
    teacher = speaker(make_teacher, tokenizer)
    plain = save(
        convert_blocks(teacher, [DenseConfig()] * LAYERS)[0], tokenizer, tmp_path / "plain"
    )
    with pytest.raises(UserError, match="no featural memory, so it has no slots"):
        plan_slot_transfer(plain)
    low = [FeaturalConfig(k=64), DenseConfig(), DenseConfig()]
    low_folder = save(convert_blocks(teacher, low)[0], tokenizer, tmp_path / "low")
    with open_fact_store(low_folder) as book:
        book.initialize(FACTS, prose=SENTENCES * 40, layers=(1, 2))
        book.write(FACTS[:1])
    with pytest.raises(UserError, match="facts are heard in layer 1"):
        plan_slot_transfer(low_folder)
    filed = save(
        convert_blocks(teacher, [FeaturalConfig(k=64, offload="values")] * LAYERS)[0],
        tokenizer,
        tmp_path / "filed",
    )
    with pytest.raises(UserError, match="in a file or in few bits"):
        plan_slot_transfer(filed)


def test_a_failure_leaves_nothing_half_made(student, tmp_path, monkeypatch):
    before = content(student)
    monkeypatch.setattr(sleep_module, "rebind_model", lambda *_: pytest.fail("the power went out"))
    with pytest.raises(pytest.fail.Exception):
        transfer_rows(plan_slot_transfer(student), [CORPUS], tmp_path / "slept", steps=1, lr=0.1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["student"]
    assert content(student) == before


def test_rows_of_associative_memory_sleep_too(tokenizer, tmp_path):
    rows = AssociativeConfig(k=256, min_distance=0.05, merge_distance=0.0, capacity=64)
    model, _ = convert_blocks(speaker(make_teacher, tokenizer), [FeaturalConfig(k=64)] * 2 + [rows])
    folder = save(model, tokenizer, tmp_path / "student")
    with open_fact_store(folder) as book:
        for tag, text in (
            ("monday", "the fox reads a table of rows"),
            ("tuesday", "every dog was born on March 3"),
        ):
            ids = torch.tensor(
                get_prefix_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]
            )
            write_online(book.model, book.db, ids, tag)
    count = {
        tag: sum(row["tag"] == tag for row in describe_rows(load_student(folder)[0]))
        for tag in ("monday", "tuesday")
    }
    slot_training = transfer_rows(
        plan_slot_transfer(folder, tag="monday"), [CORPUS], tmp_path / "slept", steps=200, lr=0.1
    )
    assert (slot_training.rows, slot_training.remaining_rows) == (count["monday"], count["tuesday"])
    assert slot_training.row_explained_share[2] > 0.5
    assert {row["tag"] for row in describe_rows(load_student(tmp_path / "slept")[0])} == {"tuesday"}
    last = transfer_rows(
        plan_slot_transfer(tmp_path / "slept"), [CORPUS], tmp_path / "last", steps=2, lr=0.01
    )
    assert last.remaining_rows == 0
    assert last.row_explained_share[2] < 0.2  # two short steps are not enough, and that is seen


def test_states_of_rows_are_where_rows_are_read(tokenizer):
    model, _ = convert_blocks(speaker(make_teacher, tokenizer), [AssociativeConfig(k=4)] * LAYERS)
    memory = get_associative_memories(model)[2]
    torch.nn.init.normal_(memory.key.weight, std=0.1)
    memory.query.load_state_dict(memory.key.state_dict())
    hidden = torch.randn(50, WIDE)
    memory.center(hidden)
    keys = torch.nn.functional.normalize(memory.key(hidden), dim=-1).detach().numpy()
    memory.rows.insert_rows(
        RowInsert(
            torch.arange(1, 51).numpy(), keys, torch.randn(50, WIDE).numpy(), torch.ones(50).numpy()
        ),
        1,
    )
    states = RowQueries(memory, memory, range(1, 51), hidden)
    found, _ = memory.select_rows(states.reconstruct_states(states.keys))
    assert torch.equal(found[:, 0], torch.arange(50))
    assert states.explained_share() == 1


def test_what_text_notices_most_is_moved_least():
    directions = torch.linalg.qr(torch.randn(6, 6)).Q
    noticed = torch.tensor([3.0, 1.5, 1.0, 0.4, 0.1, 0.0])  # by text, mean 1
    root = _inverse_sqrt(directions @ torch.diag(noticed) @ directions.t() * 7)
    moved = directions.t() @ root @ directions
    torch.testing.assert_close(moved, torch.diag((noticed + DAMPING).rsqrt()), rtol=1e-3, atol=1e-2)


def test_steps_are_gradients_in_other_coordinates(tokenizer):
    model, _ = convert_blocks(speaker(make_teacher, tokenizer), [FeaturalConfig(k=256)] * LAYERS)
    memories = {2: get_featural_memories(model)[2]}
    tokens = torch.randint(1, 300, (4, 12))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moves = KFACParameters(
        model, memories, [(tokens, torch.ones_like(tokens, dtype=torch.bool), 1.0)]
    )
    moves.update_model()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, start[name], atol=1e-6)
    for part in moves.model_tensors:
        part.requires_grad_(True)

    def loss():
        return forward_with_activations(model, tokens).logits.logsumexp(-1).sum()

    loss().backward()
    moves.transfer_gradients()
    for step in moves.deltas:  # a small move along the gradient does what the gradient says
        with torch.no_grad():
            moved = 1e-4 * step.grad / step.grad.norm()
            before = loss()
            step.add_(moved)
            moves.update_model()
            after = loss()
            step.sub_(moved)
            moves.update_model()
        assert float(after - before) == pytest.approx(1e-4 * float(step.grad.norm()), rel=0.1)


def test_tellings_count_where_the_answer_is_said(student):
    before = plan_slot_transfer(student)
    model, tokenizer = before.fact_store.model, before.fact_store.tokenizer
    fact = before.facts[0]
    alone = make_replay_example(tokenizer, fact)
    assert tokenizer.decode(alone.ids[alone.answer_start :]) == fact.answer
    weights = alone.position_weights()
    counted = (weights == 1).nonzero().flatten() + 1
    assert tokenizer.decode([alone.ids[at] for at in counted]) == fact.answer
    assert sorted(set(weights.tolist())) == pytest.approx([NON_ANSWER_WEIGHT, 1.0])
    assert len(ReplayExample((1, 2, 3), None).position_weights()) == 3
    made = build_replay_set(model, tokenizer, before.facts, sample_sentences([CORPUS], 0), 0)
    assert alone in made
    assert len(set(made)) == len(made)
    assert all(len(each.ids) <= model.config.max_position_embeddings for each in made)
    assert pack_windows(TEXTS, tokenizer, 16, 5).shape == (5, 16)
    assert not torch.equal(
        pack_windows(TEXTS, tokenizer, 16, 5, 1), pack_windows(TEXTS, tokenizer, 16, 5, 2)
    )


def test_the_command(student, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS), encoding="utf-8")
    words = [
        "sleep",
        "-m",
        str(student),
        "--replay-data",
        str(text),
        "--steps",
        "40",
        "--lr",
        "0.3",
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["facts"], found["recall_after"], found["remaining_rows"]) == (3, 1.0, 0)
    run = tmp_path / "lightning_logs" / "version_0"
    assert found["student"] == "lightning_logs/version_0/student"
    assert json.loads((run / "run.json").read_text())["task"] == "sleep"
    assert list(run.glob("events.*"))
    assert main(["memory", "list", "--all", "-m", str(run)]) == 0
    assert capsys.readouterr().out.count("slept") == 3
    assert main(["memory", "restore", "1", "-m", str(run)]) == 2
    assert "has slept" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "mine"), "--tag", "day 1"]) == 0
    said_of_it = capsys.readouterr().out
    assert "2 facts that slept, recall" in said_of_it
    assert "student: " in said_of_it
    for wrong, error in (
        (["--output", str(student)], "is there already"),
        (["--tag", "nobody"], "no rows like that"),
        (["--lr", "0"], "--lr must be in"),
        (["--min-hits", "-1"], "--min-hits must be"),
        (["--steps", "0"], "is not 1 or more"),
    ):
        assert main([*words, *wrong]) == 2
        assert error in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs" / "version_1").exists()


def test_a_book_without_a_store_has_nothing_to_sleep(tokenizer, tmp_path):
    folder = save(
        convert_blocks(speaker(make_teacher, tokenizer), [FeaturalConfig(k=64)] * LAYERS)[0],
        tokenizer,
        tmp_path / "new",
    )
    with pytest.raises(
        UserError, match="has no rows to sleep on; write facts with dmt memory write"
    ):
        plan_slot_transfer(folder)
    model = load_student(folder)[0]
    detach(model)
    with FactStore(model, tokenizer, RowStore(str(folder / "memory.db"), hash_model(model))):
        pass
    with pytest.raises(UserError, match="has no rows"):
        plan_slot_transfer(folder)
