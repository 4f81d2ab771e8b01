"""Every metric that a run logs: its tag, its unit, and what it says.

`docs/reference/metrics.md` is generated from this table. A test checks that runs log nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged value.

    Attributes:
        tag: its name in TensorBoard and `metrics.csv`; `<corpus>` and `<layer>` stand for names.
        unit: the unit, or what it is a share of.
        description: one sentence.
        better: `lower`, `higher`, or empty where neither is better.
    """

    tag: str
    unit: str
    description: str
    better: str = ""

    @property
    def pattern(self) -> str:
        """A regular expression for the tags that this entry describes."""
        return re.sub(r"<\w+>", "[^/]+", self.tag)


METRICS = (
    Metric("train/loss", "weighted sum", "Loss of the stage in progress.", "lower"),
    Metric("train/kl", "nats/token", "KL(teacher || student), temperature squared.", "lower"),
    Metric("train/reverse_kl", "nats/token", "KL(student || teacher).", "lower"),
    Metric("train/ce", "nats/token", "Cross-entropy of the next token.", "lower"),
    Metric("train/hidden_mse", "share of variance", "Error of the last hidden state.", "lower"),
    Metric("train/block_fvu", "share of variance", "Error of block outputs, mean.", "lower"),
    Metric("train/hidden_cosine", "1 - cosine", "Angle of the last hidden states.", "lower"),
    Metric("train/layerwise_loss", "share of variance", "Layer-wise stage: error, mean.", "lower"),
    Metric("train/kl_unrelated", "nats/token", "Consolidation: KL on unrelated text.", "lower"),
    Metric("train/kl_new", "nats/token", "Sleep: loss of the facts that are transferred.", "lower"),
    Metric("train/kl_replay", "nats/token", "Sleep: loss of the replay set.", "lower"),
    Metric("train/row_error/layer_<layer>", "share of variance", "Sleep: error of rows.", "lower"),
    Metric("lr", "", "Learning rate."),
    Metric("val/<corpus>/kl", "nats/token", "KL(teacher || student) on validation text.", "lower"),
    Metric("val/<corpus>/ppl_ratio", "ratio", "Student perplexity / teacher perplexity.", "lower"),
    Metric("val/<corpus>/top1_agreement", "share", "Tokens with the same top-1.", "higher"),
    Metric("val/<corpus>/student_perplexity", "perplexity", "The student's.", "lower"),
    Metric("val/<corpus>/teacher_perplexity", "perplexity", "The teacher's."),
    Metric("val/fvu/layer_<layer>", "share of variance", "Error of one block's output.", "lower"),
    Metric("val/benefit_retained", "share", "Consolidation: benefit of the context.", "higher"),
    Metric("val/question_recall", "share", "Consolidation: right answers.", "higher"),
    Metric("slots/active_per_token/layer_<layer>", "slots", "Slots read per token."),
    Metric("slots/used_fraction/layer_<layer>", "share", "Slots read at least once."),
    Metric("slots/dead/layer_<layer>", "share", "Slots that no token read.", "lower"),
    Metric("slots/usage_entropy/layer_<layer>", "share of maximum", "Evenness of usage."),
    Metric("slots/log10_reads/layer_<layer>", "log10", "Histogram of reads per slot."),
    Metric("knn/rows/layer_<layer>", "rows", "Stored rows."),
    Metric("knn/inserted/layer_<layer>", "rows/step", "Rows inserted."),
    Metric("knn/merged/layer_<layer>", "rows/step", "Rows merged into a neighbor."),
    Metric("knn/evicted/layer_<layer>", "rows/step", "Rows evicted."),
    Metric("knn/null_weight/layer_<layer>", "share", "Attention weight of the null logit."),
    Metric("knn/nearest_distance/layer_<layer>", "distance", "Distance of the nearest row."),
    Metric("knn/row_age_seconds/layer_<layer>", "seconds", "Histogram of row ages."),
    Metric("knn/log10_row_reads/layer_<layer>", "log10", "Histogram of reads per row."),
    Metric("samples/<corpus>", "text", "Continuations of teacher and student."),
)


def describe_metric(tag: str) -> Metric | None:
    """Return the entry that describes a logged tag, or None."""
    return next((metric for metric in METRICS if re.fullmatch(metric.pattern, tag)), None)
