"""Models: what is in one, how memories get in, how students are saved and loaded."""

import transformers  # noqa: F401  # first: it brings dmt's own classes along, which import from here
