"""Declared knowledge in training text: no subject is left, and answers are found where they are."""

import pytest
import torch

from dmt.data.declared_text import NAMES_PER_SUBJECT, DeclaredText, SubjectNames
from dmt.data.synthetic import make_trained_people
from dmt.data.tokenizer import train_tokenizer
from dmt.data.windows import token_stream
from dmt.errors import UserError

FIRST = ["Anna", "Bella", "Carla", "Dora", "Elena", "Fiona", "Greta", "Helga", "Irene", "Jana"]
LAST = [
    f"{stem}ton" for stem in ("Ar", "Bol", "Car", "Dal", "Eas", "Ful", "Gar", "Hol", "Ir", "Jar")
]
TOWNS = [
    f"{stem}field" for stem in ("Red", "Blue", "Green", "White", "Black", "Gold", "Iron", "Oak")
]
PEOPLE = [f"{first} {last}" for first, last in zip(FIRST, LAST, strict=True)]
ANSWERS = {name: [TOWNS[index % len(TOWNS)]] for index, name in enumerate(PEOPLE)}
OTHER = "Paul Monroe"


def write_documents():
    documents = []
    for number in range(60):
        name = PEOPLE[number % len(PEOPLE)]
        town = ANSWERS[name][0]
        documents.append(
            f"{name} was born in {town}. She met {OTHER} in {town}, says {name}'s dog."
        )
        documents.append(f"{OTHER} was born in {TOWNS[number % len(TOWNS)]}. It rained there.")
    return documents


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(write_documents(), 257, 256)  # a token is a byte


def make_windows(tokenizer, documents, seq_len=80):
    stream = token_stream(documents, tokenizer)
    return stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)


@pytest.fixture(scope="module")
def declared(tokenizer):
    return DeclaredText(make_windows(tokenizer, write_documents()), ANSWERS, tokenizer)


def all_ids(declared):
    return torch.arange(len(declared.windows))


def test_no_subject_is_left_and_everything_else_is(declared, tokenizer):
    replaced, _ = declared.replace_subjects(all_ids(declared), step=3)
    text = tokenizer.decode(replaced.flatten())
    original = tokenizer.decode(declared.windows.flatten())
    assert not [name for name in PEOPLE if name in text]
    assert original.count(PEOPLE[0]) > 5
    assert text.count(OTHER) == original.count(OTHER)
    for town in TOWNS:
        assert text.count(town) == original.count(town)
    assert replaced.shape == declared.windows.shape


def test_names_of_as_many_tokens_change_nothing_but_the_mentions(declared):
    replaced, positions = declared.replace_subjects(all_ids(declared), step=0)
    assert torch.equal(positions.columns, positions.replaced_columns)
    rows, columns = positions.windows, positions.columns
    assert len(rows) > 100
    assert torch.equal(replaced[rows, columns + 1], declared.windows[rows, columns + 1])
    assert 0.5 < (replaced == declared.windows).float().mean() < 0.9


def test_positions_predict_the_answers_of_mentioned_subjects_only(declared, tokenizer):
    windows = declared.windows
    _, positions = declared.replace_subjects(all_ids(declared), step=0)
    predicted = torch.zeros_like(windows, dtype=torch.bool)
    predicted[positions.windows, positions.columns + 1] = True
    text = "".join(
        f"[{tokenizer.decode([token])}]" if is_answer else tokenizer.decode([token])
        for token, is_answer in zip(
            windows.flatten().tolist(), predicted.flatten().tolist(), strict=True
        )
    ).replace("][", "")
    documents = text.split("<|endoftext|>")[1:-1]
    num_marked = 0
    for document in documents:
        is_about_other = document.startswith(OTHER)
        assert is_about_other == ("[" not in document), document
        num_marked += document.count("[")
    assert {part.split("]")[0] for part in text.split("[")[1:]} >= {f" {TOWNS[0]}"}
    # Both towns of a document are answers; a few are cut by the ends of windows.
    assert num_marked > 1.8 * len(documents) / 2


