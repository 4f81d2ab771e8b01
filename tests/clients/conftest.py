"""Students and texts for the tests of clients: libraries that take transformers models.

Warnings of the clients are ignored, those of dmt stay errors.
"""

from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, make_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmt
from dmt.config import FeaturalConfig

LONG_POSITIONS = 64  # a sentence of the tiny tokenizer has 34 tokens


# Markers close to a test win, so these go in front of its own.
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings(r"error:::dmt\."), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)


@pytest.fixture
def long_teacher(tokenizer):
    """The tiny teacher, with room for a sentence."""
    return make_teacher(len(tokenizer), n_positions=LONG_POSITIONS)


@pytest.fixture
def student_folder(long_teacher, tokenizer, tmp_path):
    """A saved student with its tokenizer, whose padding is the end of text."""
    folder = tmp_path / "student"
    dmt.convert(long_teacher, FeaturalConfig(k=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def student(student_folder):
    return AutoModelForCausalLM.from_pretrained(student_folder)


@pytest.fixture
def student_tokenizer(student_folder):
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def measure_loss(student_tokenizer):
    """Return a function from a model to its mean loss on the sentences, in nats per token."""

    @torch.no_grad()
    def measure(model):
        losses = []
        for sentence in SENTENCES:
            ids = student_tokenizer(sentence, return_tensors="pt").input_ids
            losses.append(float(model.eval()(ids, labels=ids).loss))
        return sum(losses) / len(losses)

    return measure


@pytest.fixture
def assert_loads_again():
    """Return a function that compares a model with what its folder holds."""

    @torch.no_grad()
    def check(model, folder):
        ids = torch.arange(1, 20)[None]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)

    return check
