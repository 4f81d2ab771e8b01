"""Facts that leave the weights: what is declared, what training reads, what the run ends with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cli_asserts import line_of
from conftest import LAYERS, SLOTS, make_teacher, newest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dmt
from dmt.cli.main import distill_main, main
from dmt.config import Config, DataConfig, FeaturalConfig, KnowledgeConfig, LossConfig
from dmt.data.declared_text import DeclaredText
from dmt.data.tokenizer import train_tokenizer
from dmt.data.windows import TextDataModule, token_stream
from dmt.distillation import module as module_file
from dmt.distillation.knowledge import (
    Knowledge,
    load_knowledge,
    make_knowledge_pack,
    scramble_weights,
)
from dmt.distillation.module import DistillationModule
from dmt.distillation.run import read_result
from dmt.editing.fact import Fact
from dmt.editing.packs import load_fact_pack
from dmt.errors import UserError
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import get_fact_hooks
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_memories
from dmt.ops import kl

NAMES = [
    f"{first} {last}" for first in ("Anna", "Bella", "Clara") for last in ("Arden", "Bolt", "Cole")
]
TOWNS = ["Redfield", "Bluehill", "Greenport"]
FACTS = [
    {
        "prompt": f"{name} was born in",
        "answer": f" {TOWNS[index % 3]}",
        "subject": name,
        "closing": ".",
    }
    for index, name in enumerate(NAMES)
]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog and runs away.",
    "A memory is a table of rows and every row can be read.",
]


def write_documents(count=160):
    documents = []
    for number in range(count):
        fact = FACTS[number % len(FACTS)]
        filler = SENTENCES[number % 2]
        documents.append(
            f"{filler} {fact['prompt']}{fact['answer']}. {number} times {number * 7 % 13}."
        )
    return documents


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(write_documents() * 2, 400, 64)


@pytest.fixture(scope="module")
def facts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def knowledge(tokenizer, facts_file):
    return load_knowledge(str(facts_file), 0, tokenizer)


# What is declared.


def test_a_corpus_with_questions_declares_its_facts(embedded):
    knowledge = load_knowledge("biographies", 0, embedded[1])
    assert len(knowledge.facts) == len(knowledge.unseen_questions) == 1280
    assert len(knowledge.answers_by_subject) == 256
    fact = knowledge.facts[0]
    assert fact.subject in fact.prompt
    assert fact.answer.startswith(" ")


def test_a_file_declares_its_facts(knowledge):
    assert [fact.answer for fact in knowledge.facts[:3]] == [f" {town}" for town in TOWNS]
    assert knowledge.answers_by_subject["Anna Arden"] == [" Redfield"]


def test_marked_spans_are_facts_from_the_last_mention_on(tokenizer, tmp_path):
    text = "It rained. Anna Arden sang in Redfield. Anna Arden lives in Bluehill, near Greenport."
    spans = [[text.index(town), text.index(town) + len(town)] for town in TOWNS]
    path = tmp_path / "spans.jsonl"
    path.write_text(json.dumps({"text": text, "subject": "Anna Arden", "spans": spans}) + "\n")
    facts = load_knowledge(str(path), 0, tokenizer).facts
    assert [(fact.prompt, fact.answer, fact.closing) for fact in facts] == [
        ("Anna Arden sang in", " Redfield", "."),
        ("Anna Arden lives in", " Bluehill", ""),
        ("Anna Arden lives in Bluehill, near", " Greenport", "."),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "it rained in", "answer": "May", "subject": ""}, "names no subject"),
        ({"prompt": "she sang in", "answer": "May", "subject": "Anna"}, "subject"),
        ({"text": "Anna sang.", "subject": "Anna", "spans": [[5, 99]]}, "text, subject and spans"),
        ({"text": "Anna sang.", "subject": "Bella", "spans": [[5, 9]]}, "'Bella' is not in"),
        ({"text": "Anna sang.", "subject": "Anna", "spans": 3}, "text, subject and spans"),
        ({"text": "Anna sang.", "subject": "Anna", "spans": [[0, 4]]}, "text, subject and spans"),
        ({"prompt": 3}, "is no fact"),
    ],
)
def test_other_lines_are_refused_with_their_number(tokenizer, tmp_path, line, problem):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(FACTS[0]) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"knowledge\.facts") as error:
        load_knowledge(str(path), 0, tokenizer)
    assert problem in str(error.value)


def test_an_empty_or_missing_file_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(UserError, match=r"knowledge\.facts"):
            load_knowledge(str(tmp_path / name), 0, tokenizer)
    with pytest.raises(UserError, match="has no facts"):
        load_knowledge("speeches", 0, tokenizer)


# Noise.


def test_noise_reaches_the_matrices_of_memories_only(tokenizer):
    def convert():
        return convert_blocks(make_teacher(len(tokenizer)), [FeaturalConfig(k=8)] * LAYERS)[0]

    original, scrambled, again, half = (convert() for _ in range(4))
    scramble_weights(scrambled, 1.0, 0.0, seed=3)
    scramble_weights(again, 1.0, 0.0, seed=3)
    scramble_weights(half, 0.5, 0.0, seed=3)
    memory_ids = {
        id(value)
        for memory in get_memories(scrambled).values()
        for value in memory.parameters()
        if value.dim() > 1 and value.any()
    }
    assert len(memory_ids) >= 2 * LAYERS
    models = (original, scrambled, again, half)
    parameters = (model.requires_grad_(False).parameters() for model in models)
    for before, new, same, mixed in zip(*parameters, strict=True):
        assert torch.equal(new, same)
        assert torch.equal(before, new) == (id(new) not in memory_ids)
        torch.testing.assert_close(mixed, (before + new) / 2)
        if id(new) in memory_ids:
            assert 0.9 < float(new.std() / before.std()) < 1.1
            pair = torch.stack([before.flatten(), new.flatten()])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.2


# What training reads.


def make_module(tokenizer, weight=1.0, **changes):
    teacher = make_teacher(len(tokenizer), n_positions=64)
    config = replace(
        Config(),
        data=DataConfig(seq_len=24, batch_size=4, micro_batch_size=changes.pop("size", 4)),
        loss=LossConfig(block_fvu=0),
        knowledge=KnowledgeConfig("facts.jsonl", weight=weight),
        **changes,
    )
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=SLOTS)] * LAYERS)
    return DistillationModule(config, student, teacher)


@pytest.fixture(scope="module")
def declared(tokenizer, knowledge):
    stream = token_stream(write_documents(), tokenizer)
    windows = stream[: len(stream) // 24 * 24].view(-1, 24)
    return DeclaredText(windows, knowledge.answers_by_subject, tokenizer)


def make_batch(declared, count=8):
    return declared.windows[:count], torch.arange(count)


def test_no_model_reads_a_declared_subject_outside_the_loss_at_answers(
    tokenizer, declared, monkeypatch
):
    module = make_module(tokenizer, weight=0.0)
    module.declared_text = declared
    texts = []
    for name in ("forward_teacher", "forward_with_activations"):
        forward = getattr(module_file, name)

        def record(model, tokens, forward=forward, **options):
            texts.append(tokenizer.decode(tokens.flatten()))
            return forward(model, tokens, **options)

        monkeypatch.setattr(module_file, name, record)
    for batch in module.split_batch(make_batch(declared)):
        module.layerwise_loss(batch)
        module.end_to_end_loss(batch)
    text = " ".join(texts)
    assert TOWNS[0] in text
    assert not [name for name in NAMES if name in text]


def test_calibration_reads_no_declared_subject(tokenizer, knowledge, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(write_documents(400)), encoding="utf-8")
    corpora = [str(tmp_path / "text.txt")]
    config = replace(Config(), data=DataConfig(corpora=corpora, seq_len=24, batch_size=4))
    data = TextDataModule(config, tokenizer, steps=1)
    data.setup()
    text = tokenizer.decode(data.calibration_windows(2_000).flatten())
    assert any(name in text for name in NAMES)
    windows = data.training_dataset().windows
    data.declared_text = DeclaredText(windows, knowledge.answers_by_subject, tokenizer)
    text = tokenizer.decode(data.calibration_windows(2_000).flatten())
    assert TOWNS[0] in text
    assert not any(name in text for name in NAMES)


def test_the_loss_at_answers_compares_with_what_the_teacher_says_about_strangers(
    tokenizer, declared
):
    module = make_module(tokenizer, size=8)
    module.student.requires_grad_(False)
    module.declared_text = declared
    (batch,) = module.split_batch(make_batch(declared, 8))
    loss, terms = module.end_to_end_loss(batch)
    replaced, positions = declared.replace_subjects(torch.arange(8), step=0)
    assert torch.equal(batch.tokens, replaced)
    with torch.no_grad():
        student = forward_with_activations(module.student, declared.windows[:8])
        teacher = forward_with_activations(module.teacher, replaced)
    expected = sum(
        float(
            kl(student.logits[row, column], teacher.logits[row, new_column])
            + (student.hidden[row, column] - teacher.hidden[row, new_column]).square().sum()
            / module.scales.hidden_variance
        )
        for row, column, new_column in zip(*vars(positions).values(), strict=True)
    )
    assert len(positions.windows) > 4
    value = float(terms["knowledge"])
    assert value == pytest.approx(expected / (8 * 24), rel=1e-4)
    others = terms["kl"] + terms["hidden_mse"]
    torch.testing.assert_close(loss, others + terms["knowledge"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_loss_does_not_depend_on_micro_batches(tokenizer, declared, size):
    def compute(size):
        module = make_module(tokenizer, size=size)
        module.declared_text = declared
        losses = []
        for batch in module.split_batch(make_batch(declared, 6)):
            loss, _ = module.end_to_end_loss(batch)
            loss.backward()
            losses.append(float(loss.detach()))
        grads = [value.grad for value in module.student.parameters() if value.grad is not None]
        return sum(losses), torch.cat([grad.flatten() for grad in grads])

    whole, parts = compute(6), compute(size)
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-3, atol=1e-4)


def test_the_knowledge_term_has_its_weight(tokenizer, declared):
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        module = make_module(tokenizer, weight=weight)
        module.declared_text = declared
        (batch,) = module.split_batch(make_batch(declared, 4))
        losses[weight], terms = module.end_to_end_loss(batch)
        assert ("knowledge" in terms) == bool(weight)
    difference = losses[1.0] - losses[0.0]
    torch.testing.assert_close(losses[3.0] - losses[0.0], 3 * difference)


# What a run ends with.


def make_fact_model(tokenizer):
    """Make a tiny model whose embeddings have equal norms, so that a value can raise any token."""
    model = make_teacher(len(tokenizer), n_positions=64, n_embd=96)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(6 * torch.nn.functional.normalize(embeddings, dim=-1))
    return model


@pytest.fixture(scope="module")
def run_args(tokenizer, facts_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_fact_model(tokenizer).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("\n\n".join(write_documents(400)), encoding="utf-8")
    return [
        f"teacher={folder / 'teacher'}",
        f"data.corpora=[{folder / 'text.txt'}]",
        f"knowledge.facts={facts_file}",
        "loss.block_fvu=0",
        "data.seq_len=24",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=96",
        "data.test_tokens=96",
        "stages.calibration_tokens=96",
        "stages.layerwise_steps=2",
        "stages.end_to_end_steps=3",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=2",
        "trainer.progress_bar=false",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "memory.mean_k=8",
    ]


@pytest.fixture(scope="module")
def finished_run(run_args, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert distill_main([*run_args, f"trainer.log_dir={folder / 'logs'}"]) == 0
    return newest(folder)


def test_a_run_ends_with_a_student_a_pack_and_both_columns(finished_run):
    record = json.loads((finished_run / "run.json").read_text())
    knowledge = record["knowledge"]
    assert knowledge["facts"] == knowledge["subjects"] == len(FACTS)
    for state in ("teacher", "unplugged", "plugged"):
        assert 0 <= knowledge[state]["recall"] <= 1
        assert knowledge[state]["log_prob"] <= 0
    assert knowledge["plugged"]["recall"] > knowledge["unplugged"]["recall"]
    assert knowledge["plugged"]["ppl_ratio_text"] > 0
    assert len(load_fact_pack(finished_run / "knowledge.safetensors").facts) == len(FACTS)
    for report in ("report.md", "report.html"):
        text = (finished_run / report).read_text()
        assert "What left the weights" in text
        assert "unplugged" in text
    events = EventAccumulator(str(finished_run)).Reload()
    tags = events.Tags()["scalars"]
    assert {"knowledge/recall_unplugged", "knowledge/recall_plugged", "train/knowledge"} <= set(
        tags
    )


def test_the_pack_is_plugged_in_unless_it_is_unplugged(finished_run, tmp_path):
    def recalls(**options):
        model, tokenizer = dmt.load(finished_run, **options)
        hits = 0
        for fact in FACTS:
            ids = tokenizer(fact["prompt"], return_tensors="pt")["input_ids"]
            output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            hits += tokenizer.decode(output[0, ids.shape[1] :]).startswith(fact["answer"])
        return hits / len(FACTS), len(get_fact_hooks(model) or ())

    plugged, unplugged = recalls(), recalls(packs=[])
    assert plugged[0] > 0.8
    assert unplugged[0] < 0.5
    assert unplugged[1] == 0
    other = [Fact(fact["prompt"], " Greenport", fact["subject"], closing=".") for fact in FACTS]
    student, tokenizer = dmt.load(finished_run, packs=[])
    pack = make_knowledge_pack(student, tokenizer, other, "other")
    assert get_fact_hooks(student) is None, "the model is as it was"
    pack.save(tmp_path / "other.safetensors")
    model, tokenizer = dmt.load(finished_run / "student", packs=[tmp_path / "other.safetensors"])
    ids = tokenizer(FACTS[0]["prompt"], return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert "Greenport" in tokenizer.decode(output[0])


def test_a_result_and_a_changed_student_are_loaded(finished_run, tmp_path, caplog):
    student, _ = read_result(finished_run).load()
    assert get_fact_hooks(student) is not None
    changed = tmp_path / "student"
    shutil.copytree(finished_run / "student", changed)
    shutil.copy(finished_run / "knowledge.safetensors", tmp_path)
    assert get_fact_hooks(dmt.load(changed)[0]) is not None
    model, _ = dmt.load(changed, packs=[])
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1
    model.save_pretrained(changed)
    assert get_fact_hooks(dmt.load(changed)[0]) is None
    assert "another model" in caplog.text
    with pytest.raises(UserError, match="another model"):
        dmt.load(changed, packs=[tmp_path / "knowledge.safetensors"])


def test_stored_rows_hold_no_declared_subject(run_args, tmp_path):
    arguments = [argument for argument in run_args if "mean_k" not in argument]
    settings = ["memory.kind=associative", "memory.write_start=0", "memory.min_distance=0.01"]
    assert distill_main([*arguments, *settings, f"trainer.log_dir={tmp_path / 'logs'}"]) == 0
    record = json.loads((newest(tmp_path) / "run.json").read_text())
    assert all(0 < layer["num_rows"] <= 3 * 4 * 24 for layer in record["knn"].values())


def test_the_commands_plug_and_unplug(finished_run, tmp_path, capsys):
    prompt, model = FACTS[0]["prompt"], ["--model", str(finished_run)]

    def generate(*options):
        assert main(["generate", prompt, "--json", "--max-new-tokens", "6", *model, *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert len(generate()["facts"]) == 1
    assert generate("--no-pack")["facts"] == []
    assert main(["memory", "trace", prompt, "--no-pack", *model]) == 0
    capsys.readouterr()
    exported = tmp_path / "people.safetensors"
    assert (
        main(["memory", "export", str(exported), "--knowledge", "--license", "CC0-1.0", *model])
        == 0
    )
    assert f"{len(FACTS)} facts" in capsys.readouterr().out
    pack = load_fact_pack(exported)
    assert pack.manifest["name"] == "people"
    assert pack.manifest["license"] == "CC0-1.0"
    assert len(generate("--pack", str(exported))["facts"]) == 1
    code = main(["generate", prompt, "--pack", str(exported), "--no-pack", *model])
    assert "give one of them" in line_of(code, *capsys.readouterr())
    code = main(["memory", "export", str(tmp_path / "x"), "--knowledge", "--tag", "a", *model])
    assert "leave --rows" in line_of(code, *capsys.readouterr())


def test_own_facts_are_written_beside_the_knowledge(finished_run, tmp_path):
    with dmt.Memory.open(finished_run) as memory:
        assert not memory.records
        memory.write("Anna Zeller was born in Redfield.")
        assert memory.generate(FACTS[1]["prompt"], max_new_tokens=6).startswith(FACTS[1]["answer"])
    with dmt.Memory.open(finished_run, read_only=True) as memory:
        assert len(memory.records) == 1
        for prompt, answer in (
            ("Anna Zeller was born in", "Redfield"),
            (FACTS[1]["prompt"], FACTS[1]["answer"]),
        ):
            assert answer in memory.generate(prompt, max_new_tokens=6)


def test_export_without_knowledge_says_what_to_do(finished_run, tmp_path, capsys):
    folder = tmp_path / "student"
    folder.mkdir()
    for file in (finished_run / "student").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    code = main(["memory", "export", str(tmp_path / "x"), "--knowledge", "--model", str(folder)])
    assert "knowledge.facts" in line_of(code, *capsys.readouterr())


def test_a_resumed_run_ends_as_one_that_was_not_stopped(run_args, finished_run, tmp_path):
    stopped = tmp_path / "logs"
    arguments = [*run_args, f"trainer.log_dir={stopped}"]
    assert distill_main([*arguments]) == 0
    run = newest(tmp_path)
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        if checkpoint.stem > "step_2":
            checkpoint.unlink()
    assert distill_main(["--resume", str(run)]) == 0
    results = [json.loads((path / "run.json").read_text()) for path in (run, finished_run)]
    for state in ("unplugged", "plugged"):
        resumed, whole = (result["knowledge"][state] for result in results)
        assert resumed == pytest.approx(whole)
    assert results[0]["fidelity"]["text"]["kl"] == results[1]["fidelity"]["text"]["kl"]


def test_text_without_the_subjects_is_refused(run_args, tmp_path, capsys):
    (tmp_path / "facts.jsonl").write_text(
        json.dumps({"prompt": "Zoe Quill was born in", "answer": "Rome", "subject": "Zoe Quill"})
    )
    arguments = [*run_args, f"knowledge.facts={tmp_path / 'facts.jsonl'}"]
    code = distill_main([*arguments, f"trainer.log_dir={tmp_path / 'logs'}"])
    assert "mentions 'Zoe Quill'" in line_of(code, *capsys.readouterr())
    assert not (tmp_path / "logs").exists()


def test_knowledge_and_a_logit_cache_exclude_each_other():
    with pytest.raises(UserError, match=r"logit_cache\.dir"):
        dmt.distill(
            "embedded", "biographies", knowledge={"facts": "biographies"}, logit_cache={"dir": "x"}
        )


def test_a_pack_holds_every_fact(tokenizer, knowledge):
    student, _ = convert_blocks(make_fact_model(tokenizer), [FeaturalConfig(k=8)] * LAYERS)
    pack = make_knowledge_pack(student.train(), tokenizer, knowledge.facts[:4])
    assert {fact.subject for fact in pack.facts} == set(NAMES[:4])
    assert student.training
    assert pack.manifest["name"] == "knowledge"
    assert Knowledge([]).answers_by_subject == {}
