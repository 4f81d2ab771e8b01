"""Every setting, its default and its meaning. The text under a field is what `--help` prints.

Nothing here imports torch or transformers: a misspelled setting is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional


@dataclass(frozen=True)
class MemoryConfig:
    kind: Literal["featural", "associative", "dense"] = "featural"
    """`featural`: a learnt top-k memory in place of the feed-forward block; `associative`: stored rows, written while
    training, beside a `base`; `dense`: leave the block as it is."""
    init: Literal["ff", "random"] = "ff"
    """`ff`: slots are the neurons of the block replaced, so k = slots equals the teacher; `random`: from scratch."""
    activation: Literal["block", "relu", "softmax", "distance"] = "block"
    """Score to weight: the block's own activation, relu, softmax over the k scores, or a kernel of the distance."""
    selection: Literal["score", "contribution", "centered"] = "contribution"
    """Which k slots are read: highest score, largest |weight| x |value|, or largest |weight - its mean| x |value|."""
    metric: Literal["euclidean", "fisher"] = "fisher"
    """Length of a value in the ranking: Euclidean, or how far it moves the model's answer, measured by calibration."""
    gradient: Literal["selected", "straight_through"] = "selected"
    """Gradient of the scores: of the k slots that were read, or as if all slots had been (straight-through)."""
    num_slots: Optional[int] = None
    """Rows of the memory; empty means as many as the block replaced has neurons."""
    fewer: Literal["merge", "drop"] = "merge"
    """With fewer slots than neurons, the least used are folded into the values of the others, or left out."""
    more: Literal["split", "new"] = "split"
    """With more, the most used neurons are split, or pairs of random slots that cancel out are added."""
    k: int | Literal["auto"] | None = "auto"
    """Slots read per token; empty means one sixteenth of the slots; `auto`: their mean is `budget`, spent where it pays."""
    mean_k: Optional[int] = None
    """Of `k: auto`, mean slots read per token and layer; empty means one sixteenth of the slots."""
    heads: int = 1
    """Groups that share out the slots; each reads k / heads of its own, and has its own query with `projections`."""
    projections: bool = False
    """Learn a query and an output projection (they start as the identity with `init: ff`)."""
    skip_connection: bool = True
    """Beside the slots, a linear map of the hidden state that takes over what unread slots say on average."""
    search: Literal["exact", "int8", "ivf", "product"] = "exact"
    """How slots are found: `exact` scores all; the others find candidates to score: from keys in 8 bits, by faiss's
    inverted file, or by product keys, the last two made from the keys there are. Used where that is faster."""
    value_dtype: Literal["float32", "float16", "int8"] = "float32"
    """What values are kept in once the student is saved; with `int8` a row has one scale. Training is in float32."""
    offload: Literal["none", "values", "slots"] = "none"
    """What a saved student leaves on the disk and reads row by row: nothing, values, or values and keys (with `search: int8`)."""
    base: Literal["featural", "none"] = "featural"
    """Of `kind: associative`, what speaks beside the rows: a featural memory made by the settings above, or nothing."""
    value_target: Literal["residual", "teacher", "projection"] = "residual"
    """Value of a row: what the base lacks of the teacher's answer, that answer, or a learnt projection (without a teacher)."""
    knn_k: int = 8
    """Stored rows read per token."""
    min_distance: float = 0.2
    """Distance (keys have length 1) up to which something nearest is known already, so that nothing is written."""
    merge_distance: float = 0.55
    """Distance up to which, beyond `novelty`, a row is merged into the nearest one instead of being added."""
    capacity: int = 65_536
    """Most rows a layer keeps; the coldest that are not pinned leave."""
    lrfu_decay: float = 0.01
    """What leaves first: 0 the least frequently, 1 the least recently read, between them LRFU; heat halves in 1 / this steps."""
    index: Literal["exact", "bf16", "flat", "ivf", "hnsw"] = "exact"
    """How stored rows are found: all compared, exactly; all in half precision and the nearest exactly (one row in ten
    thousand is missed where rows lie `recombine` apart, more where they crowd); or by faiss, `ivf` from 10,000 rows on,
    which may miss some, and others after a resume."""
    write_start: float = 0.8
    """Share of the end-to-end stage after which rows are written and read; before it the base learns alone."""


@dataclass(frozen=True)
class StudentConfig:
    layer_overrides: list[dict[str, Any]] = field(default_factory=list)
    """Per-layer differences, later ones win: `[{layers: 0-1, memory: {k: 64}}, {layers: 3, memory: {kind: dense}}]`."""
    trainable: Literal["all", "memory"] = "all"
    """What the end-to-end stage may change: every weight of the student, or the memories alone."""


