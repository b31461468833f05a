"""The attention kernel of this accelerator against XLA: `python benchmarks/attention.py [--repeats 20] [--scale 1]`.

Compares `cudnn` (GPU) or `splash` (TPU) with `xla`, both in bfloat16, forward and backward, with NaN at padding, at the
decoder's and the tower's head widths. Errors are against XLA in float32. Writes benchmarks/results/attention_<device>.json.
"""

import argparse
import json
import re
import statistics
import sys

import jax
import jax.numpy as jnp
from common import RESULTS, seconds

from imagent_jax.model.attention import Causal, Packed, Shared, attention, choose_attention


def cases(scale: int) -> dict:
    """Shapes of Qwen2-VL-7B on one device: responses of a group, prompts, packed images. q, k, v, mask, shared."""

    def draw(key, shape, real):
        x = jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)
        return jnp.where(real[..., None, None], x, jnp.nan)

    def stream(lead, tokens, heads, kv_heads, width, mask, key=0):
        real = jnp.broadcast_to(mask.real(tokens), (*lead, tokens))
        return [draw(key + i, (*lead, tokens, n, width), real) for i, n in enumerate((heads, kv_heads, kv_heads))]

    g, r, p, m = 8, 512 * scale, 1024 * scale, 1024 * scale
    length, prompt = Causal(jnp.arange(g)[None] * r // g + r // g), Causal(jnp.array([p * 3 // 4]))
    _, k, v = stream((1,), p, 1, 4, 128, prompt, 5)
    images = Packed(jnp.stack([jnp.arange(m) * 5 // m, jnp.where(jnp.arange(m) < m * 2 // 3, 0, -1)]))
    return {
        "responses": (*stream((1, g), r, 28, 4, 128, length), length, Shared(k, v, prompt.length)),
        "prompts": (*stream((1,), p, 28, 4, 128, prompt), prompt, None),
        "vision": (*stream((2,), m, 16, 16, 80, images), images, None),
    }


def both_passes(backend: str, mask, shared, real):
    """Output and gradients (q, k, v, shared keys and values) for a fixed cotangent."""

    @jax.jit
    def run(q, k, v, keys):
        def forward(q, k, v, keys):
            return attention(q, k, v, mask, None if keys is None else Shared(*keys, shared.length), backend)

        out, pull = jax.vjp(forward, q, k, v, keys)
        weight = jax.random.normal(jax.random.key(99), out.shape).astype(out.dtype)
        return out, pull(jnp.where(real[..., None, None], weight, 0))

    return run


def error(a, b) -> float:
    """Largest difference as a fraction of the largest value; infinite where `a` is not finite."""
    difference = max(float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max() / jnp.abs(y).max())
                     for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip
    return difference if difference == difference else float("inf")


def compare(backend: str, case, repeats: int) -> dict:
    q, k, v, mask, shared = case
    real = jnp.broadcast_to(mask.real(q.shape[-3]), q.shape[:-2])
    args = (q, k, v, None if shared is None else (shared.k, shared.v))
    with jax.default_matmul_precision("float32"):
        truth = both_passes("xla", mask, shared, real)(*jax.tree.map(lambda x: x.astype(jnp.float32), args))
    row = {"tokens": int(real.sum())}
    for name in ("xla", backend):
        run = both_passes(name, mask, shared, real)
        out = run(*args)
        times = seconds(lambda run=run: jax.block_until_ready(run(*args)), repeats, warmup=2)
        row[name] = {"error_forward": error(out[0], truth[0]), "error_backward": error(out[1], truth[1]),
                     "seconds": statistics.median(times)}  # fmt: skip
        row[name]["microseconds_per_token"] = 1e6 * row[name]["seconds"] / row["tokens"]
    row["speedup"] = row["xla"]["seconds"] / row[backend]["seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--scale", type=int, default=1, help="multiplies every length")
    args = parser.parse_args()
    backend, device = choose_attention("auto", "bfloat16"), jax.devices()[0].device_kind
    if backend == "xla":
        sys.exit(f"error: this benchmark compares cuDNN (GPU) or splash (TPU) with XLA, and {device!r} has neither kernel.")
    rows = {name: compare(backend, case, args.repeats) for name, case in cases(args.scale).items()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"attention_{re.sub(r'[^a-z0-9]+', '_', device.lower())}.json"
    record = {"device": device, "jax": jax.__version__, "backend": backend, "repeats": args.repeats, "scale": args.scale}
    path.write_text(json.dumps(record | {"cases": rows}, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name}: {backend} {row['speedup']:.2f}x of XLA's speed; error {row[backend]['error_forward']:.1e} forward, "
              f"{row[backend]['error_backward']:.1e} backward (XLA {row['xla']['error_forward']:.1e}, "
              f"{row['xla']['error_backward']:.1e})")  # fmt: skip
    print(f"Written to {path}.")
    worst = max(max(row[backend]["error_forward"], row[backend]["error_backward"]) for row in rows.values())
    if worst > 0.05:
        sys.exit(f"error: {backend} departs from XLA by {worst:.2g} of the largest value; set model.attention to 'xla'.")


if __name__ == "__main__":
    main()
