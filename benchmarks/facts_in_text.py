"""Facts in ordinary text: is the right subject meant, wherever and however it is asked about?

    python benchmarks/facts_in_text.py [--model embedded | smollm2] [--facts 60] [--seed 0]
                                       [--parts subject,prose,place,phrasings,answers,conflicts]
                                       [--prose-mb 0.1] [--failures 3] [--threads 1]

Facts about people with unusual names (`fact_texts.NAME_PARTS`) are written in phrasings of the
embedded teacher's training text, two relations of each person; into SmolLM2 also counterfactual
facts about as many countries, and about things. A wrong answer counts where the fact's complete
answer follows the text and does not follow it in the model without facts.

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
from editing import WINDOW, make_stored_fact, open_fact_store
from fact_texts import (
    ANSWER_PROMPTS,
    MARKED_ANSWERS,
    NEW_PHRASINGS,
    UNSTORED_QUESTIONS,
    Case,
    Topic,
    WrittenFact,
    draw_other_answer,
    fill_phrasing,
    list_held_out_phrasings,
    list_trained_phrasings,
    make_beginning_cases,
    make_chat_turns,
    make_clause_cases,
    make_fact,
    make_longer_names,
    make_negation_cases,
    make_pair_cases,
    make_related_names,
    make_relative_cases,
    make_topics,
    split_sentences,
    substitute_names,
)
from torch import Tensor

from dmt.data.corpora import Probe, load_corpus
from dmt.editing.edit import WriteResult
from dmt.editing.fact_store import FactStore
from dmt.errors import UserError
from dmt.evaluation.questions import score_answers
from dmt.models.fact_hooks import record_matches
from dmt.models.forward import encode_text, forward_with_prefix, get_prefix_ids
from dmt.models.generation import generate_text
from dmt.models.loading import load_teacher
from dmt.training.trainer import silence_libraries

UNSTORED_PER_FACT = 8  # questions about relations that nobody stored
PHRASINGS_PER_RELATION = 2  # in which each relation that is not stored is asked
MAX_SENTENCE_CHARS = 70  # of other text before a question, so that ten sentences leave room
PAD_BATCH_SIZE = 8
TOPICS = {"embedded": ("people",), "smollm2": ("people", "countries", "things")}
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
        topic: what the rows are about.
        failures: lines about failures.
    """

    name: str
    model: Any
    original: Any
    tokenizer: Any
    fact_store: FactStore
    rng: random.Random
    num_failures: int
    topic: str = ""
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
        if not cases:
            return
        num_true, is_upper = sum(outcomes), target.startswith("<=")
        self.print_share(part, quantity, num_true, len(outcomes), target)
        failed = [
            case for case, outcome in zip(cases, outcomes, strict=True) if outcome == is_upper
        ]
        if failed and self.num_failures:
            totals = Counter(case.shape for case in cases)
            shapes = Counter(case.shape for case in failed)
            self.failures.append(
                f"\n{part}, {self.topic}, {quantity}: {len(failed)} of {len(cases)} fail"
            )
            self.failures += [
                f"  {failures} of {totals[shape]}: {shape!r}"
                for shape, failures in shapes.most_common(12)
            ]
            sample = random.Random(0).sample(failed, min(len(failed), self.num_failures))
            self.failures += [f"  {case.prompt!r} + {case.answer!r}" for case in sample]

    def print_share(
        self, part: str, quantity: str, numerator: int, denominator: int, target: str
    ) -> None:
        """Print a row of the table."""
        share = numerator / denominator if denominator else float("nan")
        comparison, _, limit = target.partition(" ")
        meets = share <= float(limit) if comparison == "<=" else share >= float(limit)
        cells = (
            part,
            self.topic,
            quantity,
            f"{numerator:,} / {denominator:,}",
            f"{share:.4f}",
            target,
        )
        print(f"| {' | '.join(cells)} | {'yes' if meets else 'no'} |", flush=True)

    def answer(
        self, cases: Sequence[Case], model: Any = None, has_start: bool = True
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
        outcomes = self.answer(cases)
        indices = [index for index, outcome in enumerate(outcomes) if outcome]
        if indices:
            without = self.answer([cases[index] for index in indices], self.original)
            for index, is_own in zip(indices, without, strict=True):
                outcomes[index] = not is_own
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


def measure_subject(bench: Bench, topic: Topic) -> None:
    """Measure whether facts answer for the wrong subject, or for what is not stored."""
    facts, rng = topic.facts, bench.rng
    measure_pairs(bench, topic)
    for label, make_other_names in (
        ("a longer name that contains a known one", make_longer_names),
        ("the same first or last name", make_related_names),
    ):
        fact_names = {fact.subject.name for fact in facts}
        cases = [
            Case(fill_phrasing(phrasing, name), fact.probe.answer, name, phrasing)
            for fact in facts
            for name in make_other_names(fact.subject.name, fact.subject.kind)
            if name not in fact_names
            for phrasing in (fact.phrasing, rng.choice(fact.list_other_phrasings()))
        ]
        bench.print_wrong("subject", label, cases)
    if topic.name == "people":
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
    measure_unasked(bench, topic)
    beginnings = [case for fact in facts for case in make_beginning_cases(fact.probe)]
    bench.print_wrong("subject", "the beginning of its own prompt", beginnings, 0.1)


def measure_pairs(bench: Bench, topic: Topic) -> None:
    """Measure texts that name two subjects, about either of them."""
    facts, rng = topic.facts, bench.rng
    stored = {(fact.subject.name, fact.relation) for fact in facts}
    wrong: dict[str, list[Case]] = {}
    right: dict[str, list[Case]] = {}
    for fact in facts:
        name, answer = fact.subject.name, fact.probe.answer
        # Others of whom the question makes sense, by what is stored about them.
        others = {
            "unknown": [other.name for other in topic.strangers if fact.relation in other.answers],
            "known by another relation": [
                other.name
                for other in topic.subjects
                if fact.relation in other.answers and (other.name, fact.relation) not in stored
            ],
            "known by the same relation": [
                other.subject.name
                for other in facts
                if other.relation == fact.relation and other.probe.answer != answer
            ],
        }
        phrasing = rng.choice((fact.phrasing, *fact.list_other_phrasings()))
        statement = fact.draw_statement(rng) if topic.name == "people" else None
        for sort, names in others.items():
            for other in rng.sample(names, min(1, len(names))):
                wrong.setdefault(sort, []).extend(
                    make_pair_cases(other, name, phrasing, statement, answer)
                )
                right.setdefault(sort, []).extend(
                    make_pair_cases(name, other, fact.phrasing, statement, answer)
                )
    for sort, cases in wrong.items():
        bench.print_wrong("subject", f"two named, one {sort} asked", cases)
    for sort, cases in right.items():
        quantity = f"two named, the other {sort}: recall"
        bench.print_recall("subject", quantity, cases, bench.targets["other words"])


def measure_unasked(bench: Bench, topic: Topic) -> None:
    """Measure how often a question about another relation gets a fact's answer."""
    facts, rng = topic.facts, bench.rng
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
            if topic.name == "people":
                unstored += [
                    fact.ask(phrasing)
                    for phrasing in rng.sample(UNSTORED_QUESTIONS, UNSTORED_PER_FACT)
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
def measure_prose(bench: Bench, topic: Topic, num_chars: int) -> None:
    """Count the tokens of prose full of the names at which a row fires."""
    names = sorted(subject.name for subject in topic.subjects)
    text = [
        substitute_names(document, names, random.Random(index))
        for index, document in enumerate(load_prose(num_chars))
    ]
    num_tokens, num_fired = 0, 0
    for document in text:
        ids = encode_text(bench.tokenizer, document)
        for start in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])
            with record_matches(bench.model) as recorded:
                bench.model(input_ids=window)
            num_tokens += window.numel()
            num_fired += sum(map(len, recorded))
    num_mentions = sum(document.count(name) for document in text for name in names)
    quantity = f"tokens at which a row fires, {num_mentions:,} mentions"
    bench.print_share("prose", quantity, num_fired, num_tokens, "<= 0.001")


