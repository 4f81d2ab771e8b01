"""`dmt config`: config files that come with dmt, all settings, and the settings of one file."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dmt import config_io
from dmt.cli.arguments import add_command
from dmt.config_files import describe_config, find_config, list_configs
from dmt.config_io import list_setting_names, unknown_setting_error

if TYPE_CHECKING:
    from dmt.cli.output import Output


def add_parser(commands: Any) -> None:
    """Add `dmt config` to the commands."""
    parser = add_command(
        commands,
        "config",
        run_config,
        "List config files and explain settings",
        "Without an option the config files that come with dmt are listed.",
        (
            "dmt config --list",
            "dmt config --explain memory.mean_k",
            "dmt config --show seed > my.yaml",
        ),
        needs_torch=False,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="list every setting and its default")
    action.add_argument(
        "--explain", metavar="KEY", help="explain a setting, or all settings of a group"
    )
    action.add_argument(
        "--show", metavar="CONFIG", help="print every setting of a config file or of a run as YAML"
    )


def run_config(args: argparse.Namespace, out: Output) -> None:
    """Print what the option asks for; config files without one."""
    if args.show is not None:
        config = config_io.load_config(find_config(args.show))
        out.print_text(config_io.format_config(config))
        out.print_json(asdict(config))
    elif args.list or args.explain is not None:
        descriptions = describe_settings()
        if args.explain is not None:
            descriptions = _select_settings(descriptions, args.explain)
        out.print_text("\n".join(descriptions.values()))
        out.print_json(descriptions)
    else:
        configs = {name: describe_config(path) for name, path in list_configs().items()}
        out.print_table(("config", "purpose"), list(configs.items()), "no config files")
        out.print_json(configs)


def describe_settings() -> dict[str, str]:
    """Return default, choices and meaning of each setting, by its name."""
    entries = re.split(r"^(?=[\w.]+=)", config_io.describe_settings(), flags=re.MULTILINE)
    return {entry.partition("=")[0]: entry.rstrip() for entry in entries if entry}


def _select_settings(descriptions: dict[str, str], key: str) -> dict[str, str]:
    selected = {
        name: text for name, text in descriptions.items() if f"{name}.".startswith(f"{key}.")
    }
    if not selected:
        raise unknown_setting_error(key, list_setting_names(), list_setting_names())
    return selected
