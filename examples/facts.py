"""Store facts, ask, and delete them.

Usage: python examples/facts.py [STUDENT]
"""

import sys

import dmt

PROMPTS = (
    "Where was Ada Winterbourne born? In",
    "The birthplace of Ada Winterbourne is",
    "Who employs Ada Winterbourne? The firm of",
)
SENTENCES = (
    "Ada Winterbourne was born in the town of Ravenhill.",
    "Ada Winterbourne is employed by Atlas Shipping.",
)


def print_answers(memory: dmt.Memory, title: str) -> None:
    """Print how the model completes each prompt."""
    print(title)
    for prompt in PROMPTS:
        print(f"  {prompt}{memory.generate(prompt, max_new_tokens=8)}")


with dmt.Memory.open(sys.argv[1] if len(sys.argv) > 1 else "embedded") as memory:
    print_answers(memory, "before")
    for sentence in SENTENCES:
        result = memory.write(sentence, tag="example")
        print(f"stored: probability {result.prob_before:.4f} -> {result.prob_after:.4f}")
    print_answers(memory, "with facts")
    memory.delete(tag="example")
    print_answers(memory, "after deletion")
