"""What the benchmarks share: model sizes, the machine's facts, timings, processes of their own, result files and tables.

Importing this imports neither jax nor torch, so that a child process that measures one has nothing of the other.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"

SIZES = {
    "2b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "mrope_section": [16, 24, 24],
        "depth": 32, "embed_dim": 1280, "heads": 16,
    },
    "small": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 16384, "mrope_section": [8, 12, 12], "depth": 4, "embed_dim": 256, "heads": 4,
    },
    "mini": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192, "mrope_section": [8, 12, 12], "depth": 2, "embed_dim": 64, "heads": 4,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "mrope_section": [8, 12, 12], "depth": 2, "embed_dim": 64, "heads": 4,
    },
}  # fmt: skip
"""Qwen2-VL's shape at several sizes: 2 B parameters as published, about 65 M, 7 M and 3 M."""

IMAGE, VISION_START, VISION_END = 97, 95, 96
FIRST_TEXT = 100
"""Markers of a random checkpoint; ids from `FIRST_TEXT` on are plain text."""


# ---- models ---------------------------------------------------------------------------------------------------------


def hf_config(size: str, dtype: str = "float32") -> dict:
    """The `config.json` of a size."""
    s = dict(SIZES[size])
    depth, embed_dim, heads, section = (s.pop(k) for k in ("depth", "embed_dim", "heads", "mrope_section"))
    return {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "dtype": dtype,
        "image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "tie_word_embeddings": True,
        "text_config": s | {
            "model_type": "qwen2_vl_text", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": None, "eos_token_id": None,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision", "depth": depth, "embed_dim": embed_dim, "num_heads": heads,
            "hidden_size": s["hidden_size"], "mlp_ratio": 4,
        },
    }  # fmt: skip


def random_checkpoint(folder: Path, size: str, dtype: str = "float32") -> int:
    """Writes a checkpoint of random weights, one tensor in memory at a time; returns its bytes."""
    from imagent_jax.model import checkpoint
    from imagent_jax.model.families import read_config
    from imagent_jax.model.vlm import abstract

    hf = hf_config(size, dtype)
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = checkpoint.to_tensors(*abstract(read_config(hf), dtype))
    rng = np.random.default_rng(0)

    def random(name: str, form) -> np.ndarray:
        if len(form.shape) == 1:
            return np.full(form.shape, float(name.endswith("weight")), form.dtype)
        return (rng.standard_normal(form.shape, np.float32) * form.shape[-1] ** -0.5).astype(form.dtype)

    made = {name: form._replace(read=partial(random, name, form)) for name, form in tensors.items()}
    checkpoint.write_tensors(folder / "model.safetensors", made)
    return sum(form.nbytes for form in made.values())


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Wall time of every call, after `warmup` that are not counted. `run` must wait for its results."""
    times = []
    for _ in range(warmup + repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times[warmup:]


def median(times: Sequence[float]) -> dict:
    """Median and all repeats, as they stand in result files."""
    return {"median_s": statistics.median(times), "repeats_s": [round(t, 5) for t in times]}


class PeakMemory(threading.Thread):
    """Largest memory of this process, GB: resident as the kernel counts it, and its private part, sampled every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.private = 0.0
        self.start()

    @staticmethod
    def _status() -> dict[str, float]:
        lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in lines if value.endswith(" kB")}

    def run(self):
        while True:
            self.private = max(self.private, self._status()["RssAnon"])
            time.sleep(0.02)

    def read(self) -> dict[str, float]:
        # VmHWM, not getrusage: its maximum begins with that of the process that started this one
        return {"peak_resident_gb": round(self._status()["VmHWM"], 3), "peak_private_gb": round(self.private, 3)}


def child(script: str, arguments: Iterable[object]) -> dict:
    """Runs a script in a process of its own, so that its memory and threads are its own; the JSON of its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(f"error: a measurement ended with code {ended.returncode}; its own message stands above.")
    return json.loads(ended.stdout.splitlines()[-1])


def train(folder: Path, name: str, *flags: str) -> tuple[list[dict], float]:
    """Run `python -m imagent_jax.train` in a process of its own; return the metrics of its steps and evaluations, and seconds."""
    command = [sys.executable, "-m", "imagent_jax.train", f"--run.dir={folder}", f"--run.name={name}", *flags]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], time.perf_counter() - began


def left(sandbox) -> dict[str, float]:
    """What there is of a `Sandbox`: its workers, descriptors, folders, and the memory of this process and of its own in MB."""
    gc.collect()
    time.sleep(1.0)  # the last worker is waited for after the answer
    pid = sandbox._process.pid
    pages = [int(Path(f"/proc/{number}/statm").read_text().split()[1]) for number in (os.getpid(), pid)]
    return {
        "workers": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
        "descriptors": len(os.listdir("/proc/self/fd")) + len(os.listdir(f"/proc/{pid}/fd")),
        "folders": len(list(Path(tempfile.gettempdir()).glob("imagent_sandbox_*"))),
        "trainer_mb": pages[0] * 4096 / 1e6,
        "sandbox_mb": pages[1] * 4096 / 1e6,
    }


# ---- reporting ------------------------------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict:
    """Where figures were measured: processor, cores, load, device (`device_kind` of jax, or what torch calls it), versions."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    packages = [name for name in ("jax", "torch", "transformers", "numpy") if importlib.util.find_spec(name)]
    return {
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "device": device,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
    }


def parser(docstring: str, repeats: int = 3) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=docstring.splitlines()[0])
    made.add_argument("--repeats", type=int, default=repeats, help="timed calls; medians are reported")
    made.add_argument("--quick", action="store_true", help="a size for trying the command; writes nothing unless --out is given")
    made.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    return made


def report(name: str, args: argparse.Namespace, record: dict, device: str = "cpu") -> None:
    """Writes `<name>.json` (on an accelerator `<name>_<device>.json`) with the command and the machine before `record`."""
    if args.quick and args.out is None:
        print("A quick run: nothing is written.")
        return
    folder = args.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    kind = "" if device == "cpu" else "_" + re.sub(r"[^a-z0-9]+", "_", device.lower())
    path = folder / f"{name}{kind}.json"
    command = " ".join([f"python benchmarks/{name}.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine(device)} | record, indent=1) + "\n")
    print(f"Written to {path}.")


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column names the row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console().print(table)
