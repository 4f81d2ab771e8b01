"""Settings in TensorBoard's HParams."""

from dataclasses import replace

from dmt.config import Config
from dmt.report.hparams import SETTING_GROUPS, find_changed_settings, flatten_settings


def test_settings_that_are_not_defaults_come_first():
    config = Config()
    config = replace(
        config,
        seed=3,
        optim=replace(config.optim, beta1=0.8),
        data=replace(config.data, corpora=["speeches"]),
    )
    settings = flatten_settings(config, SETTING_GROUPS["distill"])
    assert list(settings)[:3] == ["seed", "data.corpora", "optim.beta1"]
    assert settings["data.corpora"] == "[speeches]"
    assert settings["data.mixture_weights"] == "[]"
    assert settings["memory.num_slots"] == "default"
    assert set(settings) == set(flatten_settings(Config(), SETTING_GROUPS["distill"]))


def test_titles_name_what_was_changed():
    config = Config()
    assert find_changed_settings(config) == {}
    changed = replace(config, seed=5, stages=replace(config.stages, end_to_end_steps=7))
    assert find_changed_settings(changed) == {"stages.end_to_end_steps": "7"}
