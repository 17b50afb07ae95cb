"""Compiles the extensions; everything else about the build is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "cffi_build/kernel.py:ffibuilder",
    ],
)
