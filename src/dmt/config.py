"""Every setting, its default and its meaning. The text under a field is what `--help` prints.

Each dataclass checks itself when it is made: types, choices, ranges and contradictions between
its own fields. Nothing here imports torch or transformers, so a misspelled setting is answered
at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Optional

from dmt.errors import format_value
from dmt.validation import ARG, ArgumentError, bounded, check_fields, coerce

MAX_SLOTS_PER_LAYER = 2**26  # more do not fit in any machine


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of one memory. Each kind of memory has a subclass of this with its own fields.

    A kind of your own: subclass this, give the fields, and register it with
    `dmt.register_memory` (docs/guides/own-memory.md).
    """

    kind: str = field(default="", init=False)
    """`featural`: a top-k key-value layer in place of the feed-forward block; `associative`: kNN
    attention over stored rows, beside a `base`; `dense`: keep the block; one of the layers in
    docs/concepts/memory-layers; or a class of your own, `my_package.my_module:MyMemory`."""

    kind_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field, then what fields say together."""
        object.__setattr__(self, "kind", type(self).kind_name)
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Raise `ArgumentError` where fields contradict each other."""

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""

    def list_parts(self) -> list[MemoryConfig]:
        """Return the settings of the memories that add up to this one, itself where it is one."""
        return [self]

    @property
    def has_slots(self) -> bool:
        """Whether the layer gets slots."""
        return False

    @property
    def copies_block(self) -> bool:
        """Whether the memory begins as a copy of the block it replaces."""
        return True

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        return False


@dataclass(frozen=True)
class DenseConfig(MemoryConfig):
    """No memory: the layer keeps its feed-forward block."""

    kind_name: ClassVar[str] = "dense"


