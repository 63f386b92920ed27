"""The step of setuptools that copies the package into a wheel (pyproject.toml names it). Nothing else imports it."""

from __future__ import annotations

import shutil

from setuptools.command.build_py import build_py


class FreshBuild(build_py):
    """Clears build/lib first: setuptools leaves it in the checkout, and would put files into the next wheel that the package no
    longer has."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
