"""Fixtures of the tests of benchmarks: those of all tests that they need."""

from tests.conftest import isolated_home, tiny

__all__ = ["isolated_home", "tiny"]
