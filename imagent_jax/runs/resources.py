"""What a process uses: compiled programs and memory."""

import resource
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


def memory() -> dict[str, float]:
    """GB that this process and its first device hold, where they say so."""
    found, statm, device = {}, Path("/proc/self/statm"), jax.local_devices()[0].memory_stats() or {}
    if statm.exists():
        found["memory/resident_gb"] = int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    if "bytes_in_use" in device:
        found |= {"memory/device_gb": device["bytes_in_use"] / 1e9, "memory/device_peak_gb": device["peak_bytes_in_use"] / 1e9}
    return found
