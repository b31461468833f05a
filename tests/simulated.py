"""Processes with simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOGETHER = 900  # seconds that devices may wait for each other, on few cores


def start(devices: int, *command: str | Path) -> subprocess.Popen:
    """`python *command` with `devices` simulated devices; output is piped."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",  # compiling is most of the time
        f"--xla_cpu_collective_call_terminate_timeout_seconds={TOGETHER}",
    ]  # fmt: skip
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "",
        # A device that waits for the others holds a thread of XLA's pool, which has one for each device (or core). Eight once
        # waited for ever, seven of them in a collective: so one program at a time, and threads to spare.
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false", "NPROC": str(4 * devices),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
