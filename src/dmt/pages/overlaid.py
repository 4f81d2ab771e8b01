"""Curves of one run or of several in the same plots, whatever its task was."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from dmt.pages.curves import Curve
from dmt.pages.plots import Plot, Series, plot

KNOWN = {
    "layerwise/loss": ("First stage: layer by layer", "loss", "y"),
    "end_to_end/loss": ("Second stage: end to end", "loss", "y"),
    "consolidate/loss": ("What is learnt of the context", "loss", "y"),
    "consolidate/unrelated": ("What other text notices of it", "KL, nats per token", "y"),
    "consolidated/share": ("Share of the context's benefit that is kept", "share", ""),
    "loss": ("Training loss", "nats per token", "y"),
    "*/kl": ("Distance from the teacher, {}", "KL, nats per token", "y"),
    "*/perplexity": ("Perplexity on validation text, {}", "perplexity", "y"),
}
"""Curves that are worth a plot, by name or pattern: its title, what stands beside it, and which axes are logarithmic."""
TIPPED = 60
"""Points up to which each says what it is."""


def overlaid(runs: Mapping[str, Mapping[str, Curve]]) -> list[Plot]:
    """A plot for each known curve that any run has; `runs` gives a run's curves by its name, `""` where there is but one."""
    plots = []
    for pattern, (title, up, log) in KNOWN.items():
        names = dict.fromkeys(name for curves in runs.values() for name in curves if fnmatchcase(name, pattern))
        for name in (name for name in names if not (pattern == "*/kl" and name.startswith(("end_to_end/", "consolidate/")))):
            series = []
            for number, (run, curves) in enumerate(runs.items()):
                if name not in curves:
                    continue
                x, y = curves[name]
                tips = (
                    [f"{run} step {step}: {value:.4f}".strip() for step, value in zip(x, y, strict=True)]
                    if len(x) <= TIPPED
                    else ()
                )
                series.append(Series(run, x, y, tips, number, number))
            plots.append(plot(title.format(name.partition("/")[0]), "step", up, series, log=log))
    return plots
