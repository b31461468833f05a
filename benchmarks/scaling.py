"""What a rollout and an update cost as groups and prompts grow: `python benchmarks/scaling.py [--size mini] [--repeats 3]`.

N = 2 groups of G rollouts with prompts of P tokens and responses of R = 64, text only, every buffer filled, random weights;
each (P, G) in a process of its own. Measured: prefill of the prompts (`sampler.admit`), a decoding step (one token for each of
N*G rows), one optimizer update, peak memory; counted: bytes of the prompts' cache. A group's prompt is prefilled, kept and
read once, so prefill and its cache should not grow with G at all, and tokens a second should grow nearly with it.

Writes benchmarks/results/scaling.json and scaling.png. Meant to take about 6 minutes on two free cores.
"""

import json

import common

PROMPTS, GROUP_SIZES = (256, 512, 1024, 2048, 4096), (1, 4, 16)
GROUPS, RESPONSE = 2, 64


def measure(size: str, prompt: int, group_size: int, repeats: int) -> dict:
    """One (P, G), in this process."""
    memory = common.PeakMemory()
    import jax
    import jax.numpy as jnp
    from roofline import decode_seconds, text_batch, train_seconds
    from train_step import Shape

    from imagent_jax.model.attention import choose_attention, choose_dtype
    from imagent_jax.model.families import read_config
    from imagent_jax.model.sharding import rollout_params
    from imagent_jax.model.vlm import create
    from imagent_jax.rollout import sampler

    dtype = choose_dtype("auto")
    cfg, shape = read_config(common.hf_config(size)), Shape(GROUPS, group_size, prompt, RESPONSE)
    model, params = create(cfg, param_dtype=dtype, vision_block=64, dtype=dtype, attention=choose_attention("auto", dtype))
    batch, slots = text_batch(model, shape), jnp.arange(GROUPS)
    shown = jnp.zeros((GROUPS, prompt, cfg.vision.feature_dim), model.dtype)
    weights = rollout_params(model.dtype, params)
    empty = jax.jit(lambda: sampler.empty(model, GROUPS, group_size, prompt, RESPONSE))
    prefill = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(empty())
        prefill += common.seconds(
            lambda state=state: jax.block_until_ready(sampler.admit(
                model, weights, state, slots, batch.prompt_ids, batch.prompt_positions, batch.prompt_vision, batch.prompt_len,
                batch.prompt_len, slots, jnp.zeros(GROUPS, jnp.uint32), jnp.ones(GROUPS), shown,
            ).logits), 1, 0,
        )  # fmt: skip
    decode = common.median(decode_seconds(model, params, shape, repeats))
    rollout_memory = memory.read()["peak_resident_gb"]
    return {
        "prompt": prompt,
        "group_size": group_size,
        "prefill": common.median(prefill[1:]),
        "decode": decode,
        "decode_tokens_per_second": GROUPS * group_size / decode["median_s"],
        "update": common.median(train_seconds(model, params, shape, repeats)),
        "prompt_cache_mb": sum(x.nbytes for x in jax.tree.leaves(state.prompt)) / 1e6,
        "response_cache_mb": sum(x.nbytes for x in jax.tree.leaves(state.cache)) / 1e6,
        "peak_rollout_gb": rollout_memory,
        "peak_gb": memory.read()["peak_resident_gb"],
        "device": "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
    }


def plot(cases: list[dict], path) -> None:
    """Prefill, decoding speed and update over the prompt's length, a line for each G."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "prefill of 2 prompts, s": lambda case: case["prefill"]["median_s"],
        "decoded tokens a second": lambda case: case["decode_tokens_per_second"],
        "update, s": lambda case: case["update"]["median_s"],
        "peak memory, GB": lambda case: case["peak_gb"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for g in sorted({case["group_size"] for case in cases}):
            line = [case for case in cases if case["group_size"] == g]
            axis.plot([case["prompt"] for case in line], [value(case) for case in line], marker="o", label=f"G = {g}")
        axis.set(title=title, xlabel="prompt tokens", xscale="log", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--size", choices=common.SIZES, default="mini")
    options.add_argument("--child", type=int, nargs=2, metavar=("P", "G"), help="used by the command itself")
    args = options.parse_args()
    if args.child:
        print(json.dumps(measure(args.size, *args.child, args.repeats)))
        return
    cases = []
    for g in (1, 2) if args.quick else GROUP_SIZES:
        for p in (32, 64) if args.quick else PROMPTS:
            print(f"{args.size}: prompts of {p} tokens, {g} rollouts of each", flush=True)
            cases.append(common.child(__file__, ["--child", p, g, "--size", args.size, "--repeats", args.repeats]))
    rows = [
        (f"P={c['prompt']} G={c['group_size']}", c["prefill"]["median_s"], 1e3 * c["decode"]["median_s"],
         c["decode_tokens_per_second"], c["update"]["median_s"], c["prompt_cache_mb"], c["peak_gb"])
        for c in cases
    ]  # fmt: skip
    columns = ("", "prefill s", "decode step ms", "tokens/s", "update s", "prompt cache MB", "peak GB")
    common.show(f"{args.size}, N={GROUPS}, R={RESPONSE}", columns, rows)
    common.report("scaling", args, {"size": args.size, "cases": cases}, cases[0]["device"])
    if not args.quick or args.out:
        plot(cases, (args.out or common.RESULTS) / "scaling.png")


if __name__ == "__main__":
    main()
