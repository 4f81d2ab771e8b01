"""Discrete memory transformers: a GPT-2 whose feed-forward blocks are memory you can open.

Importing `dmt` makes saved students loadable by transformers' Auto classes; it costs nothing until they are imported.
"""

from __future__ import annotations

from dmt._autoregister import register_auto_classes

__version__ = "0.1.0"

register_auto_classes()
