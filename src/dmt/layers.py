"""Which memory each layer has: the config's own, then the rules for some layers."""

from __future__ import annotations

from dmt.config import Config, MemoryConfig
from dmt.errors import UserError
from dmt.wording import changed, shown

MOST_SLOTS = 2**26
"""Slots of a layer beyond which no machine holds them."""


def layer_memories(config: Config, layers: int, block_slots: int | None = None) -> list[MemoryConfig]:
    """The memory settings of each of `layers` layers, rules applied in order.

    Args:
        block_slots: neurons in the teacher's blocks, where known: what empty `slots` stand for.

    Raises:
        UserError: a rule has an unknown key, names a layer that is not there, or contradicts itself.
    """
    memories = [config.memory] * layers
    for number, rule in enumerate(config.student.rules):
        name = f"student.rules[{number}]"
        if set(rule) != {"layers", "memory"} or not isinstance(rule["memory"], dict):
            raise UserError(f"{name} must be a rule such as {{layers: 0-1, memory: {{k: 64}}}}, got {shown(rule)}")
        given = rule["layers"]
        chosen = ",".join(map(str, given)) if isinstance(given, list) else str(given)
        fitted: dict[MemoryConfig, MemoryConfig] = {}
        for layer in select_layers(chosen, layers, f"{name}.layers"):
            before = memories[layer]
            if before not in fitted:
                fitted[before] = changed(before, rule["memory"], f"{name}.memory.")
                check_memory(fitted[before], f"{name}.memory", block_slots)
            memories[layer] = fitted[before]
    _check_shared(memories)
    return memories


def select_layers(text: str, layers: int, name: str) -> list[int]:
    """Layer numbers from `all`, `last`, `3`, `0-2`, `2-` or a comma-separated list of these; 0 is the lowest."""
    chosen: set[int] = set()
    for part in text.replace(" ", "").replace("last", str(layers - 1)).split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = (0, layers - 1) if part == "all" else (int(first), int(last or layers - 1) if dash else int(first))
        except ValueError:
            accepted = "`all`, `last`, a layer, a range such as 0-2 or 2-, or a list"
            raise UserError(f"{name} must be {accepted}; got {shown(text)}") from None
        if not 0 <= low <= high < layers:
            raise UserError(f"{name} must name layers in [0, {layers - 1}], got {shown(text)}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def check_memory(memory: MemoryConfig, name: str, block_slots: int | None) -> None:
    """Raise `UserError` where one memory's settings, called `name`, are out of range or contradict each other."""
    slots = memory.slots if memory.slots is not None else block_slots
    for setting in ("slots", "k", "budget", "heads"):
        given = getattr(memory, setting)
        if isinstance(given, int) and given < 1:
            raise UserError(f"{name}.{setting} must be at least 1, got {given}")
        if isinstance(given, int) and given > MOST_SLOTS:
            raise UserError(f"{name}.{setting} must be in [1, {MOST_SLOTS}], got {given}")
        if slots is not None and setting in ("k", "budget") and isinstance(given, int) and given > slots:
            raise UserError(f"{name}.{setting} must be in [1, {name}.slots={slots}], got {given}")
    if name == "memory" and memory.budget is not None and memory.k != "auto":  # a rule may set its layers apart
        raise UserError(f"{name}.budget is spent by {name}.k=auto alone, got {name}.k={shown(memory.k)}; leave one of them out")
    for setting in ("neighbours", "capacity"):
        if getattr(memory, setting) < 1:
            raise UserError(f"{name}.{setting} must be at least 1, got {getattr(memory, setting)}")
    for setting, most in (("novelty", 2), ("recombine", 2), ("forgetting", 1), ("write_from", 1)):
        if not 0 <= getattr(memory, setting) <= most:
            raise UserError(f"{name}.{setting} must be in [0, {most}], got {getattr(memory, setting)}")
    if memory.kind == "associative" and memory.base == "none" and memory.writes == "residual":
        raise UserError(
            f"{name}.writes=residual is what a base lacks, and {name}.base=none; set {name}.writes=teacher or projection"
        )
    for setting, number in (("slots", slots), ("k", memory.k if isinstance(memory.k, int) else None)):
        if number is not None and number % memory.heads:
            raise UserError(f"{name}.{setting}={number} must be a multiple of {name}.heads={memory.heads}")
    if memory.ranking != "score" and memory.weighting in ("softmax", "distance"):
        raise UserError(
            f"{name}.ranking={memory.ranking} needs a weight per slot, which {name}.weighting={memory.weighting} has not; "
            f"set {name}.ranking=score"
        )
    if memory.gradient == "straight_through" and memory.weighting in ("softmax", "distance"):
        raise UserError(f"{name}.gradient=straight_through needs {name}.weighting=activation or relu, got {memory.weighting}")
    _check_search(memory, name)
    if memory.k == "auto" and memory.ranking == "score":
        raise UserError(
            f"{name}.k=auto compares slots of all layers, which scores do not allow; set {name}.k to a number or "
            f"{name}.ranking=contribution, got {name}.ranking=score"
        )
    if memory.k == "auto" and memory.heads > 1 and not memory.projections:
        raise UserError(
            f"{name}.heads={memory.heads} share out k, which {name}.k=auto does not; set {name}.k to a number, or "
            f"{name}.projections=true to give each a query of its own"
        )


def _check_search(memory: MemoryConfig, name: str) -> None:
    """Raise `UserError` where a search by candidates could not serve what is asked of it."""
    if memory.disk == "slots" and memory.search != "int8":
        raise UserError(
            f"{name}.disk=slots leaves keys on the disk, where only their 8-bit codes can be searched; set {name}.search=int8 or "
            f"{name}.disk=values, got {name}.search={memory.search}"
        )
    if memory.disk == "slots" and memory.weighting == "distance":
        raise UserError(
            f"{name}.weighting=distance needs the length of every key, which {name}.disk=slots leaves on the disk; set "
            f"{name}.disk=values"
        )
    if memory.search == "exact":
        return
    if memory.heads > 1:
        raise UserError(
            f"{name}.search={memory.search} finds slots for one head, got {name}.heads={memory.heads}; set {name}.search=exact"
        )
    if memory.gradient == "straight_through":
        raise UserError(
            f"{name}.gradient=straight_through reaches every slot, {name}.search={memory.search} does not look at all of them; "
            f"set {name}.search=exact"
        )
    if memory.search != "int8" and memory.ranking == "centred":
        raise UserError(
            f"{name}.search={memory.search} finds large weights, not unusual ones; set {name}.ranking=contribution or "
            f"{name}.search=int8, got {name}.ranking=centred"
        )


def has_slots(memory: MemoryConfig) -> bool:
    """Whether a layer gets slots: a featural memory, or an associative one with such a base."""
    return memory.kind == "featural" or (memory.kind == "associative" and memory.base == "featural")


def _check_shared(memories: list[MemoryConfig]) -> None:
    """Raise `UserError` where memories that share a budget would not speak of the same thing."""
    for setting in ("budget", "metric", "ranking"):
        given = {getattr(memory, setting): None for memory in memories if has_slots(memory) and memory.k == "auto"}
        if len(given) > 1:
            raise UserError(
                f"memory.{setting} must be the same in all layers with memory.k=auto, which share one budget, got "
                f"{' and '.join(map(shown, given))}; set memory.k to a number in the layers that differ"
            )
