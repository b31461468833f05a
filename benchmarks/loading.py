"""Loading a full-size checkpoint, here and in transformers: `python benchmarks/loading.py [--size 2b] [--tokens 8]`.

Writes a random bfloat16 checkpoint in Qwen2-VL-2B's shape (4.4 GB) to a temporary folder, loads it and decodes greedily in a
process each, and deletes it. Reports seconds and peak memory: the largest resident set, and its private part (the rest are
pages of mapped files, which the system takes back at need). Writes benchmarks/results/loading.json; `--size tiny` tries the
command itself.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
PROMPT = list(range(100, 132))
SIZES = {
    "2b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "mrope_section": [16, 24, 24],
        "depth": 32, "embed_dim": 1280, "heads": 16,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "mrope_section": [8, 12, 12], "depth": 2, "embed_dim": 64, "heads": 4,
    },
}  # fmt: skip


def write(folder: Path, size: str) -> int:
    """Writes the checkpoint, one tensor in memory at a time; returns its bytes."""
    import jax.numpy as jnp

    from imagent_jax.model import checkpoint
    from imagent_jax.model.config import Qwen2VLConfig
    from imagent_jax.model.qwen2_vl import abstract

    s = dict(SIZES[size])
    depth, embed_dim, heads, section = (s.pop(k) for k in ("depth", "embed_dim", "heads", "mrope_section"))
    hf = {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "dtype": "bfloat16",
        "image_token_id": 97, "video_token_id": 98, "vision_start_token_id": 95, "vision_end_token_id": 96,
        "tie_word_embeddings": True,
        "text_config": s | {
            "model_type": "qwen2_vl_text", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision", "depth": depth, "embed_dim": embed_dim, "num_heads": heads,
            "hidden_size": s["hidden_size"], "mlp_ratio": 4,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = checkpoint.to_tensors(*abstract(Qwen2VLConfig.from_hf(hf), jnp.bfloat16))
    rng = np.random.default_rng(0)

    def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, float(name.endswith("weight")), jnp.bfloat16)
        return (rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    made = {name: tensor._replace(read=partial(random, name, tensor.shape)) for name, tensor in tensors.items()}
    checkpoint.write_tensors(folder / "model.safetensors", made)
    return sum(tensor.nbytes for tensor in made.values())


class PeakMemory(threading.Thread):
    """Largest memory of this process, GB: resident as the kernel counts it, and its private part, sampled every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.private = 0.0
        self.start()

    def run(self):
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.private = max(self.private, int(status["RssAnon"].split()[0]) * 1024 / 1e9)
            time.sleep(0.02)

    def read(self) -> dict[str, float]:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"peak_resident_gb": round(resident, 3), "peak_private_gb": round(self.private, 3)}


def ours(folder: str, tokens: int) -> dict:
    import jax
    import jax.numpy as jnp

    from imagent_jax.model.qwen2_vl import Qwen2VL
    from imagent_jax.rl import sampler

    start, memory = time.perf_counter(), PeakMemory()
    model, params = Qwen2VL.from_pretrained(folder).split(dtype="bfloat16")
    jax.block_until_ready(params)
    loaded, after = time.perf_counter(), memory.read()
    ids, n = jnp.array([PROMPT]), len(PROMPT)
    positions, text = jnp.broadcast_to(jnp.arange(n), (3, 1, n)), jnp.full((1, n), -1)
    features, length = jnp.zeros((1, model.cfg.text.hidden_size)), jnp.array([n])
    state, slot = sampler.empty(model, 1, 1, n, tokens), jnp.zeros(1, jnp.int32)
    state = sampler.admit(model, params, state, slot, ids, positions, text, length, length, slot, 0, features)
    stops = jnp.full((1, sampler.STOP_WIDTH), -2)
    state = sampler.decode(model, True, params, state, None, stops, 1.0, tokens)
    out = np.asarray(state.ids[0]).tolist()
    return {"load_s": loaded - start, "after_loading": after, "decode_s": time.perf_counter() - loaded, "tokens": out}


def theirs(folder: str, tokens: int) -> dict:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    start, memory = time.perf_counter(), PeakMemory()
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loaded, after = time.perf_counter(), memory.read()
    with torch.no_grad():
        out = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    out = out[0, len(PROMPT) :].tolist()
    return {"load_s": loaded - start, "after_loading": after, "decode_s": time.perf_counter() - loaded, "tokens": out}


def child(which: str, folder: str, tokens: int) -> None:
    memory = PeakMemory()
    found = {"ours": ours, "transformers": theirs}[which](folder, tokens)
    print(json.dumps(found | {"whole_process": memory.read()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--tmp", help="where the temporary folder goes (default: the system's)")
    parser.add_argument("--child", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child, args.tokens)
    results = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        print(f"Writes a random {args.size} checkpoint to {folder} (deleted at the end) and the result to {RESULTS}.", flush=True)
        size = write(Path(folder), args.size)
        for which in ("ours", "transformers"):
            print(f"{size / 1e9:.2f} GB written; {which} loads it.", flush=True)
            command = [sys.executable, __file__, "--child", which, folder, "--tokens", str(args.tokens)]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[which] = json.loads(ended.stdout.splitlines()[-1])
    path = RESULTS / ("loading.json" if args.size == "2b" else f"loading_{args.size}.json")
    RESULTS.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    record = {"command": " ".join(["python benchmarks/loading.py", *sys.argv[1:]]), "checkpoint_gb": round(size / 1e9, 3)}
    path.write_text(json.dumps(record | {"machine": machine} | results, indent=1))
    for which, found in results.items():
        print(f"{which}: loaded in {found['load_s']:.1f} s, peak {found['after_loading']}; "
              f"{args.tokens} tokens in {found['decode_s']:.1f} s, peak {found['whole_process']}")  # fmt: skip
    print(f"Wrote {path}; the temporary checkpoint is deleted.")


if __name__ == "__main__":
    main()
