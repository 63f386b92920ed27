"""Copies configs and scripts into the package of a wheel. In a checkout they lie beside the package, and
rear_scale/places.py finds them in either place. Everything else about the build is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("configs/**/*.yaml", "launchers/*.py", "data/*.py")


class BuildWithScripts(build_py):
    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        # An earlier build in the same checkout may have left files here that have since been renamed or removed.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        for pattern in FILES:
            for path in sorted(Path().glob(pattern)):
                target = Path(self.build_lib, "rear_scale", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithScripts})
