"""Whom a text asks about, and the clause that asks, with the subject taken out.

Everything here is a function of the text up to one position, so that batches, caches and what
follows never change it. The rules are for English; in another language the subject has to be in
the sentence that asks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from dmt.matching.mentions import (
    OPENING,
    Mention,
    begins_with_capital,
    find_mentions,
    find_names,
    is_all_capitals,
    load_words,
)
from dmt.text import USER_SUBJECT, name_user

OPENING_MARKS = OPENING.replace("{", "")  # which begins `SUBJECT`
OTHER = "person"  # a being that a clause does not name by its relation to the subject
SUBJECT = "{s}"  # stands for the subject in a clause
MAX_STUB_WORDS = 8  # of the start of an answer after a question, as in "It is"
# The end of a sentence, but for that of a title or an initial.
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)(?<!\b[A-Z])"
    r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？．]|\n\s*\n|\n(?=\s*[A-Z<])|(?<=[.!?:;,])\n"
)
# Of a name, as in "Acme Inc. is" and "Yahoo! is", where the sentence goes on.
NAME_STOP = re.compile(r"[.!](?=['’]s\b|\s+(?P<next>\w+))")
# What a question or an answer begins with in a dialog.
MARKER = re.compile(
    r"(?:^|(?<=\n))\s*(?:question|answer|q|a|user|assistant|system|human|model)[ ]*(?::|\n)\s*",
    re.IGNORECASE,
)
PRONOUNS = re.compile(r"\b(he|she|it|they|him|her|them|his|hers|its|their|theirs)\b", re.IGNORECASE)
POSSESSIVE_PRONOUNS = ("his", "its", "their", "theirs", "hers")
NEGATION = re.compile(
    r"\b(?:not|never|cannot|neither|nor|hardly|nowhere|no longer|without|nicht|kein\w*|nunca|jamais"
    r"|non|não|pas|niet|ikke|inte|не|никогда)\b|n['’]t\b|[不没未]|ない|ません|\{s\}\s+no\b",
    re.IGNORECASE,
)
AUXILIARY = (
    "is|was|are|were|has|had|have|does|did|do|will|would|can|could|should|must|may|might|lives|"
    "lived|works|worked|came|comes|went|grew|got|died|moved|became|began|made|earns|holds|spent|"
    "settled|studied|speaks|plays|wrote|won|owns|belongs"
)
FOLLOWED_BY_VERB = re.compile(rf"^,?\s*(?:\w+ly\s+)?(?:{AUXILIARY}|[a-z]{{2,}}(?:ed|[^s\W]s))\b")
COORDINATION = re.compile(r"^,?\s*(?:and|but|then|or)\s+(?!the\b|an?\b)[a-z]")
RELATIVE = re.compile(r"^,?\s*(?:who|whom|whose|which|that)\b")
# "Said in Rome that" says nothing of Rome.
RELATIVE_OF_PLACE = re.compile(r"^,?\s*(?:who|whom|whose|which)\b")
CLAUSE_BREAK = re.compile(
    r"[,;:?—–]|\b(?:that|where|when|because|while|if|whether|but|though|and|as|than)\b",
    re.IGNORECASE,
)
# After which a clause of its own begins, in which names before it play no part.
REPORT = re.compile(
    r"\b(?:say|says|said|know|knows|knew|think|thinks|thought|believe|believes|believed|read|reads|"
    r"hear|hears|heard|claim|claims|claimed|state|states|stated|write|writes|wrote|report|reports|"
    r"reported|remember|remembers|remembered|mention|mentions|mentioned|tell|tells|told|learn|"
    r"learns|learned|note|notes|noted|explain|explains|explained|sure|certain|true|clear|fact|find|"
    r"finds|found|see|sees|saw|show|shows|showed|agree|agrees|agreed|recall|recalls|recalled)"
    r"(?:\s\w+)?\s+that\s+",
    re.IGNORECASE,
)
BREAK_WORD = re.compile(
    r"[,;:—–]\s*|\b(?:that|because|while|if|whether|though|as|than)\s+", re.IGNORECASE
)
QUESTION_WORD = re.compile(r"\b(?:where|when|what|which|who|whom|whose|how)\b", re.IGNORECASE)
# Somebody else whom a clause after the subject is about, or of whom the subject is a part.
DETERMINER = (
    r"(?:an?|the|some|this|that|these|those|his|her|its|their|another|one|two|every|each|no)"
)
OTHER_BEING = re.compile(
    rf"\b(?:{DETERMINER}\s+(?:[\w'’-]+\s+){{0,3}}?[\w'’-]+|some(?:one|body)|any(?:one|body)|people|"
    r"those)\s*,?\s+(?:who|whose|whom)\b"
)
# As of the being in "When {s} came home, the baby was born in".
SUBJECT_OF_VERB = re.compile(
    rf"\b{DETERMINER}\s+(?:[\w'’-]+\s+){{0,2}}?([\w'’-]+)\s+(?:{AUXILIARY})\b"
)
BE = re.compile(r"\b(?:is|was|be|been|became|remains|remained|as)\s*$", re.IGNORECASE)
# Before a name that is a place, a time or a thing rather than somebody.
PLACE_PREPOSITION = re.compile(
    r"\b(?:in|at|near|from|to|on|into|for|called|named|until|since|of the \w+ of)\s+(?:the\s+)?$",
    re.IGNORECASE,
)
# Insertions between a name and its verb.
INSERTION = re.compile(
    r"(?<=[\w}])(?:,\s(?=(?:an?|the|who|whom|whose|which|son|daughter|husband|wife|friend|brother|"
    r"sister|cousin|like|unlike|with|according|together|as|not|once|now|then|born|[^,]*['’]s\s)"
    r"\b|[^,]*['’]s\s)[^,.?!]*,|\s*\([^()]*\)|\s[–—]\s[^–—]*\s[–—])"
)
# Beings that belong to somebody and have facts of their own.
RELATIVES = load_words("relatives")
# Things that say something about whom they belong to, as in "The passport of {s} gives as".
DOCUMENTS = load_words("documents")
REPORTS = re.compile(
    r"\s*(?:says?|said|gives?|gave|shows?|showed|states?|stated|lists?|listed|reads?|records?|"
    r"recorded|mentions?|mentioned|reports?|reported|tells?|told|names?|named|notes?|noted|"
    r"confirms?|confirmed|is dated|was dated)\b"
)
COPULA = load_words("copula")


@dataclass(frozen=True)
class Question:
    """What a text asks at its end.

    Attributes:
        name: of the subject, folded.
        clause: the text that asks, with `SUBJECT` for the subject and single spaces.
        relative: the being that belongs to the subject and is asked about instead, or a thing of
            which something is said; empty where it is the subject itself.
        is_certain_relative: whether `relative` is a being.
        is_negated: whether the clause negates.
    """

    name: str
    clause: str
    relative: str
    is_certain_relative: bool
    is_negated: bool


def find_question(text: str, names: Collection[str], max_words: int) -> Question | None:
    """Find whom a text asks about at its end, if it is one of `names`.

    Args:
        text: up to the position that is to be continued; of one document.
        names: of stored subjects, folded.
        max_words: words of the longest name.
    """
    text = MARKER.sub("\n", text)
    if USER_SUBJECT in names:
        text = name_user(text)
    mentions = [_include_stop(text, mention) for mention in find_mentions(text, names, max_words)]
    if not mentions:
        return None
    sentences = _split_sentences(text, mentions)
    current = len(sentences) - 1
    first = current
    is_stub = False
    if current and not _contains(mentions, sentences[current]):
        previous = text[slice(*sentences[current - 1])].rstrip()
        is_stub = previous.endswith(("?", "？", ":", "：")) and _is_stub(
            text, sentences[current], mentions
        )
        if is_stub:
            first = current - 1
    start = sentences[first][0]
    part, part_mentions = _cut(text, mentions, start)
    reduced, part_mentions = _remove_insertions(part, part_mentions)
    if part_mentions or find_names(reduced):
        return _find_in_sentence(reduced, part_mentions)
    pronoun = PRONOUNS.search(reduced)
    if pronoun is None:
        return None
    topic = _find_antecedent(text, mentions, sentences[:first])
    if topic is None:
        return None
    replacement = SUBJECT
    is_object = re.match(r"\s+[a-z]+ed\b|\s*$|\s+(?:in|at|on|to|by)\b", reduced[pronoun.end() :])
    if pronoun[1].lower() in POSSESSIVE_PRONOUNS or (pronoun[1].lower() == "her" and not is_object):
        replacement = f"{SUBJECT}'s"
    clause = reduced[: pronoun.start()] + replacement + reduced[pronoun.end() :]
    return _make_question(topic.name, clause)


def _find_in_sentence(sentence: str, mentions: list[Mention]) -> Question | None:
    """Find the topic among the names of the sentence that asks."""
    names = find_names(sentence, mentions)
    topic, rest_start = _choose_topic(sentence, names)
    if topic is None or not topic.name:
        return None
    if rest_start > topic.end:  # a second thing is said of the topic, after all names
        return _make_question(topic.name, f"{SUBJECT} {sentence[rest_start:]}")
    later = [name for name in names if name.start >= topic.end and name.name != topic.name]
    if any(not _is_object(sentence, topic, name) for name in later):
        return None
    clause, offset = "", _find_clause_start(sentence, topic, names)
    for mention in mentions:
        if mention.name == topic.name and mention.start >= offset:
            clause += sentence[offset : mention.start] + SUBJECT
            offset = mention.end
    return _make_question(topic.name, clause + sentence[offset:])


def _find_clause_start(sentence: str, topic: Mention, names: list[Mention]) -> int:
    """Return where the clause about a topic begins, after what others say or are like."""
    before = sentence[: topic.start]
    start = 0
    for report in REPORT.finditer(before):
        start = report.end()
    earlier = [name.end for name in names if name.end <= topic.start and name.name != topic.name]
    if earlier and max(earlier) > start:
        between = before[max(earlier) :]
        breaks = [match.end() for match in BREAK_WORD.finditer(between)]
        question = QUESTION_WORD.search(between, breaks[-1] if breaks else 0)
        if breaks:
            start = max(earlier) + breaks[-1]
        elif question:
            start = max(earlier) + question.start()
        elif FOLLOWED_BY_VERB.match(sentence[topic.end :]):
            start = topic.start
    return start


def _choose_topic(sentence: str, names: list[Mention]) -> tuple[Mention | None, int]:
    """Choose the name that the end of a sentence is about, and where what is said of it begins."""
    people = [
        name for name in names if name.name or not PLACE_PREPOSITION.search(sentence[: name.start])
    ]
    if not people:
        return None, 0
    first, last = people[0], people[-1]
    end = names[-1]
    tail = sentence[end.end :]
    coordination = COORDINATION.match(tail)
    if coordination and (len(names) > 1):
        conjunction = re.match(r",?\s*\w+\s+", tail)
        assert conjunction is not None, "a conjunction matched"
        return first, end.end + conjunction.end()
    relative = (RELATIVE if end is last else RELATIVE_OF_PLACE).match(tail)
    if relative and end is not first:
        return end, end.end + relative.end()
    if first is last or (first.name == last.name and first.name):
        return last, 0
    between = sentence[first.end : last.start]
    if CLAUSE_BREAK.search(between) or FOLLOWED_BY_VERB.match(sentence[last.end :]):
        return last, 0
    if re.match(r"\s*(?:where|when|what|which|who|whom|whose|how|in)\b", sentence, re.IGNORECASE):
        return last, 0
    return first, 0


def _is_object(sentence: str, topic: Mention, name: Mention) -> bool:
    """Check whether a name after the topic is a place or a thing that is said of it."""
    return bool(PLACE_PREPOSITION.search(sentence[topic.end : name.start]))


def _find_antecedent(
    text: str, mentions: list[Mention], sentences: list[tuple[int, int]]
) -> Mention | None:
    """Find the mention that a pronoun after `sentences` stands for."""
    for start, end in reversed(sentences):
        sentence_mentions = [
            Mention(mention.start - start, mention.end - start, mention.name)
            for mention in mentions
            if start <= mention.start < end
        ]
        sentence = text[start:end]
        people = [
            name
            for name in find_names(sentence, sentence_mentions)
            if name.name or not PLACE_PREPOSITION.search(sentence[: name.start])
        ]
        if not people:
            if PRONOUNS.search(sentence):
                continue
            return None
        if len({sentence[name.start : name.end].casefold() for name in people}) > 1:
            return None
        topic = people[-1]
        if not topic.name or _find_relative(sentence[topic.end :], sentence[: topic.start]):
            return None
        return Mention(topic.start + start, topic.end + start, topic.name)
    return None


def _make_question(name: str, clause: str) -> Question:
    if is_all_capitals(clause.replace(SUBJECT, "")):
        clause = clause.lower()
    clause = " ".join(clause.split()).lstrip(f"{OPENING_MARKS} ")
    clause = re.sub(r"\s*[:：]$", " is", clause)  # a label, as in "Name: ..."
    position = clause.rfind(SUBJECT)
    relative = _find_relative(clause[position + len(SUBJECT) :], clause[:position])
    return Question(
        name,
        clause,
        relative,
        relative == OTHER or relative in RELATIVES,
        bool(NEGATION.search(clause)),
    )


def _find_relative(after: str, before: str) -> str:
    """Return the being or thing of the subject that a clause is about; empty for the subject."""
    owned = re.match(r"(?:['’]s?|\s*,?\s*whose)\s+((?:[^\W\d][\w'’-]*\s*)+)", after)
    thing = ""
    for index, word in enumerate(owned[1].split() if owned else ()):
        if re.sub(r"['’]s?$", "", word.lower()) in RELATIVES:
            return re.sub(r"['’]s?$", "", word.lower())
        if index and re.fullmatch(rf"(?:{AUXILIARY})", word):
            words = owned[1].split() if owned else []
            thing = " ".join(words[:index]).lower() if _says_more(words[index:]) else ""
            break
    owner = re.search(
        rf"(?:^|\s)(?:{DETERMINER}|which|what|whose)?\s*((?:[\w'’-]+\s+){{1,3}})of\s+$",
        before,
        re.IGNORECASE,
    )
    if owner:
        noun = owner[1].split()[-1].lower()
        if noun in RELATIVES:
            return noun
        reports = noun in DOCUMENTS and REPORTS.match(after)
        if _says_more(after.split()) and not owned and not reports:
            return noun
    knower = re.search(r"[^\W\d][\w’'-]*,?\s+(?:who|whom|whose)\b[^?.!]*$", before)
    if knower and _says_more(re.sub(r"[?].*", "", after).split()):
        return OTHER
    for other in OTHER_BEING.finditer(after):
        if not BE.search(after[: other.start()]):
            return OTHER
    for being in SUBJECT_OF_VERB.finditer(after):
        if being[1].lower() in RELATIVES and not BE.search(after[: being.start()]):
            return being[1].lower()
    return thing


def _says_more(predicate: list[str]) -> bool:
    """Check whether a predicate says more than what its noun is."""
    words = [re.sub(r"\W", "", word.lower()) for word in predicate]
    return any(word and word not in COPULA for word in words)


def _include_stop(text: str, mention: Mention) -> Mention:
    """Extend a capitalized name by a stop after it that ends no sentence."""
    stop = NAME_STOP.match(text, mention.end)
    if stop is None or not begins_with_capital(text[mention.start : mention.end]):
        return mention
    word = stop["next"] or ""
    ends_sentence = word and (not word[0].islower() or PRONOUNS.fullmatch(word))
    return mention if ends_sentence else replace(mention, end=stop.end())


def _split_sentences(text: str, mentions: list[Mention]) -> list[tuple[int, int]]:
    """Return start and end of each sentence."""
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(text):
        if any(mention.start < match.end() <= mention.end for mention in mentions):
            continue
        if not text[match.end() :].strip():
            break
        if text[start : match.end()].strip():
            sentences.append((start, match.end()))
            start = match.end()
    sentences.append((start, len(text)))
    return sentences


def _contains(mentions: list[Mention], sentence: tuple[int, int]) -> bool:
    return any(sentence[0] <= mention.start < sentence[1] for mention in mentions)


def _is_stub(text: str, sentence: tuple[int, int], mentions: list[Mention]) -> bool:
    """Check whether a sentence is the start of an answer, without a name."""
    words = text[slice(*sentence)]
    return len(words.split()) <= MAX_STUB_WORDS and not find_names(words)


def _cut(text: str, mentions: list[Mention], start: int) -> tuple[str, list[Mention]]:
    return text[start:], [
        Mention(mention.start - start, mention.end - start, mention.name)
        for mention in mentions
        if mention.start >= start
    ]


def _remove_insertions(sentence: str, mentions: list[Mention]) -> tuple[str, list[Mention]]:
    """Remove what stands between commas, brackets or dashes after a name, with its mentions."""
    match = INSERTION.search(sentence)
    while match:
        size = match.end() - match.start()
        before = [mention for mention in mentions if mention.end <= match.start()]
        after = [
            Mention(mention.start - size, mention.end - size, mention.name)
            for mention in mentions
            if mention.start >= match.end()
        ]
        if not any(name.end == match.start() for name in find_names(sentence, before)):
            match = INSERTION.search(sentence, match.start() + 1)
            continue
        sentence = sentence[: match.start()] + sentence[match.end() :]
        mentions = before + after
        match = INSERTION.search(sentence, match.start())
    return sentence, mentions


def get_last_clause(text: str) -> str:
    """Return the sentence that a text ends in, after the question that it answers."""
    text = MARKER.sub("\n", text)
    sentences = _split_sentences(text, [])
    first = len(sentences) - 1
    if first and text[slice(*sentences[first - 1])].rstrip().endswith(("?", "？")):
        first -= _is_stub(text, sentences[first], [])
    return " ".join(text[sentences[first][0] :].split())


def mask_names(text: str) -> str:
    """Return the last clause of a text with `SUBJECT` for its last name."""
    clause = get_last_clause(text)
    names = find_names(clause)
    if not names:
        return clause
    return clause[: names[-1].start] + SUBJECT + clause[names[-1].end :]
