"""What a run says of its memory."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from imagent_jax.runs.resources import memory


def test_memory_is_what_the_process_and_its_first_device_say(monkeypatch):
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    assert memory() == {"memory/resident_gb": pytest.approx(resident, rel=0.1)}
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 3e9, "peak_bytes_in_use": 5e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = memory()
    assert (found.pop("memory/device_gb"), found.pop("memory/device_peak_gb")) == (3, 5) and len(found) == 1