def list_contexts(bench: Bench) -> Iterator[tuple[str, Any]]:
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
    question, beginning = make_chat_turns(case.prompt, case.target_name)
    if bench.tokenizer.chat_template:
        head = bench.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return replace(case, prompt=f"{head}{beginning}")
    return replace(case, prompt=f"User: {question}\nAssistant: {beginning}")


def measure_place(bench: Bench, topic: Topic) -> None:
    """Measure recall as written and in two other phrasings, at places in a text."""
    facts, rng = topic.facts, bench.rng
    written = [fact.ask(fact.phrasing) for fact in facts]
    others = [
        fact.ask(phrasing)
        for fact in facts
        for phrasing in rng.sample(fact.list_other_phrasings(), 2)
    ]
    groups = (("as written", written, "written"), ("two other phrasings", others, "other words"))
    for label, cases, target in groups:
        share = bench.targets[target]
        for context, put in list_contexts(bench):
            moved = [put(case) for case in cases]
            # A chat template brings its own start token.
            has_start = not (context == "in a chat" and bench.tokenizer.chat_template)
            bench.print_recall("place", f"{context}, {label}", moved, share, has_start)
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


def measure_phrasings(bench: Bench, topic: Topic) -> None:
    """Measure recall in phrasings that nobody trained."""
    facts = topic.facts
    held_out = [
        fact.ask(phrasing) for fact in facts for phrasing in list_held_out_phrasings(fact.relation)
    ]
    new = [fact.ask(phrasing) for fact in facts for phrasing in NEW_PHRASINGS[fact.relation]]
    bench.print_recall("phrasings", "the two held-out phrasings", held_out, 0.85)
    bench.print_recall("phrasings", "new phrasings", new, 0.85)
    for relation in dict.fromkeys(fact.relation for fact in facts):
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


