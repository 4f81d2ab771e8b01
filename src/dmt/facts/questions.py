"""Many things one may ask about anybody or anything, each in three ways: what calibration compares keys with.

Two ways to ask the same thing should be near in the metric of facts, two different things should not.
"""

from __future__ import annotations

QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("{s} was founded in", "The year in which {s} began is", "When did {s} start? In"),
    ("{s} is best known for", "What made {s} famous is", "Why do people know {s}? Because of"),
    ("The favourite colour of {s} is", "{s} likes one colour above all:", "Which colour does {s} prefer?"),
    ("{s} is older than", "Compared in age, {s} comes before", "Who is younger than {s}? Probably"),
    ("The neighbour of {s} is", "Right next to {s} lies", "What is close to {s}? There is"),
    ("The mother of {s} is", "{s} is the child of", "Who gave birth to {s}? It was"),
    ("{s} is married to", "The spouse of {s} is", "Whose husband or wife is {s}? That of"),
    ("{s} plays the", "The instrument of {s} is the", "Which instrument is played by {s}? The"),
    ("The sport of {s} is", "{s} is a champion in", "What game does {s} play? It is"),
    ("The best friend of {s} is", "{s} is closest to", "Who is the friend of {s}? It is"),
    ("{s} studied at", "The school of {s} was", "Where did {s} learn? At"),
    ("{s} wrote the book", "The most read work of {s} is", "What was written by {s}? The book"),
    ("The religion of {s} is", "{s} believes in", "To which faith does {s} belong? To"),
    ("The number of people in {s} is", "{s} has a population of", "How many live in {s}? About"),
    ("The highest mountain of {s} is", "{s} rises highest at", "What is the tallest peak in {s}? It is"),
    ("The longest river of {s} is the", "Through {s} flows the", "Which river runs through {s}? The"),
    ("The anthem of {s} is", "The song of {s} is called", "What do they sing in {s}? They sing"),
    ("The weather in {s} is", "In winter {s} is", "How is the climate of {s}? It is"),
    ("{s} is made of", "The material of {s} is", "What does {s} consist of? Of"),
    ("{s} weighs", "The weight of {s} is", "How heavy is {s}? It weighs"),
    ("{s} died in", "The death of {s} was in", "When did {s} pass away? In"),
    ("{s} was discovered by", "The first to find {s} was", "Who discovered {s}? It was"),
    ("{s} was invented by", "The inventor of {s} is", "Who came up with {s}? It was"),
    ("The enemy of {s} is", "{s} fought against", "Whom does {s} hate? It hates"),
    ("The colour of {s} is", "{s} looks", "What colour has {s}? It is"),
    ("{s} costs", "The price of {s} is", "How much is {s}? It is"),
    ("The boss of {s} is", "{s} reports to", "Who gives orders to {s}? It is"),
    ("{s} lives with a pet", "The pet of {s} is a", "Which animal does {s} keep? A"),
    ("The telephone number of {s} is", "{s} can be called at", "How do I ring {s}? Dial"),
    ("{s} was built by", "The architect of {s} was", "Who built {s}? It was"),
    ("The opposite of {s} is", "{s} is the reverse of", "What is contrary to {s}? It is"),
    ("{s} won the", "The prize given to {s} was the", "Which award did {s} get? The"),
    ("{s} belongs to", "The owner of {s} is", "Whose is {s}? It belongs to"),
    ("The nickname of {s} is", "{s} is also called", "By what other name is {s} known? By"),
    ("{s} eats", "The diet of {s} is", "What does {s} feed on? On"),
    ("{s} is afraid of", "What frightens {s} is", "What does {s} fear? It fears"),
    ("The hobby of {s} is", "In free time {s} enjoys", "What does {s} do for fun? It is"),
    ("{s} is part of", "The group to which {s} belongs is", "What is {s} a member of? Of"),
    ("The size of {s} is", "{s} is as large as", "How big is {s}? It is"),
    ("The purpose of {s} is", "{s} is used for", "What is {s} good for? For"),
)
"""`{s}` is whom or what is asked about."""
NAMES = ("Clara Winfield", "Portugal", "Thomas Reed", "Norway", "Maria Lopez")
"""Whom they are asked about, since names are in the state too."""
