"""How near decoding and training come to what the device can do: `python benchmarks/roofline.py [--size small] [--repeats 5]`.

The device first: copy bandwidth (a large array plus one, bytes read and written) and matrix rate (square products; bfloat16, on a
CPU float32), the best of the repeats. Then a random model, B = N*G rows of N groups, text only, every buffer filled.

Decoding, `sampler.decode`, moves at least, a step (one token for each of B rows),

    bytes = W * weights + W * 2 * L * K * H * (N * P + B * t)
    weights = L * (D * (Q + 2 K) * H + Q * H * D + 3 * D * F) + V * D

with W bytes a number, L layers, Q query and K key heads of width H, D model width, F inner width, V vocabulary and t the
mean number of response tokens in the cache. A group's prompt is read once for its G rows. Bytes divided by time and
by the copy bandwidth is the share of the bandwidth.

Training, `Learner.update`, computes at least, a step, three passes (forward, two products backward) of two operations for each
weight and token, and for each query, key it sees, layer and head:

    FLOPs = 6 * (L-part of weights) * (N * P + B * R) + 6 * V * D * B * R
          + 12 * L * Q * H * (N * P (P + 1) / 2 + B * (R * P + R (R + 1) / 2))

What masks hide and what is recomputed is not counted; the head sees responses only. FLOPs divided by time and by the
matrix rate is the model FLOPs utilisation (MFU). Sizes: `small` (63 M) on a CPU, `2b` elsewhere.

Writes benchmarks/results/roofline.json. Meant to take about 3 minutes on two free cores.
"""

from dataclasses import replace

import common
import jax
import jax.numpy as jnp
import numpy as np
from train_step import Shape

from imagent_jax.config import TINY, load_config
from imagent_jax.model.attention import choose_attention, choose_dtype
from imagent_jax.model.config import TextConfig
from imagent_jax.model.families import read_config
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.sharding import rollout_params
from imagent_jax.model.vlm import Model, create
from imagent_jax.rl.batch import GroupBatch
from imagent_jax.rl.learner import Learner
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rollout import sampler
from imagent_jax.types import EndReason, TokenKind

SHAPES = {"cpu": Shape(4, 8, 256, 64), "other": Shape(8, 16, 1024, 256), "quick": Shape(2, 2, 16, 8)}


# ---- what must be done ----------------------------------------------------------------------------------------------


def weight_counts(t: TextConfig) -> tuple[int, int]:
    """Weights of matrices in the layers, and in the head."""
    layer = t.hidden_size * (2 * t.num_heads + 2 * t.num_kv_heads) * t.head_dim + 3 * t.hidden_size * t.intermediate_size
    return t.num_layers * layer, t.vocab_size * t.hidden_size


def decode_bytes(t: TextConfig, shape: Shape, width: int) -> float:
    """Least bytes of a decode step, with responses half full; see the module."""
    rows, mean = shape.n * shape.g, (shape.r - 1) / 2
    cache = 2 * t.num_layers * t.num_kv_heads * t.head_dim * (shape.n * shape.p + rows * mean)
    return width * (sum(weight_counts(t)) + cache)


def train_flops(t: TextConfig, shape: Shape) -> float:
    """Least operations of an update; see the module."""
    (n, g, p, r), (layers, head) = shape, weight_counts(t)
    pairs = n * p * (p + 1) / 2 + n * g * (r * p + r * (r + 1) / 2)
    products = 6 * layers * (n * p + n * g * r) + 6 * head * n * g * r
    return products + 12 * t.num_layers * t.num_heads * t.head_dim * pairs


# ---- what is done ---------------------------------------------------------------------------------------------------


def copy_bandwidth(megabytes: int, repeats: int) -> float:
    """Bytes a second, read and written in place."""
    kept, plus_one = [jnp.zeros(megabytes * 2**18, jnp.float32)], jax.jit(lambda x: x + 1, donate_argnums=0)

    def again():
        kept[:] = [plus_one(*kept).block_until_ready()]

    return 2 * megabytes * 2**20 / min(common.seconds(again, repeats, 2))


def matrix_rate(n: int, dtype: str, repeats: int) -> float:
    """Operations a second of [n n] x [n n]."""
    x, product = jax.random.normal(jax.random.key(0), (n, n), dtype), jax.jit(jnp.matmul)
    return 2 * n**3 / min(common.seconds(lambda: product(x, x).block_until_ready(), repeats, 2))


def text_batch(model: Model, shape: Shape) -> GroupBatch:
    """Random text that fills every buffer."""
    (n, g, p, r), rng, vocab = shape, np.random.default_rng(0), model.cfg.text.vocab_size
    places = np.arange(p + r, dtype=np.int32)
    return GroupBatch(
        prompt_ids=rng.integers(common.FIRST_TEXT, vocab, (n, p)).astype(np.int32),
        prompt_positions=np.broadcast_to(places[:p], (3, n, p)),
        prompt_len=np.full(n, p, np.int32),
        prompt_vision=np.full((n, p), -1, np.int32),
        response_ids=rng.integers(common.FIRST_TEXT, vocab, (n, g, r)).astype(np.int32),
        response_positions=np.broadcast_to(places[p:], (3, n, g, r)),
        response_len=np.full((n, g), r, np.int32),
        response_vision=np.full((n, g, r), -1, np.int32),
        kind=np.full((n, g, r), TokenKind.TEXT, np.uint8),
        logprobs=np.full((n, g, r), -np.log(vocab), np.float32),
        end=np.full((n, g), EndReason.ANSWERED, np.uint8),
        rewards=np.zeros((n, g), np.float32),
        advantages=rng.normal(size=(n, g)).astype(np.float32),
    )