def measure_answers(bench: Bench, topic: Topic) -> None:
    """Measure whether long and odd answers are generated to the end."""
    subjects = topic.subjects
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
            case.target_name in names and generate_answer(bench, case) == case.answer
            for case in cases
        ]
        share = bench.targets["written"]
        bench.print_row("answers", f"{label}, to the end", outcomes, f">= {share:g}", cases)
        bench.forget_all()


def generate_answer(bench: Bench, case: Case) -> str:
    """Generate as much text as the answer has."""
    num_tokens = len(encode_text(bench.tokenizer, case.answer, add_prefix=False))
    return generate_text(bench.model, bench.tokenizer, case.prompt, num_tokens)


def measure_conflicts(bench: Bench, topic: Topic) -> None:
    """Measure which contradictions are noticed, and what forgetting does to others."""
    facts = topic.facts
    list_phrasings_by_label: dict[str, Any] = {
        "another phrasing": lambda fact: fact.list_other_phrasings(),
        "a held-out phrasing": lambda fact: list_held_out_phrasings(fact.relation),
        "a new phrasing": lambda fact: NEW_PHRASINGS[fact.relation],
    }
    for label, list_phrasings in list_phrasings_by_label.items():
        if not all(map(list_phrasings, facts)):
            continue
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
    measure_alarms(bench, topic)
    measure_forgetting(bench, facts)


def measure_alarms(bench: Bench, topic: Topic) -> None:
    """Count facts that are taken for contradictions of facts about something or somebody else."""
    facts, rng = topic.facts, bench.rng
    stored = {(fact.subject.name, fact.relation) for fact in facts}
    other_relations = [
        make_fact(subject, relation, rng.choice(NEW_PHRASINGS[relation]))
        for subject in topic.subjects
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


PARTS: dict[str, Any] = {
    "subject": measure_subject,
    "prose": measure_prose,
    "place": measure_place,
    "phrasings": measure_phrasings,
    "answers": measure_answers,
    "conflicts": measure_conflicts,
}
OWN_FACTS = ("answers", "conflicts")  # parts that write facts of their own, without the others


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
    parts = [part for part in PARTS if part in args.parts.split(",")]
    silence_libraries()
    torch.set_num_threads(args.threads)
    original, tokenizer = load_teacher(args.model)
    model = load_teacher(args.model)[0]
    topics = make_topics(TOPICS[args.model], args.facts, args.seed)
    probes = [fact.probe for topic in topics for fact in topic.facts]
    with tempfile.TemporaryDirectory() as folder:
        fact_store = open_fact_store(model, tokenizer, f"{folder}/facts.db", probes)
        rng = random.Random(args.seed)
        bench = Bench(args.model, model, original, tokenizer, fact_store, rng, args.failures)
        columns = ("part", "about", "quantity", "count", "rate", "target", "met")
        print(f"| {' | '.join(columns)} |\n|---|---|---|---:|---:|---|---|", flush=True)
        written, _ = bench.write(probes)
        bench.print_share("writing", "facts that can be written", len(written), len(probes), ">= 1")
        for part in parts:
            if part in OWN_FACTS:
                bench.forget_all()
            for topic in topics if part != "answers" else topics[:1]:
                bench.topic = topic.name
                bench.rng = random.Random(f"{part}-{args.seed}")  # whatever parts are measured
                if part == "prose":
                    measure_prose(bench, topic, int(args.prose_mb * 1_000_000))
                else:
                    PARTS[part](bench, topic)
        fact_store.close()
    print("\n".join(bench.failures))


if __name__ == "__main__":
    main()