@dataclass(frozen=True)
class FeaturalConfig(MemoryConfig):
    """Settings of a featural memory: a top-k key-value layer in place of the feed-forward block."""

    kind_name: ClassVar[str] = "featural"

    init: Literal["ff", "random"] = "ff"
    """`ff`: slots are the neurons of the replaced block, so k = num_slots equals the teacher;
    `random`: from scratch."""
    activation: Literal["block", "relu", "softmax", "distance"] = "block"
    """Score to weight: the block's own activation, relu, softmax over the k scores, or a kernel of
    the distance."""
    selection: Literal["score", "contribution", "centered"] = "contribution"
    """Which k slots are read: highest score, largest |weight| x |value|, or largest |weight - its
    mean| x |value|."""
    metric: Literal["euclidean", "fisher"] = "fisher"
    """Norm of a value in `selection`: Euclidean, or how far it moves the model's output, measured
    by calibration."""
    gradient: Literal["selected", "straight_through"] = "selected"
    """Gradient of the scores: of the k slots that are read, or as if all slots were
    (straight-through)."""
    num_slots: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Slots of the memory; empty means one for each neuron of the replaced block."""
    k: int | Literal["auto"] | None = bounded("auto", minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Slots read per token; empty means one sixteenth of the slots; `auto`: `mean_k` on average,
    more where it pays."""
    mean_k: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """With `k: auto`, mean slots read per token and layer; empty means three sixteenths of the
    slots."""
    heads: int = bounded(1, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Groups that share the slots; each reads k / heads of its own, and has its own query with
    `projections`."""
    projections: bool = False
    """Learn a query and an output projection (they start as the identity with `init: ff`)."""
    skip_connection: bool = True
    """Add a linear map of the hidden state that replaces the mean output of slots that are not
    read."""
    search: Literal["exact", "int8", "ivf"] = "exact"
    """How slots are selected once trained: `exact` by scores of all keys, `int8` by keys in 8 bits,
    `ivf` among candidates of faiss's inverted file. Training selects by scores of all keys, up to
    12,000 slots."""
    value_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the values in a saved student; `int8` has one scale per row. Training is in
    float32."""
    offload: Literal["none", "values", "slots"] = "none"
    """What a saved student reads from disk row by row: nothing, values, or values and keys (with
    `search: int8`)."""

    @property
    def has_slots(self) -> bool:
        """Whether the layer gets slots."""
        return True

    @property
    def copies_block(self) -> bool:
        """Whether the slots begin as the neurons of the replaced block."""
        return self.init == "ff" and self.has_slots

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        return self.copies_block and self.num_slots is not None

    def check(self) -> None:
        """Raise `ArgumentError` where fields contradict each other."""
        if self.num_slots is not None:
            self.check_block(self.num_slots)
        if self.mean_k is not None and self.k != "auto":
            raise ArgumentError(
                f"{ARG}mean_k is used with {ARG}k=auto alone, got {ARG}k={format_value(self.k)}; "
                "leave one of them out"
            )
        if isinstance(self.k, int) and self.k % self.heads:
            raise ArgumentError(f"{ARG}k={self.k} must be a multiple of {ARG}heads={self.heads}")
        if self.activation in ("softmax", "distance"):
            if self.selection != "score":
                raise ArgumentError(
                    f"{ARG}selection={self.selection} needs a weight per slot, which "
                    f"{ARG}activation={self.activation} does not have; set {ARG}selection=score"
                )
            if self.gradient == "straight_through":
                raise ArgumentError(
                    f"{ARG}gradient=straight_through needs {ARG}activation=block or relu, got "
                    f"{self.activation}"
                )
        self._check_search()
        if self.k == "auto" and self.selection == "score":
            raise ArgumentError(
                f"{ARG}k=auto compares slots of all layers, which scores do not allow; set {ARG}k "
                f"to a number or {ARG}selection=contribution, got {ARG}selection=score"
            )
        if self.k == "auto" and self.heads > 1 and not self.projections:
            raise ArgumentError(
                f"{ARG}heads={self.heads} divide k, which {ARG}k=auto does not; set {ARG}k to a "
                f"number, or {ARG}projections=true to give each head a query of its own"
            )

    def _check_search(self) -> None:
        if self.offload == "slots" and self.search != "int8":
            raise ArgumentError(
                f"{ARG}offload=slots leaves keys on disk, where only their 8-bit codes can be "
                f"searched; set {ARG}search=int8 or {ARG}offload=values, got "
                f"{ARG}search={self.search}"
            )
        if self.offload == "slots" and self.activation == "distance":
            raise ArgumentError(
                f"{ARG}activation=distance needs the length of every key, which "
                f"{ARG}offload=slots leaves on disk; set {ARG}offload=values"
            )
        if self.search == "exact":
            return
        if self.heads > 1:
            raise ArgumentError(
                f"{ARG}search={self.search} searches for one head, got {ARG}heads={self.heads}; "
                f"set {ARG}search=exact"
            )
        if self.gradient == "straight_through":
            raise ArgumentError(
                f"{ARG}gradient=straight_through reaches every slot, {ARG}search={self.search} "
                f"does not score all of them; set {ARG}search=exact"
            )
        if self.search != "int8" and self.selection == "centered":
            raise ArgumentError(
                f"{ARG}search={self.search} finds large weights, not unusual ones; set "
                f"{ARG}selection=contribution or {ARG}search=int8, got {ARG}selection=centered"
            )

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        num_slots = self.num_slots or num_neurons
        for name, count in (("k", self.k), ("mean_k", self.mean_k)):
            if isinstance(count, int) and count > num_slots:
                raise ArgumentError(
                    f"{ARG}{name} must be in [1, {ARG}num_slots={num_slots}], got {count}"
                )
        if num_slots % self.heads:
            raise ArgumentError(
                f"{ARG}num_slots={num_slots} must be a multiple of {ARG}heads={self.heads}"
            )
        if not gated:
            return
        if self.activation in ("softmax", "distance"):
            raise ArgumentError(
                f"{ARG}activation={self.activation} has no gains, and the blocks of this model are "
                f"gated; set {ARG}activation=block or relu"
            )
        if self.search == "ivf":
            raise ArgumentError(
                f"{ARG}search={self.search} searches one key per slot, and the blocks of this "
                f"model are gated, with two; set {ARG}search=exact or int8"
            )


@dataclass(frozen=True)
class AssociativeConfig(FeaturalConfig):
    """Settings of an associative memory: kNN attention over stored rows, beside a featural `base`.

    The fields of `FeaturalConfig` are those of the base.
    """

    kind_name: ClassVar[str] = "associative"

    base: Literal["featural", "none"] = "featural"
    """What is added to the rows: a featural memory made by the settings above, or nothing."""
    value_target: Literal["residual", "teacher", "projection"] = "residual"
    """Value of a row: the teacher's output minus the base's, the teacher's output, or a learned
    projection (without a teacher)."""
    knn_k: int = bounded(8, minimum=1)
    """Stored rows read per token."""
    min_distance: float = bounded(0.2, minimum=0, maximum=2)
    """A state is not stored where the nearest row is at most this far (keys have length 1)."""
    merge_distance: float = bounded(0.55, minimum=0, maximum=2)
    """A state beyond `min_distance` is merged into the nearest row up to this distance, and added
    beyond it."""
    capacity: int = bounded(65_536, minimum=1)
    """Most rows of a layer; the coldest that are not pinned are evicted."""
    lrfu_decay: float = bounded(0.01, minimum=0, maximum=1)
    """What is evicted first: 0 the least frequently, 1 the least recently read, between them LRFU;
    heat halves in 1 / this steps."""
    index: Literal["exact", "bf16", "flat", "ivf"] = "exact"
    """How rows are searched: all compared, exactly; all in bfloat16 and the nearest exactly (one
    row in ten thousand is missed where rows lie `merge_distance` apart, more where they crowd); or
    by faiss, `ivf` from 10,000 rows on, which may miss some, and others after a resume."""
    write_start: float = bounded(0.8, minimum=0, maximum=1)
    """Fraction of the end-to-end stage after which rows are written and read; before it the base
    learns alone."""

    @property
    def has_slots(self) -> bool:
        """Whether the layer gets slots."""
        return self.base == "featural"

    def check(self) -> None:
        """Raise `ArgumentError` where fields contradict each other."""
        super().check()
        if self.base == "none" and self.value_target == "residual":
            raise ArgumentError(
                f"{ARG}value_target=residual is the difference to a base, and {ARG}base=none; set "
                f"{ARG}value_target=teacher or projection"
            )


@dataclass(frozen=True)
class _SavedRowsConfig(MemoryConfig):
    """Settings of a memory that reads a few of its rows: how a saved student stores them."""

    value_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the values in a saved student; `int8` has one scale per row. Training is in
    float32."""
    offload: Literal["none", "values"] = "none"
    """What a saved student reads from disk row by row: nothing, or the values."""


@dataclass(frozen=True)
class NoMemoryConfig(MemoryConfig):
    """Settings of no memory at all: the mean output of the block, for every token the same."""

    kind_name: ClassVar[str] = "none"


@dataclass(frozen=True)
class LowRankConfig(MemoryConfig):
    """Settings of a linear map of low rank in place of the feed-forward block."""

    kind_name: ClassVar[str] = "low_rank"

    rank: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """With `kind: low_rank`, rank of the map; empty means one sixteenth of the width."""


@dataclass(frozen=True)
class PrunedConfig(MemoryConfig):
    """Settings of a block that keeps fewer neurons, all read for every token."""

    kind_name: ClassVar[str] = "pruned"

    num_slots: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Neurons that remain; empty means one sixteenth of the block's."""

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        return True

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        if self.num_slots is not None and self.num_slots > num_neurons:
            raise ArgumentError(
                f"{ARG}num_slots must be in [1, {num_neurons}], the neurons of the block, got "
                f"{self.num_slots}"
            )


@dataclass(frozen=True)
class ExpertsConfig(_SavedRowsConfig):
    """Settings of the block's neurons in groups, of which a router chooses some for each token."""

    kind_name: ClassVar[str] = "experts"

    expert_size: int = bounded(32, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """With `kind: experts`, neurons of an expert; `k` is a multiple of it."""
    k: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Neurons read per token, those of whole experts; empty means one sixteenth of them."""

    def check(self) -> None:
        """Raise `ArgumentError` where fields contradict each other."""
        if self.k is not None and self.k % self.expert_size:
            raise ArgumentError(
                f"{ARG}k={self.k} must be a multiple of {ARG}expert_size={self.expert_size}"
            )

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        if num_neurons % self.expert_size:
            raise ArgumentError(
                f"{ARG}expert_size must divide {num_neurons}, the neurons of the block, got "
                f"{self.expert_size}"
            )
        if self.k is not None and self.k > num_neurons:
            raise ArgumentError(
                f"{ARG}k must be in [1, {num_neurons}], the neurons of the block, got {self.k}"
            )


def round_up_to_square(count: int) -> int:
    """Return the smallest square that is at least `count`, a positive number."""
    return (math.isqrt(count - 1) + 1) ** 2


@dataclass(frozen=True)
class _ProductKeySearchConfig(_SavedRowsConfig):
    """Settings of a search by product keys."""

    num_slots: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Slots of the memory, a square number; empty means the first at least the block's neurons."""
    k: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Slots read per token, k / heads by each head; empty means one sixteenth of the neurons."""
    heads: int = bounded(4, minimum=1, limit=2**10)
    """Queries of a token, each with sub-keys of its own."""
    key_width: Optional[int] = bounded(None, minimum=2, limit=2**14)
    """With `kind: product_key` or `peer`, size of a query, an even number; empty means the
    width."""

    def check(self) -> None:
        """Raise `ArgumentError` where fields contradict each other."""
        self._check_num_slots(self.num_slots)
        if self.k is not None and self.k % self.heads:
            raise ArgumentError(f"{ARG}k={self.k} must be a multiple of {ARG}heads={self.heads}")
        if self.key_width is not None and self.key_width % 2:
            raise ArgumentError(f"{ARG}key_width must be an even number, got {self.key_width}")

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        self._check_num_slots(self.num_slots or round_up_to_square(num_neurons))

    def _check_num_slots(self, num_slots: int | None) -> None:
        if num_slots is None:
            return
        low = math.isqrt(num_slots)
        if low**2 != num_slots:
            raise ArgumentError(
                f"{ARG}num_slots must be a square number, since keys are pairs, got {num_slots}; "
                f"the nearest are {max(1, low**2)} and {(low + 1) ** 2}"
            )
        if self.k is not None and self.k > num_slots * self.heads:
            raise ArgumentError(
                f"{ARG}k must be at most {num_slots * self.heads}, {ARG}num_slots for each of "
                f"{ARG}heads={self.heads}, got {self.k}"
            )


@dataclass(frozen=True)
class ProductKeyConfig(_ProductKeySearchConfig):
    """Settings of a product-key memory: a large table whose keys are pairs of sub-keys."""

    kind_name: ClassVar[str] = "product_key"

    silu_gate: bool = False
    """With `kind: product_key`, multiply what is read by a gate and map it linearly, as Memory+."""


@dataclass(frozen=True)
class PeerConfig(_ProductKeySearchConfig):
    """Settings of a block's own neurons, each an expert, found by product keys."""

    kind_name: ClassVar[str] = "peer"

    heads: int = bounded(8, minimum=1, limit=2**10)
    """Queries of a token, each with sub-keys of its own."""

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        return self.num_slots is not None


@dataclass(frozen=True)
class TranscoderConfig(_SavedRowsConfig):
    """Settings of a transcoder: the k largest of many latents, decoded, beside an affine skip."""

    kind_name: ClassVar[str] = "transcoder"

    num_slots: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Latents; empty means one for each neuron of the replaced block."""
    k: Optional[int] = bounded(None, minimum=1, limit=MAX_SLOTS_PER_LAYER)
    """Latents decoded per token; empty means one sixteenth of them."""
    skip_connection: bool = True
    """Add an affine map of the hidden state."""

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        return self.num_slots is not None

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        num_slots = self.num_slots or num_neurons
        if self.k is not None and self.k > num_slots:
            raise ArgumentError(f"{ARG}k must be in [1, {ARG}num_slots={num_slots}], got {self.k}")


@dataclass(frozen=True)
class _LookupConfig(_SavedRowsConfig):
    """Settings of tables that are read at addresses which the text tells."""

    @property
    def copies_block(self) -> bool:
        """Whether the memory begins as a copy of the block it replaces."""
        return False


@dataclass(frozen=True)
class TokenConfig(_LookupConfig):
    """Settings of a table with a row for each token of the vocabulary."""

    kind_name: ClassVar[str] = "token"


@dataclass(frozen=True)
class NgramConfig(_LookupConfig):
    """Settings of tables with rows for the last tokens of the text, found by hashing."""

    kind_name: ClassVar[str] = "ngram"

    order: int = bounded(3, minimum=1, maximum=8)
    """With `kind: ngram`, tokens of the longest n-gram; there is a table for each length."""
    num_rows: int = bounded(16_384, minimum=1, limit=2**31)
    """With `kind: ngram`, rows of each table."""
    hash_heads: int = bounded(2, minimum=1, limit=2**10)
    """With `kind: ngram`, rows that an n-gram reads of a table, each with its own part of the
    width."""
    context_gate: bool = False
    """With `kind: ngram`, weigh what is read by the hidden state."""
    learn_rows: bool = True
    """With `kind: ngram`, train the rows by gradient after text has set them, which needs three
    times the memory of the tables."""


@contextmanager
def name_part(index: int) -> Iterator[None]:
    """Name the part of a sum in an `ArgumentError` that is raised inside."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(error.message.replace(ARG, f"{ARG}parts[{index}].")) from None


@dataclass(frozen=True)
class SumConfig(MemoryConfig):
    """Settings of memories that add up."""

    kind_name: ClassVar[str] = "sum"

    parts: list[MemoryConfig] = field(default_factory=lambda: [FeaturalConfig(), NgramConfig()])
    """With `kind: sum`, the memories that add up, as in `[{kind: featural, k: 32}, {kind:
    ngram}]`. The first that can begins as the block; each is calibrated to what those before it
    lack."""

    def check(self) -> None:
        """Raise `ArgumentError` where a part is of a kind that cannot be one."""
        if not self.parts:
            raise ArgumentError(f"{ARG}parts is empty; name at least one, such as {{kind: ngram}}")
        for index, part in enumerate(self.parts):
            if part.kind in ("associative", "dense", "sum"):
                raise ArgumentError(
                    f"{ARG}parts[{index}] must be of another kind than associative, dense and sum, "
                    f"got {part.kind}"
                )
        with_slots = [index for index, part in enumerate(self.parts) if part.has_slots]
        if len(with_slots) > 1:
            first, second = with_slots[:2]
            raise ArgumentError(
                f"{ARG}parts[{second}] must be of another kind than {self.parts[second].kind}: "
                f"{ARG}parts[{first}] has slots already, and only one part is ranked, calibrated "
                f"and counted; give that one more slots or a larger k"
            )

    def check_block(
        self, num_neurons: int, *, gated: bool = False, activation_function: str | None = None
    ) -> None:
        """Raise `ArgumentError` where the memory cannot replace such a block."""
        for index, part in enumerate(self.parts):
            with name_part(index):
                part.check_block(num_neurons, gated=gated, activation_function=activation_function)

    def list_parts(self) -> list[MemoryConfig]:
        """Return the settings of the memories that add up."""
        return self.parts

    @property
    def has_slots(self) -> bool:
        """Whether the layer gets slots."""
        return any(part.has_slots for part in self.parts)

    @property
    def copies_block(self) -> bool:
        """Whether the memory begins as a copy of the block it replaces."""
        return any(part.copies_block for part in self.parts)

    @property
    def resizes_block(self) -> bool:
        """Whether it copies another number of neurons, which are chosen from calibration text."""
        copying = [part for part in self.parts if part.copies_block]
        return bool(copying) and copying[0].resizes_block


# Settings of each kind of memory that can be named without an import. `register_memory` adds to it.
MEMORY_CONFIGS: dict[str, type[MemoryConfig]] = {
    config_class.kind_name: config_class
    for config_class in (
        FeaturalConfig,
        AssociativeConfig,
        DenseConfig,
        NoMemoryConfig,
        LowRankConfig,
        PrunedConfig,
        ExpertsConfig,
        ProductKeyConfig,
        PeerConfig,
        TranscoderConfig,
        TokenConfig,
        NgramConfig,
        SumConfig,
    )
}


@dataclass(frozen=True)
class _CheckedConfig:
    """A group of settings that checks its fields when it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class StudentConfig(_CheckedConfig):
    """Which layers differ, and what is trained."""

    layer_overrides: list[dict[str, Any]] = field(default_factory=list)
    """Per-layer differences, later ones win: `[{layers: 0-1, memory: {k: 64}}, {layers: 3, memory:
    {kind: dense}}]`."""
    trainable: Literal["all", "memory"] = "all"
    """What the end-to-end stage trains: every weight of the student, or the memories alone."""


@dataclass(frozen=True)
class DataConfig(_CheckedConfig):
    """Text, and how it is cut into windows."""

    corpora: list[str] = field(default_factory=lambda: ["speeches", "biographies"])
    """Built-in `speeches`, `biographies`, `strangers`, `readings`; a .txt, .md, .jsonl, .json, .csv
    or .parquet file; a folder of them; `hub:<dataset>[:<config>]`."""
    mixture_weights: list[float] = field(default_factory=list)
    """Share of the training windows that each corpus gets, for example `[3, 1]`; empty means by
    size."""
    seq_len: int = bounded(256, minimum=2, limit=2**20)
    """Tokens in one training window; validation and test use the same window without overlap."""
    batch_size: int = bounded(8, minimum=1, limit=2**20)
    """Windows in one optimizer step, all processes together."""
    micro_batch_size: int = bounded(4, minimum=1, limit=2**20)
    """Windows computed at once: fewer need less memory; gradients are the same, and of two
    processes the same to the last bit."""
    validation_tokens: int = bounded(16_384, minimum=1)
    """Tokens per corpus measured while training."""
    test_tokens: int = bounded(65_536, minimum=1)
    """Tokens per corpus measured at the end; fewer where the corpus has fewer."""
    field: Optional[str] = None
    """Field that holds the text of a JSON object, a table row or a hub row; empty takes `text`,
    `content`, `messages` (a chat), or `prompt` and `completion`."""

    def __post_init__(self) -> None:
        """Check every field, then what fields say together."""
        super().__post_init__()
        if not self.corpora:
            raise ArgumentError(
                f"{ARG}corpora is empty; name at least one of speeches, biographies, a file, a "
                "folder, hub:<dataset>"
            )
        weights = self.mixture_weights
        if weights and (
            len(weights) != len(self.corpora) or min(weights) < 0 or not sum(weights) > 0
        ):
            raise ArgumentError(
                f"{ARG}mixture_weights must be one number >= 0 for each of the "
                f"{len(self.corpora)} {ARG}corpora, got {format_value(weights)}"
            )


@dataclass(frozen=True)
class LossConfig(_CheckedConfig):
    """Weights of the loss terms."""

    kl: float = bounded(1.0, minimum=0)
    """Weight of KL(teacher || student) in nats per token, with temperature squared."""
    reverse_kl: float = bounded(0.0, minimum=0)
    """Weight of KL(student || teacher) in nats per token, with temperature squared."""
    ce: float = bounded(0.0, minimum=0)
    """Weight of the cross-entropy of the next token of the text, in nats per token."""
    hidden_mse: float = bounded(1.0, minimum=0)
    """Weight of the squared error of the last hidden state, as a fraction of its variance."""
    block_fvu: float = bounded(1.0, minimum=0)
    """Weight of the squared error of each replaced block's output, as a fraction of its variance,
    mean over layers."""
    hidden_cosine: float = bounded(0.0, minimum=0)
    """Weight of one minus the cosine between the last hidden states."""
    temperature: float = bounded(1.0, above=0)
    """Divides the logits of both sides in `kl` and `reverse_kl`."""
    chunk_size: int = bounded(0, minimum=0)
    """Tokens whose logits exist at once in the loss; 0 means all. Same value and gradient, less
    memory."""
    extra: dict[str, float] = field(default_factory=dict)
    """Weights of losses of your own by name, as in `{my_loss: 0.5}`; a name is registered with
    `dmt.register_loss`, or is `my_package.my_module:my_loss`, which is imported."""

    def __post_init__(self) -> None:
        """Check every field, then names and weights in `extra`."""
        super().__post_init__()
        extra, terms = {}, [*LOSS_TERMS, "loss"]
        for name, weight in self.extra.items():
            if (term := str(name).rpartition(":")[2]) in terms:
                raise ArgumentError(f"{ARG}extra: two losses are named {term}; rename one of them")
            terms.append(term)
            extra[str(name)] = coerce(float, weight, f"{ARG}extra.{name}")
            if extra[name] < 0:
                raise ArgumentError(f"{ARG}extra.{name} must be at least 0, got {weight}")
        object.__setattr__(self, "extra", extra)

    def term_weights(self) -> dict[str, float]:
        """Return the weights that are not zero by term; an imported loss has its last name."""
        weights = {term: getattr(self, term) for term in LOSS_TERMS}
        weights |= {name.rpartition(":")[2]: weight for name, weight in self.extra.items()}
        return {term: weight for term, weight in weights.items() if weight}


# The settings in `loss` that are weights; each is the name of its term.
LOSS_TERMS = tuple(
    f.name for f in fields(LossConfig) if f.name not in ("temperature", "chunk_size", "extra")
)


@dataclass(frozen=True)
class StagesConfig(_CheckedConfig):
    """Length and learning rate of each stage of a distillation."""

    calibration_tokens: int = bounded(8_192, minimum=0, limit=2**24)
    """Tokens from which slot means and output biases are measured before any gradient step; 0 skips
    it."""
    lookup_tokens: int = bounded(409_600, minimum=0, limit=2**31)
    """Tokens from which the rows of `ngram` are set after that; 0 takes those of the
    calibration."""
    layerwise_steps: int = bounded(100, minimum=0, limit=2**31)
    """Steps in which each memory learns its own block's output from the teacher's inputs; 0 skips
    them."""
    layerwise_lr: float = bounded(2e-3, above=0)
    """Peak learning rate of the layer-wise stage."""
    layerwise_loss: Literal["fvu", "mse"] = "fvu"
    """Squared error of each memory as a fraction of its block's variance, or unscaled (later layers
    then weigh more)."""
    end_to_end_steps: int = bounded(1_300, minimum=0, limit=2**31)
    """Steps in which the whole student learns the teacher's distribution; 0 skips them."""
    end_to_end_lr: float = bounded(1e-3, above=0)
    """Peak learning rate of the end-to-end stage."""
    k_warmup_factor: float = bounded(1.0, minimum=1)
    """Slots read in the layer-wise stage and when the end-to-end stage begins, as a multiple of k;
    1 from its middle on. A shared budget follows slowly."""


@dataclass(frozen=True)
class OptimConfig(_CheckedConfig):
    """AdamW and its schedule."""

    warmup_steps: int = bounded(20, minimum=0)
    """Steps of linear warm-up at the start of each stage; a cosine down to `min_lr_ratio`
    follows."""
    min_lr_ratio: float = bounded(0.01, minimum=0, maximum=1)
    """Learning rate at the end of a stage, as a fraction of its peak."""
    beta1: float = bounded(0.9, minimum=0, below=1)
    """AdamW's decay of the mean gradient."""
    beta2: float = bounded(0.98, minimum=0, below=1)
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = bounded(0.0, minimum=0)
    """AdamW's weight decay on matrices; biases and norms have none."""
    value_lr_scale: float = bounded(1.0, minimum=0)
    """Learning rate of slot values, as a multiple of the others'."""
    grad_clip: float = bounded(1.0, minimum=0)
    """Largest gradient norm of a step; 0 means no clipping."""


@dataclass(frozen=True)
class StoreConfig(_CheckedConfig):
    """The database of stored rows."""

    url: Optional[str] = None
    """Where rows are stored: a file, postgresql:// or a scheme of `dmt.register_store`; empty means
    `memory.db` in the run's folder."""
    value_dtype: Literal["float32", "float16"] = "float32"
    """Type of stored values; float16 takes half the space, and a resumed run then differs in the
    last digits."""
    flush_every: int = bounded(20, minimum=1)
    """Steps between two writes of row usage; rows themselves are written at every step."""


@dataclass(frozen=True)
class LogitCacheConfig(_CheckedConfig):
    """The teacher's distributions, stored on disk."""

    dir: Optional[str] = None
    """Folder of the teacher's distributions for the end-to-end stage, which then learns from
    `loss.kl` and `loss.ce` alone; made first where it is missing. Empty means that the teacher runs
    at every step."""
    top_k: int = bounded(128, minimum=16)
    """Outcomes stored of each token's distribution, the likeliest and a sample of the rest: 6 bytes
    each."""


@dataclass(frozen=True)
class KnowledgeConfig(_CheckedConfig):
    """Facts that leave the weights of the student for a pack."""

    facts: Optional[str] = None
    """What the student must not know and a pack knows: a corpus with questions, such as
    `biographies`, or a .jsonl file of facts or of texts with marked spans; empty means nothing."""
    weight: float = bounded(5.0, minimum=0)
    """Weight of the loss at answers of these facts, where the student learns what its teacher says
    about strangers."""
    noise: float = bounded(1.0, minimum=0, maximum=1)
    """Share of noise in the memories before training; 1 means new slots."""
    backbone_noise: float = bounded(0.0, minimum=0, maximum=1)
    """The same in attention and embeddings, which carry a part of the facts, too."""


@dataclass(frozen=True)
class ContextConfig(_CheckedConfig):
    """A context to be consolidated into a model (task: consolidate)."""

    text: Optional[str] = field(default=None, metadata={"multiline": True})
    """The context (task: consolidate); or name a `file`."""
    file: Optional[str] = None
    """A UTF-8 text file that holds the context; where it is longer than the model reads at once, it
    is cut into chunks."""
    questions: Optional[str] = None
    """A .jsonl file, `{"prompt": ..., "answer": ...}` a line and optionally `"kind"`: asked with
    the context, without, and after."""
    target: Literal["memory", "weights", "prompt"] = "memory"
    """Where it goes: rows beside the student's weights, the weights themselves, or embeddings
    before every text."""
    objective: Literal["causal_lm", "logits", "hidden_last", "hidden_all", "generated"] = (
        "generated"
    )
    """What is learned after the context, at every position: `causal_lm`: the context's own tokens,
    without a teacher; `logits`, `hidden_last`, `hidden_all`: what the model with context computes
    on the repeated context; `generated`: its distributions on that, on its continuations and on
    questions it asks itself."""
    row_method: Literal["activation_delta", "gradient", "trained"] = "activation_delta"
    """With `target: memory`, what a row adds: the difference that the context makes to a layer, in
    one pass; one gradient step; or the first, trained by the objective."""
    trainable: Literal["all", "lora", "slots"] = "lora"
    """With `target: weights`, which: all of them, a low-rank addition to each matrix (merged at the
    end), or slots of memories."""
    lora_rank: int = bounded(8, minimum=1, limit=2**14)
    """With `trainable: lora`, its rank."""
    prompt_length: int = bounded(16, minimum=1, limit=2**16)
    """With `target: prompt`, how many embeddings."""
    num_samples: int = bounded(96, minimum=1, limit=2**16)
    """Texts that `generated` samples from the model with context, for each chunk; drawn again every
    `resample_every` steps."""
    qa_per_sentence: int = bounded(6, minimum=0, limit=2**10)
    """Questions with answers that `generated` lets the model write about each sentence, few-shot; 0
    means none."""
    resample_every: int = bounded(25, minimum=1)
    """Steps after which `generated` samples new texts."""
    temperature: float = bounded(0.8, above=0)
    """Sampling temperature."""
    unrelated_kl_weight: float = bounded(1.0, minimum=0)
    """Weight of the KL on unrelated text (`data`), where nothing should change."""
    max_tokens: int = bounded(65_536, minimum=1)
    """Most tokens of a context."""


@dataclass(frozen=True)
class SleepConfig(_CheckedConfig):
    """Facts and rows of a student to be moved into the slots of a new student (task: sleep)."""

    tag: Optional[str] = None
    """Only facts and rows filed under this tag are moved into slots (task: sleep); empty means
    all."""
    min_hits: int = bounded(0, minimum=0)
    """Only facts and rows that fired at least this often."""
    steps: int = bounded(200, minimum=1, limit=2**31)
    """Training steps."""
    lr: float = bounded(0.03, above=0, maximum=1)
    """Peak learning rate, in preconditioned units: equally long steps change predictions on
    unrelated text equally."""
    momentum: float = bounded(0.9, minimum=0, below=1)
    """Momentum of SGD."""
    warmup_steps: int = bounded(10, minimum=0)
    """Steps of linear warm-up."""
    examples_per_step: int = bounded(64, minimum=2, limit=2**16)
    """Replay examples of new facts in a step, and half as many of facts that earlier transfers have
    moved."""
    max_paraphrases: int = bounded(3_000, minimum=0, limit=2**20)
    """Most sentences of the training text in which a fact's subject replaces a name."""
    kl_tolerance: float = bounded(0.1, minimum=0)
    """KL in nats per position of new facts that counts as learned."""
    num_windows: int = bounded(384, minimum=1, limit=2**20)
    """Windows of training text (`data.corpora`) on which nothing should change."""
    max_window_tokens: int = bounded(256, minimum=2, limit=2**20)
    """Tokens of a window, or as many as the model reads."""
    windows_per_step: int = bounded(6, minimum=1, limit=2**16)
    """Windows of training text in a step."""
    unrelated_kl_weight: float = bounded(58.0, minimum=0)
    """Weight of the KL on those windows, in nats per token."""
    fisher_windows: int = bounded(64, minimum=1, limit=2**20)
    """Windows that estimate the Fisher information, which preconditions the steps."""
    damping: float = bounded(0.001, above=0)
    """Added to the Fisher information of every direction, whose mean is 1."""
    eval_tokens: int = bounded(16_384, minimum=2)
    """Tokens of each corpus's validation text on which the KL of the result is measured."""


@dataclass(frozen=True)
class TrainerConfig(_CheckedConfig):
    """Where a run is written, and what it is computed on."""

    log_dir: str = "lightning_logs"
    """Each run makes a new folder `version_N` in here."""
    run_name: Optional[str] = None
    """Name of the run's folder, and so of its curves; empty gives the next number. A resumed run
    keeps its own."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """What to compute on; `auto` takes what is available."""
    devices: int = bounded(1, minimum=1, limit=2**8)
    """Processes, each with a device of its own, that share each step's windows (DDP); torchrun's
    number where it is used."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Lightning's precision; `auto` times a step and takes `bf16-mixed` where it is clearly faster
    than `32-true`."""
    num_threads: int = bounded(0, minimum=0, limit=2**10)
    """Threads each process computes with; 0 measures one against all cores at the start and takes
    the faster."""
    log_every: int = bounded(10, minimum=1)
    """Steps between two points of the loss curves."""
    validate_every: int = bounded(200, minimum=0)
    """Steps between two measurements on validation text; 0 skips them."""
    checkpoint_every: int = bounded(200, minimum=1)
    """Steps between two checkpoints."""
    progress_bar: bool = True
    """Show progress: a bar in a terminal or a notebook, otherwise a line in the log every 30
    seconds."""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard", "csv"])
    """Where curves go: `tensorboard`, `csv` (the report needs it), `wandb`, `mlflow`, `comet`,
    `neptune`, or the path of a Lightning logger's class."""


@dataclass(frozen=True)
class Config(_CheckedConfig):
    """All settings of a run."""

    task: Literal["distill", "consolidate", "sleep"] = "distill"
    """`distill` a student from a teacher, `consolidate` a context into a model, or `sleep`: move a
    student's rows into slots."""
    seed: int = bounded(0, minimum=0, limit=2**32 - 1)
    """Fixes initial weights, data order and sampled text."""
    teacher: str = "embedded"
    """`embedded` (ships with dmt), `reader` (the same, trained to use what it reads), `smollm2`, a
    hub name such as `gpt2`, or a local folder made by `save_pretrained`; with `task: consolidate`
    or `sleep` also a saved student."""
    student: StudentConfig = field(default_factory=StudentConfig)
    memory: MemoryConfig = field(default_factory=FeaturalConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    logit_cache: LogitCacheConfig = field(default_factory=LogitCacheConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
