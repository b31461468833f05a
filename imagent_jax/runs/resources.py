"""Resource use of a process: compiled programs and memory."""

import resource
from pathlib import Path

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts programs compiled by XLA since its creation, including those found in the persistent cache."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_) -> None:
        if event == _EVENT:
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in `folder` across processes ("": do not)."""
    if folder:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def memory() -> dict[str, float]:
    """Return the memory, in GB, of this process and its first device, where available."""
    found, statm, device = {}, Path("/proc/self/statm"), jax.local_devices()[0].memory_stats() or {}
    if statm.exists():
        found["memory/resident_gb"] = int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    if "bytes_in_use" in device:
        found |= {"memory/device_gb": device["bytes_in_use"] / 1e9, "memory/device_peak_gb": device["peak_bytes_in_use"] / 1e9}
    return found
