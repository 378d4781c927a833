"""Which programs are compiled in a stretch of a test."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Gives a list that grows by the function's name for each program that the backend compiles, or reads from its disk cache."""
    names = []

    def listen(event, duration, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
