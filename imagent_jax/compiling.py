"""Compiled programs: counting them, and keeping them between runs."""

from pathlib import Path

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the programs XLA is asked for from its creation on (a program found in the persistent cache counts too)."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_) -> None:
        if event == _EVENT:
            self.count, self.seconds = self.count + 1, self.seconds + duration


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` for the next start ("" keeps none)."""
    if folder:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
