"""The table of metrics: a run logs nothing that the table leaves out."""

import csv

import pytest
from conftest import newest

from dmt.cli.main import distill_main
from dmt.training.metrics import METRICS, describe_metric

ROWS = ["memory.kind=associative", "memory.write_start=0", "memory.min_distance=0.01"]


@pytest.mark.parametrize("memory", [[], ROWS], ids=["featural", "associative"])
def test_every_logged_tag_is_described(memory, distill_args, tmp_path):
    losses = ["loss.reverse_kl=0.1", "loss.ce=0.1", "loss.hidden_cosine=0.1"]
    assert distill_main([*distill_args, *memory, *losses]) == 0
    with (newest(tmp_path) / "metrics.csv").open(newline="") as file:
        tags = set(csv.DictReader(file).fieldnames) - {"step", "epoch"}
    assert {"train/kl", "val/fvu/layer_0"} <= tags
    assert not {tag for tag in tags if describe_metric(tag) is None}


def test_a_tag_has_one_description():
    tags = [metric.tag for metric in METRICS]
    assert len(set(tags)) == len(tags)
    assert describe_metric("val/news/kl").unit == "nats/token"
    assert describe_metric("loss/of/nothing") is None
