"""Shared by the tests of the model: a counter of compilations."""

import contextlib

import jax
import pytest

_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def count_compilations():
    """Return a context manager that gives a list with one entry per program compiled inside."""
    listening = []

    def listen(event, duration, **_):
        if event == _COMPILED:
            for compiled in listening:
                compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def count():
        compiled = []
        listening.append(compiled)
        yield compiled
        listening.remove(compiled)

    return count