@dataclass(frozen=True)
class DataConfig:
    corpora: list[str] = field(default_factory=lambda: ["speeches", "biographies"])
    """Built-in `speeches`, `biographies`, `strangers`, `readings`; a .txt or .jsonl file; a folder of them;
    `hub:<dataset>[:<config>]`."""
    mixture_weights: list[float] = field(default_factory=list)
    """What part of the training windows each corpus gives, `[3, 1]` say; empty means by size."""
    seq_len: int = 256
    """Tokens in one training window; validation and test use the same window without overlap."""
    batch_size: int = 8
    """Windows in one optimiser step, all processes together."""
    micro_batch_size: int = 4
    """Windows computed at once: fewer need less memory; gradients are the same, and of two processes the same to the last bit."""
    validation_tokens: int = 16_384
    """Tokens per corpus measured while training."""
    test_tokens: int = 65_536
    """Tokens per corpus measured at the end; fewer where the corpus has fewer."""


@dataclass(frozen=True)
class LossConfig:
    kl: float = 1.0
    """Weight of KL(teacher || student) in nats per token, with temperature squared."""
    reverse_kl: float = 0.0
    """Weight of KL(student || teacher) in nats per token, with temperature squared."""
    ce: float = 0.0
    """Weight of the cross-entropy of the next token of the text, in nats per token."""
    hidden_mse: float = 1.0
    """Weight of the squared error of the last hidden state, as a fraction of its variance."""
    block_fvu: float = 1.0
    """Weight of the squared error of each replaced block's output, as a fraction of its variance, mean over layers."""
    hidden_cosine: float = 0.0
    """Weight of one minus the cosine between the last hidden states."""
    temperature: float = 1.0
    """Divides the logits of both sides in `kl` and `reverse_kl`."""
    chunk_size: int = 0
    """Tokens whose logits exist at once in the loss; 0 means all. Same value and gradient, less memory."""


LOSS_TERMS = tuple(
    f.name for f in fields(LossConfig) if f.name not in ("temperature", "chunk_size")
)
"""The settings in `loss` that are weights; each is the name of its term."""


@dataclass(frozen=True)
class StagesConfig:
    calibration_tokens: int = 8_192
    """Tokens from which slot means and output biases are measured before any gradient step; 0 leaves it out."""
    layerwise_steps: int = 100
    """Steps in which each memory learns its own block's output from the teacher's inputs; 0 leaves it out."""
    layerwise_lr: float = 2e-3
    """Peak learning rate of the layer-wise stage."""
    layerwise_loss: Literal["fvu", "mse"] = "fvu"
    """Squared error of each memory as a fraction of its block's variance, or as it is (later layers then count for more)."""
    end_to_end_steps: int = 1_300
    """Steps in which the whole student learns the teacher's distribution; 0 leaves it out."""
    end_to_end_lr: float = 1e-3
    """Peak learning rate of the end-to-end stage."""
    k_warmup_factor: float = 1.0
    """Slots read when the end-to-end stage begins, as a multiple of k; 1 from its middle on. A shared budget follows slowly."""


@dataclass(frozen=True)
class OptimConfig:
    warmup_steps: int = 20
    """Steps of linear warm-up at the start of each stage; a cosine down to `final_lr` follows."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end of a stage, as a share of its peak."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.98
    """AdamW's memory of the squared gradient."""
    weight_decay: float = 0.0
    """AdamW's weight decay on matrices; biases and norms have none."""
    value_lr_scale: float = 1.0
    """Learning rate of slot values, as a multiple of everybody's."""
    grad_clip: float = 1.0
    """Largest gradient norm of a step; 0 leaves it out."""


@dataclass(frozen=True)
class StoreConfig:
    url: Optional[str] = None
    """Where rows are kept: a file or postgresql://; empty means `memory.db` in the run's folder."""
    value_dtype: Literal["float32", "float16"] = "float32"
    """Type of stored values; float16 takes half the room, and a resumed run then differs in the last digits."""
    flush_every: int = 20
    """Steps between two times that usage of rows is written down; rows themselves are written at every step."""


@dataclass(frozen=True)
class LogitCacheConfig:
    dir: Optional[str] = None
    """Folder in which the teacher's answers are kept for the end-to-end stage, which then learns from `loss.kl` and `ce`
    alone; written first where they are not there. Empty means the teacher is asked."""
    top_k: int = 128
    """Outcomes kept of each token's distribution, the likeliest and a sample of the rest: about 2.3 bytes each."""


