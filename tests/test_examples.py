"""Every public function and class shows how it is used; `make test` runs the examples."""

import importlib
import inspect

import pytest

PACKAGES = [
    "composable",
    "composable.interface",
    "composable.kernels",
    "composable.packaging",
    "composable.parallel",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package):
    module = importlib.import_module(package)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        is_shown = inspect.isfunction(value) or inspect.isclass(value)
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        if is_shown and not is_error and "Example" not in (inspect.getdoc(value) or ""):
            missing.append(name)
    assert missing == []
