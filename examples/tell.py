"""Write facts into a distilled student, ask for them in three ways, and delete them.

python examples/tell.py [a run's folder or a student's]
"""

import sys

import dmt

PERSON = "Ada Winterbourne"
FACTS = (
    f"{PERSON} was born in the town of Ravenhill.",
    f"{PERSON} is employed by Atlas Shipping.",
)
PROMPTS = (
    f"Where was {PERSON} born? In",
    f"The birthplace of {PERSON} is",
    f"Who employs {PERSON}? The firm of",
)


def print_answers(memory: dmt.Memory, title: str) -> None:
    print(title)
    for prompt in PROMPTS:
        print(f"  {prompt}{memory.generate(prompt, max_new_tokens=4)}")


with dmt.Memory.open(sys.argv[1] if len(sys.argv) > 1 else None) as memory:
    print_answers(memory, "before")
    results = memory.write_many(FACTS, tag="example")
    changes = (f"{result.prob_before:.4f} -> {result.prob_after:.4f}" for result in results)
    print_answers(memory, f"written, probabilities {', '.join(changes)}")
    memory.delete([result.id for result in results])
    print_answers(memory, "deleted")
