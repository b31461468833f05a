"""Loading a full-size checkpoint, here and in transformers: `python benchmarks/loading.py [--size 2b] [--tokens 8]`.

Writes a random bfloat16 checkpoint in Qwen2-VL-2B's shape (4.4 GB) to a temporary folder, loads it and decodes greedily in a
process each, and deletes it. Reports seconds and peak memory: the largest resident set, and its private part (the rest are
pages of mapped files, which the system takes back at need). Writes benchmarks/results/loading.json; `--size tiny` tries the
command itself.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, SIZES, PeakMemory, child, machine, random_checkpoint

PROMPT = list(range(100, 132))


def ours(folder: str, tokens: int) -> dict:
    import jax
    import jax.numpy as jnp

    from imagent_jax.model import checkpoint
    from imagent_jax.rollout import sampler

    start, memory = time.perf_counter(), PeakMemory()
    model, params = checkpoint.from_pretrained(folder).split(dtype="bfloat16")
    jax.block_until_ready(params)
    loaded, after = time.perf_counter(), memory.read()
    ids, n = jnp.array([PROMPT]), len(PROMPT)
    positions, text = jnp.broadcast_to(jnp.arange(n), (3, 1, n)), jnp.full((1, n), -1)
    shown, length = jnp.zeros((1, n, model.cfg.vision.feature_dim), model.dtype), jnp.array([n])
    state, slot = sampler.empty(model, 1, 1, n, tokens), jnp.zeros(1, jnp.int32)
    drawn = slot.astype(jnp.uint32), jnp.zeros(1)
    state = sampler.admit(model, params, state, slot, ids, positions, text, length, length, slot, *drawn, shown)
    stops = jnp.zeros((1, model.cfg.text.vocab_size), jnp.int16)
    state = sampler.decode(model, state.ids.shape[1], params, state, None, stops, tokens)
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


def measure(which: str, folder: str, tokens: int) -> None:
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
        return measure(*args.child, args.tokens)
    results = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        print(f"Writes a random {args.size} checkpoint to {folder} (deleted at the end) and the result to {RESULTS}.", flush=True)
        size = random_checkpoint(Path(folder), args.size, "bfloat16")
        for which in ("ours", "transformers"):
            print(f"{size / 1e9:.2f} GB written; {which} loads it.", flush=True)
            results[which] = child(__file__, ["--child", which, folder, "--tokens", args.tokens])
    path = RESULTS / ("loading.json" if args.size == "2b" else f"loading_{args.size}.json")
    RESULTS.mkdir(exist_ok=True)
    record = {"command": " ".join(["python benchmarks/loading.py", *sys.argv[1:]]), "checkpoint_gb": round(size / 1e9, 3)}
    path.write_text(json.dumps(record | {"machine": machine()} | results, indent=1))
    for which, found in results.items():
        print(f"{which}: loaded in {found['load_s']:.1f} s, peak {found['after_loading']}; "
              f"{args.tokens} tokens in {found['decode_s']:.1f} s, peak {found['whole_process']}")  # fmt: skip
    print(f"Wrote {path}; the temporary checkpoint is deleted.")


if __name__ == "__main__":
    main()
