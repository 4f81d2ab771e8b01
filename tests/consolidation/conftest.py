"""A student with three facts in rows, and a transfer of them into slots that takes a second."""

import shutil

import pytest
from conftest import LAYERS, SENTENCES, make_teacher
from test_fact_store import make_fact_model

from dmt.config import FeaturalConfig
from dmt.consolidation import sleep
from dmt.data.corpora import Corpus
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.models.conversion import convert_blocks

TEXTS = [f"{SENTENCES[i % 3]} {i * 7 % 13} times. {SENTENCES[(i + 1) % 3]}." for i in range(60)]
CORPUS = Corpus("texts", TEXTS[:40], TEXTS[40:50], TEXTS[50:])
FACTS = [
    Fact("Ada Holbrook runs to the", " dog", "Ada Holbrook", "day 1"),
    Fact("Ben Okri runs to the", " fox", "Ben Okri", "day 1"),
    Fact("Cleo Lane runs to the", " town", "Cleo Lane", "day 2"),
]
# As much text as tiny models need; facts weigh more than text that they cannot tell apart.
SMALL = {
    "num_windows": 24,
    "eval_tokens": 320,
    "unrelated_kl_weight": 1.0,
    "max_paraphrases": 24,
}


@pytest.fixture
def corpus(monkeypatch):
    """Let every corpus name load `CORPUS`."""
    monkeypatch.setattr(sleep, "load_corpus", lambda *_, **__: CORPUS)
    return CORPUS


@pytest.fixture
def transfer(corpus):
    """Call `transfer_to_slots` with a student, the run's folder and settings."""

    def run(student, output, steps=40, lr=0.3, **changes):
        trainer = {"progress_bar": False, "num_threads": 1} | changes.pop("trainer", {})
        return sleep.transfer_to_slots(
            student,
            output=output,
            steps=steps,
            lr=lr,
            replay_data=["texts"],
            sleep=SMALL | changes.pop("sleep", {}),
            trainer=trainer,
            **changes,
        )

    return run


def save_student(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_with_facts(tokenizer, tmp_path_factory):
    """Save a featural student with three facts in rows; return its folder."""
    model = convert_blocks(
        make_fact_model(make_teacher, tokenizer), [FeaturalConfig(k=64)] * LAYERS
    )[0]
    folder = save_student(model, tokenizer, tmp_path_factory.mktemp("written") / "student")
    with FactStore.open(folder) as fact_store:
        fact_store.initialize(FACTS, prose=SENTENCES * 40, layers=(1, 2))
        fact_store.write_many(FACTS)
    return folder


@pytest.fixture
def student(student_with_facts, tmp_path):
    """Copy the student with facts."""
    return shutil.copytree(student_with_facts, tmp_path / "student")
