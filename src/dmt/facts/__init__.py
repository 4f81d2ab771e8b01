"""Facts: written into a model by one gradient each, without changing a weight; read, forgotten, given away."""

from dmt.facts.book import Book
from dmt.facts.lines import Outcome
from dmt.facts.opening import open_book, student_folder
from dmt.facts.sentences import Fact, fact_of

__all__ = ["Book", "Fact", "Outcome", "fact_of", "open_book", "student_folder"]