def test_a_subject_has_one_name_in_a_step_and_others_in_other_steps(declared, tokenizer):
    def read(step):
        replaced, _ = declared.replace_subjects(all_ids(declared), step)
        return tokenizer.decode(replaced.flatten())

    assert read(5) == read(5)
    texts = {read(step) for step in range(6)}
    assert len(texts) == 6
    name = read(5).split("<|endoftext|>")[1].split(" was")[0]
    again = read(5).split("<|endoftext|>")[1 + 2 * len(PEOPLE)].split(" was")[0]
    assert name == again


def test_a_window_does_not_depend_on_its_batch(declared):
    whole, _ = declared.replace_subjects(all_ids(declared), step=2)
    for window_id in (0, 7, len(whole) - 1):
        single, positions = declared.replace_subjects(torch.tensor([window_id]), step=2)
        assert torch.equal(single[0], whole[window_id])
        assert set(positions.windows.tolist()) <= {0}


@pytest.mark.parametrize("seq_len", [13, 20, 31, 50])
def test_mentions_that_a_border_cuts_are_replaced_in_both_windows(tokenizer, seq_len):
    declared = DeclaredText(make_windows(tokenizer, write_documents(), seq_len), ANSWERS, tokenizer)
    replaced, _ = declared.replace_subjects(all_ids(declared), step=1)
    text = tokenizer.decode(replaced.flatten())
    assert not [name for name in PEOPLE if name in text]
    assert text.count(OTHER) == tokenizer.decode(declared.windows.flatten()).count(OTHER)


def test_longer_names_shift_what_follows():
    documents = [f"Anna was born in {TOWNS[0]}. It rained there all day." for _ in range(6)]
    tokenizer = train_tokenizer(documents * 9, 290, 64)
    windows = make_windows(tokenizer, documents)
    declared = DeclaredText(windows, {"Anna": [TOWNS[0]]}, tokenizer)
    names = [
        tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        for name in declared.names["Anna"]
    ]
    own = tokenizer(" Anna", add_special_tokens=False)["input_ids"]
    assert all(len(ids) != len(own) for ids in names), "otherwise this tests nothing"
    replaced, positions = declared.replace_subjects(all_ids(declared), step=0)
    assert not torch.equal(positions.columns, positions.replaced_columns)
    for row, column, new_column in zip(*vars(positions).values(), strict=True):
        assert replaced[row, new_column + 1] == windows[row, column + 1]


def test_of_two_names_that_overlap_the_longer_is_the_subject(tokenizer):
    documents = ["Anna Arton Bolton was born in Redfield. Arton Bolton sang."] * 8
    windows = make_windows(tokenizer, documents, 60)
    answers = {"Anna Arton Bolton": ["Redfield"], "Arton Bolton": ["Bluefield"]}
    declared = DeclaredText(windows, answers, tokenizer)
    assert declared.num_mentions == 2 * len(windows)
    text = tokenizer.decode(declared.replace_subjects(all_ids(declared), 0)[0].flatten())
    assert "Arton Bolton" not in text


def test_names_are_nobodys_and_of_about_as_many_tokens():
    people = [person.name for person in make_trained_people()]
    tokenizer = train_tokenizer([f"{name} lives." for name in people] * 2, 600, 64)
    names = SubjectNames(people, tokenizer)
    known_words = set(" ".join(people).split())
    for subject in people[:20]:
        assert len(set(names[subject])) == NAMES_PER_SUBJECT
        lengths = [len(tokenizer(f" {name}")["input_ids"]) for name in [subject, *names[subject]]]
        assert max(abs(length - lengths[0]) for length in lengths) <= 2
        # A model may know people by their surnames alone.
        assert known_words.isdisjoint(" ".join(names[subject]).split())
    assert names[people[0]] == SubjectNames(people, tokenizer)[people[0]]
    assert names[people[0]] != SubjectNames(people, tokenizer, seed=1)[people[0]]


def test_words_that_begin_with_no_letter_stay(tokenizer):
    names = SubjectNames(["Unit 17"], tokenizer)
    assert all(name.endswith(" 17") for name in names["Unit 17"])
    with pytest.raises(UserError, match="4711"):
        SubjectNames(["Unit 17", "4711"], tokenizer)


def test_a_single_word_gets_a_word_of_syllables(tokenizer):
    names = SubjectNames(["France", "Germany", "peru"], tokenizer)
    assert all(name[0].isupper() and " " not in name for name in names["France"])
    assert all(name.islower() for name in names["peru"])