@dataclass(frozen=True)
class ContextConfig:
    text: Optional[str] = None
    """The context (task: consolidate), on one line; or name a `file`."""
    file: Optional[str] = None
    """A UTF-8 text file that holds the context; longer than the model reads at once, it is read in windows."""
    questions: Optional[str] = None
    """A .jsonl file, `{"prompt": ..., "answer": ...}` a line and `"kind"` if wanted: asked with the context, without, after."""
    target: Literal["memory", "weights", "prompt"] = "memory"
    """Where it goes: rows beside the student's weights, the weights themselves, or embeddings that stand before every text."""
    objective: Literal["causal_lm", "logits", "hidden_last", "hidden_all", "generated"] = (
        "generated"
    )
    """What is learnt after the context, at every position: `causal_lm`, the context's own words, without a teacher; the answers
    of the model with context, its last hidden states or those of all layers, on the context told again; `generated`: its
    answers on that and on what it goes on with and asks itself."""
    row_method: Literal["activation_delta", "gradient", "trained"] = "activation_delta"
    """Of `into: memory`, what a row adds: the difference the context makes to a layer, in one pass; what one gradient asks for;
    or the first, trained by the objective."""
    trainable: Literal["all", "lora", "slots"] = "lora"
    """Of `into: weights`, which: all of them, a low-rank addition to each matrix (merged in the end), or slots of memories."""
    lora_rank: int = 8
    """Of `weights: lora`, its rank."""
    prompt_length: int = 16
    """Of `into: tokens`, how many embeddings."""
    num_samples: int = 96
    """Texts that `generated` lets the model with context say, for each window; drawn anew every `fresh_every` steps."""
    qa_per_sentence: int = 6
    """Questions, with answers, that `generated` lets the model ask about each sentence, shown how; 0 asks none."""
    resample_every: int = 25
    """Steps after which `generated` draws new texts."""
    temperature: float = 0.8
    """At which they are drawn."""
    unrelated_kl_weight: float = 1.0
    """Weight of KL on unrelated text (`data`), where nothing should change."""
    max_tokens: int = 65_536
    """Most tokens of a context."""


@dataclass(frozen=True)
class PretrainConfig:
    start: Optional[str] = None
    """Teacher to go on from, with its shape and tokenizer; empty means from scratch, by the settings below."""
    width: int = 128
    """Hidden size of the teacher to train (task: pretrain)."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    vocabulary: int = 2_048
    """Tokens of the byte-level BPE vocabulary, trained on the training text."""
    steps: int = 6_000
    """Optimiser steps."""
    lr: float = 3e-3
    """Peak learning rate."""
    output: str = "teacher"
    """Folder the finished teacher is written to; the embedded one lies in `src/dmt/assets`."""


@dataclass(frozen=True)
class TrainerConfig:
    log_dir: str = "lightning_logs"
    """Each run makes a new folder `version_N` in here."""
    run_name: Optional[str] = None
    """What the run's folder is called instead, and so its curves; empty gives the next number. A resumed run keeps its own."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """What to compute on; `auto` takes what is there."""
    devices: int = 1
    """Processes, each with a device of its own, that share each step's windows (DDP); torchrun's number where it is used."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Lightning's precision; `auto` times a step and takes `bf16-mixed` where it is clearly faster than `32-true`."""
    num_threads: int = 0
    """Threads each process computes with; 0 measures one against all cores at the start and keeps the faster."""
    attention: Literal["auto", "sdpa", "batched"] = "auto"
    """While training: torch's fused kernel, or two batched products where it is slow (bfloat16 on a CPU); `auto` times them."""
    log_every: int = 10
    """Steps between two points of the loss curves."""
    validate_every: int = 200
    """Steps between two measurements on validation text; 0 leaves them out."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    progress_bar: bool = True
    """Show the progress bar."""


@dataclass(frozen=True)
class Config:
    task: Literal["distill", "consolidate", "pretrain"] = "distill"
    """`distill` a student from a teacher, `consolidate` a context into a model, or `pretrain` a small GPT-2 to be a teacher."""
    seed: int = 0
    """Fixes initial weights, data order and sampled text."""
    teacher: str = "embedded"
    """`embedded` (ships with dmt), `reader` (the same, taught to use what it reads), `smollm2`, a hub name such as `gpt2`, or a
    local directory made by `save_pretrained`; of `task: consolidate` also a saved student."""
    student: StudentConfig = field(default_factory=StudentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    logit_cache: LogitCacheConfig = field(default_factory=LogitCacheConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
