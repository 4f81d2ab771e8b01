"""Our layers compute what the reference implementations compute, where those are installed."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import peer_layers
from benchmarks.peer_layers import NUM_SLOTS, PACKAGES, WIDTH, Pair, draw

from dmt.memory import TranscoderMemory


@pytest.fixture
def peer_main(monkeypatch):
    """The command line with one package, which leaves the number of threads as it is."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peer_layers", *arguments])
        return peer_layers.main()

    return run


def make_pair_with_itself(_):
    memory = TranscoderMemory(WIDTH, NUM_SLOTS, 32, skip_connection=False)
    shared = {"keys": draw(NUM_SLOTS, WIDTH), "values": draw(NUM_SLOTS, WIDTH)}
    return Pair(
        memory,
        copy.deepcopy(memory),
        shared,
        map_to_memory=dict,
        map_to_reference=dict,
        hidden=draw(16, WIDTH),
        call_reference=lambda layer, hidden: layer(hidden),
    )


def assert_equal_and_sensitive(pair):
    differences = peer_layers.compare_values(pair)
    assert set(differences) == {"output", "output without gradients", "gradient of input"} | {
        f"gradient of {name}" for name in pair.shared
    }
    assert max(differences.values()) < 1e-12, differences
    for name in pair.shared:  # each reaches both layers

        def change(shared, name=name):
            step = torch.linspace(0.1, 1, shared[name].numel(), dtype=torch.double)
            shared = {**shared, name: shared[name] + step.view_as(shared[name])}
            return pair.map_to_memory(shared)

        changed = peer_layers.compare_values(replace(pair, map_to_memory=change))
        assert changed["output"] > 1e-3, name
        assert changed["output without gradients"] > 1e-3, name
        assert changed["gradient of input"] > 1e-3 or name == "decoder_bias"


@pytest.mark.parametrize("kind", PACKAGES)
def test_layers_equal_their_reference(kind, peer_main, capsys):
    pytest.importorskip(PACKAGES[kind].module)
    torch.manual_seed(0)
    pair = PACKAGES[kind].make_pair(peer_layers.import_package(PACKAGES[kind]))
    assert pair.hidden.shape == (peer_layers.NUM_TOKENS, WIDTH)
    assert_equal_and_sensitive(pair)
    capsys.readouterr()
    assert peer_main("--only", kind) == 0
    output = capsys.readouterr().out
    assert "| gradient of input |" in output
    assert "memory / reference" in output


def test_a_layer_equals_itself_only_with_the_same_weights():
    torch.manual_seed(0)
    assert_equal_and_sensitive(make_pair_with_itself(None))


def test_missing_packages_are_named_with_their_command(peer_main, monkeypatch, capsys):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package.module, None)
    assert peer_main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(PACKAGES)
    for line, package in zip(lines, PACKAGES.values(), strict=True):
        assert line.startswith(f"{package.name} is not installed (")
        assert line.endswith(f"): pip install {package.requirement}")


def test_the_other_packages_are_compared_where_one_is_missing(peer_main, monkeypatch, capsys):
    package = replace(PACKAGES["peer"], requirement="torch", module="torch", layer="nn")
    package = replace(package, make_pair=make_pair_with_itself)
    monkeypatch.setitem(sys.modules, PACKAGES["product_key"].module, None)
    other = replace(PACKAGES["transcoder"], module="json")  # a module without the layer
    monkeypatch.setattr(
        peer_layers,
        "PACKAGES",
        {"product_key": PACKAGES["product_key"], "peer": package, "transcoder": other},
    )
    assert peer_main() == 0
    captured = capsys.readouterr()
    assert "| peer | torch " in captured.out
    assert captured.err.count("\n") == 2
    assert "json has no SparseCoder" in captured.err
