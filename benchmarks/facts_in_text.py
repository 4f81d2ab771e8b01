"""Facts in ordinary text: is the right subject meant, wherever and however it is asked about?

    python benchmarks/facts_in_text.py [--model embedded | smollm2] [--facts 60] [--seed 0]
                                       [--parts subject,prose,place,phrasings,answers,conflicts]
                                       [--prose-mb 0.1] [--failures 3] [--threads 1]

Facts about people with unusual names (`fact_texts.NAME_PARTS`) are written in phrasings of the
teacher's training text, two relations of each person. A wrong answer counts where the fact's
complete answer follows the text and does not follow it in the model without facts.

subject: other people in the text, names within names, relatives, negation, relations not stored.
prose: tokens at which a row fires in prose full of the names; `--prose-mb 2` reads two megabytes.
place: recall at the start of a text and elsewhere, as written and in two other phrasings.
phrasings: recall in phrasings of no training text.
answers: long answers and odd ones, generated to the end.
conflicts: contradictions in other words, and forgetting one of two people with one first name.

`--failures N` lists N failing texts of each row and counts failures by the shape of the text.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from editing import make_stored_fact, open_fact_store
from fact_texts import (
    ANSWER_PROMPTS,
    MARKED_ANSWERS,
    NEW_PHRASINGS,
    UNSTORED_QUESTIONS,
    Case,
    Subject,
    begins_with_name,
    fill_phrasing,
    list_held_out_phrasings,
    list_trained_phrasings,
    make_chat_turns,
    make_clause_cases,
    make_fact,
    make_longer_names,
    make_negation_cases,
    make_pair_cases,
    make_related_names,
    make_relative_cases,
    make_subjects,
    split_sentences,
    substitute_names,
)
from torch import Tensor

from dmt.data.corpora import Probe, load_corpus
from dmt.data.synthetic import RELATIONS
from dmt.editing.edit import WriteResult
from dmt.editing.fact_store import FactStore
from dmt.errors import UserError
from dmt.evaluation.questions import score_answers
from dmt.models.fact_hooks import record_matches
from dmt.models.forward import encode_text, forward_with_prefix, get_prefix_ids
from dmt.models.generation import generate_text
from dmt.models.loading import load_teacher
from dmt.training.trainer import silence_libraries

FACTS_PER_SUBJECT = 2
UNSTORED_PER_SUBJECT = 8  # questions about relations that nobody stored
PHRASINGS_PER_RELATION = 2  # in which each relation that is not stored is asked
MAX_SENTENCE_CHARS = 70  # of other text before a question, so that ten sentences leave room
PAD_BATCH_SIZE = 8
LONG_ANSWERS = (30, 100, 200)  # tokens
MAX_LONG_FACTS = 20  # facts of each length
# Shares that are aimed at, by model.
TARGETS = {
    "embedded": {"written": 0.98, "other words": 0.95, "conflict": 0.95},
    "smollm2": {"written": 0.95, "other words": 0.85, "conflict": 0.8},
}


@dataclass
class Bench:
    """A model with facts, the same without, and the options of a measurement.

    Attributes:
        name: of the model.
        model: the facts are attached to it.
        original: the same model without facts.
        tokenizer: of both.
        fact_store: the facts.
        rng: draws shapes, pairs and phrasings.
        num_failures: failing texts that are listed of each row.
        failures: lines about failures.
    """

    name: str
    model: Any
    original: Any
    tokenizer: Any
    fact_store: FactStore
    rng: random.Random
    num_failures: int
    failures: list[str] = field(default_factory=list)

    @property
    def targets(self) -> dict[str, float]:
        """The shares that are aimed at."""
        return TARGETS[self.name]

    @property
    def max_tokens(self) -> int:
        """Number of positions of the model."""
        return int(self.model.config.max_position_embeddings)

    def print_row(
        self, part: str, quantity: str, outcomes: Sequence[bool], target: str, cases: Sequence[Case]
    ) -> None:
        """Print the share of outcomes that are true, beside its target.

        Args:
            part: of the measurement.
            quantity: what is measured.
            outcomes: of each case.
            target: `<=` or `>=` and a share.
            cases: what failed is listed of them.
        """
        num_true, is_upper = sum(outcomes), target.startswith("<=")
        self.print_share(part, quantity, num_true, len(outcomes), target)
        failed = [
            case for case, outcome in zip(cases, outcomes, strict=True) if outcome == is_upper
        ]
        if failed and self.num_failures:
            totals = Counter(case.shape for case in cases)
            shapes = Counter(case.shape for case in failed)
            self.failures.append(f"\n{part}, {quantity}: {len(failed)} of {len(cases)} fail")
            self.failures += [
                f"  {failures} of {totals[shape]}: {shape!r}"
                for shape, failures in shapes.most_common(12)
            ]
            sample = random.Random(0).sample(failed, min(len(failed), self.num_failures))
            self.failures += [f"  {case.prompt!r} + {case.answer!r}" for case in sample]

    @staticmethod
    def print_share(
        part: str, quantity: str, numerator: int, denominator: int, target: str
    ) -> None:
        """Print a row of the table."""
        share = numerator / denominator if denominator else float("nan")
        comparison, _, limit = target.partition(" ")
        meets = share <= float(limit) if comparison == "<=" else share >= float(limit)
        cells = (part, quantity, f"{numerator:,} / {denominator:,}", f"{share:.4f}", target)
        print(f"| {' | '.join(cells)} | {'yes' if meets else 'no'} |", flush=True)

    def answer(
        self, cases: Sequence[Case | Probe], model: Any = None, has_start: bool = True
    ) -> list[bool]:
        """Return for each case whether its complete answer is generated greedily.

        Args:
            cases: texts and answers.
            model: answers; the one with facts where it is None.
            has_start: whether the start token precedes the text.
        """
        model = self.model if model is None else model
        prefix = get_prefix_ids(self.tokenizer) if has_start else []
        predict = partial(forward_with_prefix, model, prefix)
        questions: Any = cases
        device = next(model.parameters()).device
        return score_answers(predict, self.tokenizer, questions, device).correct

    def print_recall(
        self, part: str, quantity: str, cases: Sequence[Case], share: float, has_start: bool = True
    ) -> None:
        """Print the share of cases whose answer is generated."""
        outcomes = self.answer(cases, has_start=has_start)
        self.print_row(part, quantity, outcomes, f">= {share:g}", cases)

    def print_wrong(
        self, part: str, quantity: str, cases: Sequence[Case], share: float = 0.01
    ) -> None:
        """Print the share of cases whose answer, which is wrong, the facts cause."""
        outcomes = [
            with_facts and not without
            for with_facts, without in zip(
                self.answer(cases), self.answer(cases, self.original), strict=True
            )
        ]
        self.print_row(part, quantity, outcomes, f"<= {share:g}", cases)

    def write(self, facts: Iterable[Probe]) -> tuple[list[Probe], list[WriteResult]]:
        """Write facts one by one; return those that can be written, with the results."""
        written: list[Probe] = []
        results: list[WriteResult] = []
        for fact in facts:
            try:
                results += self.fact_store.write_many([make_stored_fact(fact)])
            except UserError as error:
                self.failures.append(f"not written: {error}")
            else:
                written.append(fact)
        return written, results

    def forget_all(self) -> None:
        """Delete all facts."""
        self.fact_store.delete(list(self.fact_store.records))


@dataclass(frozen=True)
class WrittenFact:
    """A fact of the main set.

    Attributes:
        subject: whom it is about.
        relation: what it states.
        phrasing: in which it is written.
        probe: prompt and answer.
    """

    subject: Subject
    relation: str
    phrasing: str
    probe: Probe

    def ask(self, phrasing: str, shape: str = "") -> Case:
        """Ask for the fact in a phrasing."""
        prompt = fill_phrasing(phrasing, self.subject.name)
        return Case(prompt, self.probe.answer, self.subject.name, shape or phrasing)

    def draw_statement(self, rng: random.Random) -> str:
        """Draw a trained phrasing that begins with the name: its own where it does."""
        if begins_with_name(self.phrasing):
            return self.phrasing
        return rng.choice([*filter(begins_with_name, list_trained_phrasings(self.relation))])

    def restate(self, answer: str, phrasing: str = "", name: str = "") -> Probe:
        """State another answer, in another phrasing or of another name where they are given."""
        subject = replace(
            self.subject, name=name or self.subject.name, answers={self.relation: answer}
        )
        return make_fact(subject, self.relation, phrasing or self.phrasing)

    def list_other_phrasings(self) -> list[str]:
        """List the trained phrasings in which it is not written."""
        return [
            phrasing
            for phrasing in list_trained_phrasings(self.relation)
            if phrasing != self.phrasing
        ]


def draw_facts(subjects: Sequence[Subject], rng: random.Random) -> list[WrittenFact]:
    """Draw the relations and phrasings in which facts about subjects are written."""
    facts = []
    for index, subject in enumerate(subjects):
        relations = list(subject.answers)
        for number in range(FACTS_PER_SUBJECT * index, FACTS_PER_SUBJECT * (index + 1)):
            relation = relations[number % len(relations)]
            phrasing = rng.choice(list_trained_phrasings(relation))
            probe = make_fact(subject, relation, phrasing)
            facts.append(WrittenFact(subject, relation, phrasing, probe))
    return facts


def measure_subject(
    bench: Bench, facts: Sequence[WrittenFact], strangers: Sequence[Subject]
) -> None:
    """Measure whether facts answer for the wrong subject, or for what is not stored."""
    rng = bench.rng
    relations_by_name: dict[str, set[str]] = {}
    for fact in facts:
        relations_by_name.setdefault(fact.subject.name, set()).add(fact.relation)
    wrong: dict[str, list[Case]] = {}
    right: dict[str, list[Case]] = {}
    for fact in facts:
        name, answer = fact.subject.name, fact.probe.answer
        # Other people by what is stored about them.
        others = {
            "unknown": [stranger.name for stranger in strangers],
            "known by another relation": [
                other
                for other, relations in relations_by_name.items()
                if fact.relation not in relations
            ],
            "known by the same relation": [
                other.subject.name
                for other in facts
                if other.relation == fact.relation and other.probe.answer != answer
            ],
        }
        phrasing = rng.choice((fact.phrasing, *fact.list_other_phrasings()))
        statement = fact.draw_statement(rng)
        for sort, names in others.items():
            for other in rng.sample(names, min(1, len(names))):
                wrong.setdefault(sort, []).extend(
                    make_pair_cases(other, name, phrasing, statement, answer)
                )
                right.setdefault(sort, []).extend(
                    make_pair_cases(name, other, fact.phrasing, statement, answer)
                )
    for sort, cases in wrong.items():
        bench.print_wrong("subject", f"two people, one {sort} asked", cases)
    for sort, cases in right.items():
        quantity = f"two people, the other {sort}: recall"
        bench.print_recall("subject", quantity, cases, bench.targets["other words"])
    for label, make_other_names in (
        ("a longer name that contains a known one", make_longer_names),
        ("the same first or last name", make_related_names),
    ):
        cases = [
            Case(fill_phrasing(phrasing, name), fact.probe.answer, name, phrasing)
            for fact in facts
            for name in make_other_names(fact.subject.name, fact.subject.kind)
            if name not in relations_by_name
            for phrasing in (fact.phrasing, rng.choice(fact.list_other_phrasings()))
        ]
        bench.print_wrong("subject", label, cases)
    cases = [
        case
        for fact in facts
        for phrasing in (fact.phrasing, rng.choice(fact.list_other_phrasings()))
        for case in make_relative_cases(fact.probe, phrasing)
    ]
    bench.print_wrong("subject", "relatives and possessives", cases, 0.05)
    cases = [case for fact in facts for case in make_negation_cases(fact.probe)]
    bench.print_wrong("subject", "negation", cases, 0.05)
    cases = [case for fact in facts for case in make_clause_cases(fact.probe)]
    bench.print_wrong("subject", "relative clauses", cases, 0.05)
    measure_unasked(bench, facts)


def measure_unasked(bench: Bench, facts: Sequence[WrittenFact]) -> None:
    """Measure how often a question about another relation gets a fact's answer."""
    rng = bench.rng
    by_name: dict[str, list[WrittenFact]] = {}
    for fact in facts:
        by_name.setdefault(fact.subject.name, []).append(fact)
    unwritten, unstored = [], []
    for subject_facts in by_name.values():
        written = {fact.relation for fact in subject_facts}
        for fact in subject_facts:
            for relation in fact.subject.answers:
                phrasings = list_trained_phrasings(relation) + list_held_out_phrasings(relation)
                if relation not in written:
                    unwritten += [
                        fact.ask(phrasing)
                        for phrasing in rng.sample(phrasings, PHRASINGS_PER_RELATION)
                    ]
            unstored += [
                fact.ask(phrasing)
                for phrasing in rng.sample(UNSTORED_QUESTIONS, UNSTORED_PER_SUBJECT)
            ]
    bench.print_wrong("subject", "a relation stored of others", unwritten)
    bench.print_wrong("subject", "a relation stored of nobody", unstored)


