"""Build step: the config files of `configs/` are installed as `dmt/configs`."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copy the packages, then the config files."""

    def run(self) -> None:
        """Build; an editable installation finds the configs in the checkout instead."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dmt" / "configs"
            copytree("configs", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
