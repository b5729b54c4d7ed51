"""Counts what XLA compiles."""

import contextlib

import jax


@contextlib.contextmanager
def counted_compilations():
    """Count what XLA compiles: whatever jax compiles goes by this event."""
    events = []

    def listen(event, duration_s, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration_s)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
