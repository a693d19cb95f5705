"""Trace programs anew where a test replaces what they are made of."""

import jax

# A part of the key of all that jax keeps of a program.
_made_of = jax.make_user_context()


def trace_apart(key):
    """Return a context that uses what was traced in contexts of the same key, and nothing else.

    Unlike after `jax.clear_caches`, what other tests traced stays.

    Args:
        key: What a test replaces; `object()` to trace everything anew.
    """
    return _made_of(key)
