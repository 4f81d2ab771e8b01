"""Files beside the weights: a model card, and code that says what to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmt import files

CODE_FILE = "modeling_dmt.py"
CARD_FILE = "README.md"
PACKAGE = "discrete-memory-transformers"  # name on the package index
TAGS = ("dmt", "discrete-memory", "knowledge-distillation")

# What transformers runs with `trust_remote_code=True` if dmt has not been imported. It defines
# nothing itself. Imports in `try` are not checked before, so that its own message is shown.
CODE = '''"""Loads this model with the package {package}, which defines its layers.

    pip install {package}

After `import dmt`, `AutoModelForCausalLM.from_pretrained` loads it without `trust_remote_code`.
"""

try:
    from dmt.models.modeling import (
        {lines}
    )
except ImportError as error:
    raise ImportError(
        "This model has discrete memory layers, which are in a package of their own: "
        "pip install {package}, and import dmt before loading the model."
    ) from error

__all__ = [
    {exports}
]
'''

USAGE = """```bash
pip install {package}
```

```python
import dmt

model, tokenizer = dmt.load("{name}")
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0], skip_special_tokens=True))
```

After `import dmt`, `AutoModelForCausalLM.from_pretrained` and `pipeline` load it too."""


def get_auto_map(classes: Mapping[str, type]) -> dict[str, str]:
    """Return the entry `auto_map` of `config.json` that points transformers to `CODE_FILE`.

    Args:
        classes: config and models of a family by the name of their Auto class.
    """
    module = CODE_FILE.removesuffix(".py")
    return {auto_name: f"{module}.{cls.__name__}" for auto_name, cls in classes.items()}


def write_hub_files(folder: Path, config: Any, classes: Mapping[str, type]) -> None:
    """Write `modeling_dmt.py`, and a model card if the folder has none.

    Args:
        folder: folder of the saved model.
        config: the model's config.
        classes: as for `get_auto_map`.
    """
    names = [cls.__name__ for cls in classes.values()]
    code = CODE.format(
        package=PACKAGE,
        lines="\n        ".join(f"{name}," for name in names),
        exports="\n    ".join(f'"{name}",' for name in names),
    )
    files.atomic_write(folder / CODE_FILE, code)
    if not (folder / CARD_FILE).exists():
        files.atomic_write(folder / CARD_FILE, render_model_card(folder.name, describe(config)))


def describe(config: Any) -> str:
    """Return a sentence about the memories of a model with this config."""
    memory = config.memory or {}
    family = str(config.model_type).removeprefix("dmt_").replace("gpt2", "GPT-2")
    layers = f"{len(memory)} of {config.num_hidden_layers} feed-forward blocks"
    rows = sum(arguments.get("kind") == "associative" for arguments in memory.values())
    stored = f" In {rows} of them, retrieved rows are added." if rows else ""
    return (
        f"A {family.replace('llama', 'Llama')} with {layers} replaced by discrete memory.{stored}"
    )


def render_model_card(
    name: str,
    summary: str,
    sections: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    model_index: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return a model card: YAML metadata as hubs read it, and Markdown.

    Args:
        name: name of the model.
        summary: what the model is, in a few sentences.
        sections: further sections by title, in Markdown.
        metadata: further metadata; empty values are left out.
        model_index: evaluation results, as in the entry `results` of `model-index`.
    """
    import yaml

    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
    }
    fields |= {key: value for key, value in (metadata or {}).items() if value}
    if model_index:
        fields["model-index"] = [{"name": name, "results": [dict(item) for item in model_index]}]
    header = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---", f"# {name}", summary]
    parts.append(f"## Usage\n\n{USAGE.format(package=PACKAGE, name=name)}")
    parts += [f"## {title}\n\n{text}" for title, text in (sections or {}).items() if text]
    return "\n\n".join(parts) + "\n"
