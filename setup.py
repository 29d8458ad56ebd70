"""Build script. Everything there is to build is declared in pyproject.toml."""

from setuptools import setup

setup()
