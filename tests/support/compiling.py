"""Count what is compiled."""

from contextlib import contextmanager

import jax


@contextmanager
def counted_compiling():
    """Yield a list that gets the seconds of everything that is compiled meanwhile."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
