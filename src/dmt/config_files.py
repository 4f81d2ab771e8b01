"""The config files that come with dmt: where they are, their names, what they are for.

They lie in `configs/` of a checkout and in `dmt/configs` of an installation.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from dmt.errors import UserError, format_value


def get_configs_dir() -> Path:
    """Return the folder of the config files that come with dmt."""
    package_dir = Path(__file__).parent
    installed = package_dir / "configs"
    return installed if installed.is_dir() else package_dir.parents[1] / "configs"


def list_configs() -> dict[str, Path]:
    """Return the path of each config file that comes with dmt by its name.

    Names are those of the files without `.yaml`, below a folder `folder/name`.
    """
    root = get_configs_dir()
    paths = sorted(root.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}


def find_config(name_or_path: str | Path) -> Path:
    """Return the config file that a name or a path means; a file of that path comes first.

    Raises:
        UserError: there is no such file and no config of that name.
    """
    path = Path(name_or_path)
    configs = list_configs()
    name = str(name_or_path)
    if path.exists() or path.is_symlink() or name not in configs:
        is_name = path.name == name or not path.parent.exists()
        if not path.exists() and not path.suffix and is_name:
            raise _unknown_config_error(name, list(configs))
        return path  # the loader says what is wrong with it
    return configs[name]


def describe_config(path: Path) -> str:
    """Return the first sentence of the comment that a config file begins with."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".:")


def _unknown_config_error(name: str, names: list[str]) -> UserError:
    close = [candidate for candidate in names if candidate.endswith(f"/{name}")]
    close = close or get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else "dmt config lists those that come with dmt"
    return UserError(
        f"cannot read config file {format_value(name)} (No such file or directory); {hint}; "
        "a setting is written key=value"
    )