def decode_seconds(model: Model, params, shape: Shape, repeats: int) -> list[float]:
    """Time of a decode step, each the mean over a whole response of R tokens for all rows."""
    (n, g, p, r), batch = shape, text_batch(model, shape)
    shown, slots = jnp.zeros((n, p, model.cfg.vision.feature_dim), model.dtype), jnp.arange(n)
    stops, times = jnp.zeros((1, model.cfg.text.vocab_size), jnp.int16), []  # none: rows end when they are full
    params = rollout_params(model.dtype, params)

    def start():
        return jax.block_until_ready(
            sampler.admit(
                model, params, sampler.empty(model, n, g, p, r), slots, batch.prompt_ids, batch.prompt_positions,
                batch.prompt_vision, batch.prompt_len, batch.prompt_len, slots, jnp.zeros(n, jnp.uint32), jnp.ones(n), shown,
            )
        )  # fmt: skip

    for _ in range(repeats + 1):
        state = start()
        times += common.seconds(
            lambda state=state: jax.block_until_ready(sampler.decode(model, r, params, state, None, stops, r)), 1, 0
        )
    return [t / r for t in times[1:]]


def train_seconds(model: Model, params, shape: Shape, repeats: int) -> list[float]:
    """Time of an update."""
    cfg = load_config(TINY)
    cfg = replace(
        cfg,
        rollout=replace(cfg.rollout, groups=shape.n, group_size=shape.g, prompt_tokens=shape.p, response_tokens=shape.r),
        grpo=replace(cfg.grpo, minibatches=1, micro_groups=1),
    )
    learner = Learner(model, cfg, make_optimizer(cfg.optim, 1000), mask_tables(cfg.mask))
    learner.shapes = learner.shapes[-1:]  # every response is as long
    batch, store, kept = text_batch(model, shape), FeatureStore(model, params, 1, pages=1), [params, learner.init(params)]

    def step():
        kept[:] = jax.block_until_ready(learner.update(*kept, batch, store)[:2])

    return common.seconds(step, repeats, 1)


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    options = common.parser(__doc__, repeats=5)
    options.add_argument("--size", choices=common.SIZES, help="default: small on a CPU, else 2b; with --quick: tiny")
    args = options.parse_args()
    cpu, dtype = jax.default_backend() == "cpu", choose_dtype("auto")
    size = args.size or ("tiny" if args.quick else "small" if cpu else "2b")
    shape = SHAPES["quick" if args.quick else "cpu" if cpu else "other"]
    print(f"{size}: {shape}, {dtype}", flush=True)
    bandwidth = copy_bandwidth(16 if args.quick else 512 if cpu else 4096, args.repeats)
    rate = matrix_rate(256 if args.quick else 2048 if cpu else 8192, dtype, args.repeats)
    settings = {"dtype": dtype, "attention": choose_attention("auto", dtype), "remat": "none" if cpu else "full"}
    cfg = read_config(common.hf_config(size))
    model, params = create(cfg, param_dtype=dtype, vision_block=64, **settings)
    width = jnp.dtype(dtype).itemsize
    decode = common.median(decode_seconds(model, params, shape, args.repeats))
    moved = decode_bytes(cfg.text, shape, width)
    decode |= {
        "bytes": moved,
        "bytes_per_token": moved / (shape.n * shape.g),
        "tokens_per_second": shape.n * shape.g / decode["median_s"],
        "share_of_bandwidth": moved / decode["median_s"] / bandwidth,
    }
    train = common.median(train_seconds(model, params, shape, args.repeats))
    flops = train_flops(cfg.text, shape)
    train |= {"flops": flops, "mfu": flops / train["median_s"] / rate}
    rows = [
        ("copy bandwidth, GB/s", bandwidth / 1e9),
        (f"matrix rate, TFLOP/s in {dtype}", rate / 1e12),
        ("decode step, ms", 1e3 * decode["median_s"]),
        ("decode, MB a token", decode["bytes_per_token"] / 1e6),
        ("decode, tokens/s", decode["tokens_per_second"]),
        ("decode, % of the bandwidth", 100 * decode["share_of_bandwidth"]),
        ("update, s", train["median_s"]),
        ("update, TFLOP", flops / 1e12),
        ("update, MFU in %", 100 * train["mfu"]),
    ]
    common.show(f"{size}, {shape}", ("", "measured"), rows)
    record = {"size": size, "shape": shape._asdict(), **settings, "copy_bytes_per_second": bandwidth, "matrix_flops": rate}
    common.report("roofline", args, record | {"decode": decode, "train": train}, "cpu" if cpu else jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