def load_prose(num_chars: int) -> list[str]:
    """Return `num_chars` characters of prose: speeches, and the manual of Python."""
    corpus = load_corpus("speeches")
    sources: list[str] = [*corpus.test, *corpus.validation, *pydoc_data.topics.topics.values()]
    random.Random(0).shuffle(sources)
    documents: list[str] = []
    for source in sources:
        remaining = num_chars - sum(map(len, documents))
        documents.append(source[: min(remaining, num_chars // 40)])  # of 40 sources at least
    return documents


@torch.no_grad()
def measure_prose(bench: Bench, facts: Sequence[WrittenFact], num_chars: int) -> None:
    """Count the tokens of prose full of the names at which a row fires."""
    names = sorted({fact.subject.name for fact in facts})
    text = [
        substitute_names(document, names, random.Random(index))
        for index, document in enumerate(load_prose(num_chars))
    ]
    num_tokens, num_fired = 0, 0
    for document in text:
        ids = encode_text(bench.tokenizer, document)
        for start in range(0, len(ids), bench.max_tokens):
            window = torch.tensor([ids[start : start + bench.max_tokens]])
            with record_matches(bench.model) as recorded:
                bench.model(input_ids=window)
            num_tokens += window.numel()
            num_fired += sum(len(matches.tokens) for matches in recorded)
    num_mentions = sum(document.count(name) for document in text for name in names)
    quantity = f"tokens at which a row fires, {num_mentions:,} mentions"
    bench.print_share("prose", quantity, num_fired, num_tokens, "<= 0.001")


def list_places(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Yield the names of places in a text, and functions that put a case there."""
    sentences = split_sentences(load_corpus("speeches").test, MAX_SENTENCE_CHARS)
    yield "at the start", lambda case: case
    for num_sentences in (1, 3, 10):

        def precede(case: Case, num_sentences: int = num_sentences) -> Case:
            context = bench.rng.sample(sentences, num_sentences)
            while True:
                moved = replace(case, prompt=" ".join([*context, case.prompt]))
                text = moved.prompt + moved.answer
                if not context or len(encode_text(bench.tokenizer, text)) <= bench.max_tokens:
                    return moved
                context.pop()  # a long name leaves less room

        yield f"after {num_sentences} sentence{'s' * (num_sentences > 1)}", precede
    yield "after 'Question: '", lambda case: replace(case, prompt=f"Question: {case.prompt}")
    yield "in a chat", partial(put_into_chat, bench)


def put_into_chat(bench: Bench, case: Case) -> Case:
    """Ask as a user in the tokenizer's chat template, or in a plain one."""
    question, beginning = make_chat_turns(case.prompt, case.asked)
    if bench.tokenizer.chat_template:
        head = bench.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return replace(case, prompt=f"{head}{beginning}")
    return replace(case, prompt=f"User: {question}\nAssistant: {beginning}")


def measure_place(bench: Bench, facts: Sequence[WrittenFact]) -> None:
    """Measure recall as written and in two other phrasings, at places in a text."""
    rng = bench.rng
    written = [fact.ask(fact.phrasing) for fact in facts]
    others = [
        fact.ask(phrasing)
        for fact in facts
        for phrasing in rng.sample(fact.list_other_phrasings(), 2)
    ]
    groups = (("as written", written, "written"), ("two other phrasings", others, "other words"))
    for label, cases, target in groups:
        share = bench.targets[target]
        for place, put in list_places(bench):
            moved = [put(case) for case in cases]
            # A chat template brings its own start token.
            has_start = not (place == "in a chat" and bench.tokenizer.chat_template)
            bench.print_recall("place", f"{place}, {label}", moved, share, has_start)
        bench.print_recall("place", f"without start token, {label}", cases, share, False)
        outcomes = generate_padded(bench, cases)
        quantity = f"in a batch with padding, {label}"
        bench.print_row("place", quantity, outcomes, f">= {share:g}", cases)


def generate_padded(bench: Bench, cases: Sequence[Case]) -> list[bool]:
    """Generate answers in batches that are padded on the left."""
    outcomes: list[bool] = []
    for start in range(0, len(cases), PAD_BATCH_SIZE):
        batch = cases[start : start + PAD_BATCH_SIZE]
        prompts = [encode_text(bench.tokenizer, case.prompt) for case in batch]
        answers = [encode_text(bench.tokenizer, case.answer, add_prefix=False) for case in batch]
        length = max(map(len, prompts))
        padding = [length - len(prompt) for prompt in prompts]
        pad_id = bench.tokenizer.eos_token_id or 0
        tokens = torch.tensor(
            [[pad_id] * num + prompt for num, prompt in zip(padding, prompts, strict=True)]
        )
        mask = (torch.arange(length) >= torch.tensor(padding).unsqueeze(1)).long()
        generated: Tensor = bench.model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            pad_token_id=pad_id,
        )
        outcomes += [
            row[length : length + len(answer)].tolist() == answer
            for row, answer in zip(generated, answers, strict=True)
        ]
    return outcomes


def measure_phrasings(bench: Bench, facts: Sequence[WrittenFact]) -> None:
    """Measure recall in phrasings that nobody trained."""
    held_out = [
        fact.ask(phrasing) for fact in facts for phrasing in list_held_out_phrasings(fact.relation)
    ]
    new = [fact.ask(phrasing) for fact in facts for phrasing in NEW_PHRASINGS[fact.relation]]
    bench.print_recall("phrasings", "the two held-out phrasings", held_out, 0.85)
    bench.print_recall("phrasings", "new phrasings", new, 0.85)
    for relation in RELATIONS:
        cases = [
            fact.ask(phrasing)
            for fact in facts
            if fact.relation == relation
            for phrasing in NEW_PHRASINGS[relation]
        ]
        bench.print_recall("phrasings", f"new phrasings, {relation}", cases, 0.85)


def make_long_answer(bench: Bench, num_tokens: int) -> str:
    """Cut prose that is `num_tokens` tokens long as an answer."""
    text = " ".join(load_corpus("speeches").validation[0].split())
    words = text[bench.rng.randrange(len(text) // 2) :].split()[1:]
    answer = ""
    for word in words:
        longer = f"{answer} {word}"
        if len(encode_text(bench.tokenizer, longer, add_prefix=False)) > num_tokens:
            return answer
        answer = longer
    return answer


def measure_answers(bench: Bench, subjects: Sequence[Subject]) -> None:
    """Measure whether long and odd answers are generated to the end."""
    groups: dict[str, list[str]] = {
        f"about {num_tokens} tokens": [
            make_long_answer(bench, num_tokens) for _ in subjects[:MAX_LONG_FACTS]
        ]
        for num_tokens in LONG_ANSWERS
    }
    groups |= {label: list(answers) * 3 for label, answers in MARKED_ANSWERS.items()}
    for label, answers in groups.items():
        facts = [
            Probe(fill_phrasing(ANSWER_PROMPTS[0], subject.name), answer, subject.name, "note", 0)
            for subject, answer in zip(subjects, answers, strict=False)
        ]
        written, _ = bench.write(facts)
        names = {fact.person for fact in written}
        cases = [Case(fact.prompt, fact.answer, fact.person, label) for fact in facts]
        outcomes = [
            case.asked in names and generate_answer(bench, case) == case.answer for case in cases
        ]
        share = bench.targets["written"]
        bench.print_row("answers", f"{label}, to the end", outcomes, f">= {share:g}", cases)
        bench.forget_all()


def generate_answer(bench: Bench, case: Case) -> str:
    """Generate as much text as the answer has."""
    num_tokens = len(encode_text(bench.tokenizer, case.answer, add_prefix=False))
    return generate_text(bench.model, bench.tokenizer, case.prompt, num_tokens)


def measure_conflicts(bench: Bench, subjects: Sequence[Subject]) -> None:
    """Measure which contradictions are noticed, and what forgetting does to others."""
    facts = draw_facts(subjects, bench.rng)
    draw_phrasing: dict[str, Any] = {
        "another trained phrasing": lambda fact: fact.list_other_phrasings(),
        "a held-out phrasing": lambda fact: list_held_out_phrasings(fact.relation),
        "a new phrasing": lambda fact: NEW_PHRASINGS[fact.relation],
    }
    for label, list_phrasings in draw_phrasing.items():
        written, results = bench.write(fact.probe for fact in facts)
        ids = {fact: result.id for fact, result in zip(written, results, strict=True)}
        outcomes, cases = [], []
        for fact in facts:
            answer = draw_other_answer(fact, facts, bench.rng)
            probe = fact.restate(answer, bench.rng.choice(list_phrasings(fact)))
            _, results = bench.write([probe])
            replaced = [result.replaced_fact for result in results if result.replaced_fact]
            outcomes.append(any(record.id == ids.get(fact.probe) for record in replaced))
            cases.append(Case(probe.prompt, answer, fact.subject.name, fact.relation))
        target = f">= {bench.targets['conflict']:g}"
        bench.print_row("conflicts", f"contradiction in {label}: noticed", outcomes, target, cases)
        bench.forget_all()
    measure_alarms(bench, subjects, facts)
    measure_forgetting(bench, facts)


def draw_other_answer(fact: WrittenFact, facts: Sequence[WrittenFact], rng: random.Random) -> str:
    """Draw the answer of another fact in the same relation that is not the fact's own."""
    answers = {other.probe.answer for other in facts if other.relation == fact.relation}
    return rng.choice(sorted(answers - {fact.probe.answer}) or [" something else"])


def measure_alarms(bench: Bench, subjects: Sequence[Subject], facts: Sequence[WrittenFact]) -> None:
    """Count facts that are taken for contradictions of facts about something or somebody else."""
    rng = bench.rng
    stored = {(fact.subject.name, fact.relation) for fact in facts}
    other_relations = [
        make_fact(subject, relation, rng.choice(NEW_PHRASINGS[relation]))
        for subject in subjects
        for relation in subject.answers
        if (subject.name, relation) not in stored
    ]
    other_names = [
        fact.restate(draw_other_answer(fact, facts, rng), name=name)
        for fact in facts
        for make_other_names in (make_related_names, make_longer_names)
        for name in make_other_names(fact.subject.name, fact.subject.kind)[:1]
    ]
    # The same other name may be made of two names; one fact of it contradicts the other.
    probes = {(probe.person, probe.relation): probe for probe in (*other_names, *other_relations)}
    distinct = [probe for key, probe in probes.items() if key not in stored]
    written, results = bench.write([*(fact.probe for fact in facts), *distinct])
    outcomes = [result.status != "written" for result in results]
    cases = [Case(probe.prompt, probe.answer, probe.person, probe.relation) for probe in written]
    quantity = "false alarms: another relation or person"
    bench.print_row("conflicts", quantity, outcomes, "<= 0.01", cases)
    bench.forget_all()


def measure_forgetting(bench: Bench, facts: Sequence[WrittenFact]) -> None:
    """Forget one of two people with the same first name, and ask about both."""
    by_name = {
        (names[0], fact.relation): fact
        for fact in facts
        if (names := make_related_names(fact.subject.name, fact.subject.kind))
    }
    namesakes = [
        (fact, fact.restate(draw_other_answer(fact, facts, bench.rng), name=name))
        for (name, _), fact in by_name.items()
    ]
    _, results = bench.write(fact.probe for fact, _ in namesakes)
    bench.write(namesake for _, namesake in namesakes)
    bench.fact_store.delete(
        [result.id for result in results if result.id in bench.fact_store.records]
    )
    of_namesake, own, remembered = [], [], []
    for fact, namesake in namesakes:
        name = fact.subject.name
        for phrasing in (fact.phrasing, bench.rng.choice(fact.list_other_phrasings())):
            question = fill_phrasing(phrasing, name)
            text = f"{namesake.person} knows {name}. {question}"
            of_namesake.append(Case(question, namesake.answer, name, "alone"))
            of_namesake.append(Case(text, namesake.answer, name, "beside the namesake"))
            own.append(Case(question, fact.probe.answer, name, phrasing))
        remembered.append(Case(namesake.prompt, namesake.answer, namesake.person, fact.phrasing))
    bench.print_wrong("conflicts", "forgotten: the namesake's answer", of_namesake)
    bench.print_wrong("conflicts", "forgotten: its own answer", own, 0.0)
    share = bench.targets["written"]
    bench.print_recall("conflicts", "the namesake who is not forgotten: recall", remembered, share)
    bench.forget_all()


PARTS = ("subject", "prose", "place", "phrasings", "answers", "conflicts")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", choices=tuple(TARGETS))
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--prose-mb", type=float, default=0.1)
    parser.add_argument("--failures", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := [part for part in args.parts.split(",") if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    # The last two write facts of their own.
    parts = [part for part in PARTS if part in args.parts.split(",")]
    silence_libraries()
    torch.set_num_threads(args.threads)
    original, tokenizer = load_teacher(args.model)
    model = load_teacher(args.model)[0]
    rng = random.Random(args.seed)
    num_subjects = -(-args.facts // FACTS_PER_SUBJECT)
    subjects = make_subjects(2 * num_subjects, args.seed)
    rng.shuffle(subjects)
    known, strangers = subjects[:num_subjects], subjects[num_subjects:]
    facts = draw_facts(known, rng)[: args.facts]
    with tempfile.TemporaryDirectory() as folder:
        probes = [fact.probe for fact in facts]
        fact_store = open_fact_store(model, tokenizer, f"{folder}/facts.db", probes)
        bench = Bench(args.model, model, original, tokenizer, fact_store, rng, args.failures)
        columns = ("part", "quantity", "count", "rate", "target", "met")
        print(f"| {' | '.join(columns)} |\n|---|---|---:|---:|---|---|", flush=True)
        written, _ = bench.write(probes)
        bench.print_share("writing", "facts that can be written", len(written), len(probes), ">= 1")
        stored = [fact for fact in facts if fact.probe in written]
        for part in parts:
            bench.rng = random.Random(f"{part}-{args.seed}")  # whatever parts are measured
            if part == "subject":
                measure_subject(bench, stored, strangers)
            elif part == "prose":
                measure_prose(bench, stored, int(args.prose_mb * 1_000_000))
            elif part == "place":
                measure_place(bench, stored)
            elif part == "phrasings":
                measure_phrasings(bench, stored)
            else:
                bench.forget_all()
                (measure_answers if part == "answers" else measure_conflicts)(bench, known)
        fact_store.close()
    print("\n".join(bench.failures))


if __name__ == "__main__":
    main()
