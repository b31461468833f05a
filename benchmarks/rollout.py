"""Rollouts, here and with Hugging Face's `generate`: `python benchmarks/rollout.py [--sizes tiny small] [--repeats 3]`.

Multi-turn rollouts of the tiny world with real tool calls, N tasks x G rollouts. Ours samples them; every trajectory is then
replayed by a loop around `Qwen2VLForConditionalGeneration.generate`: in each turn it samples as many tokens as the
trajectory's turn has, sets the trajectory's own tokens in their place, appends what the trajectory was shown there (text and
image), and goes on. Weights, prompts, images and lengths are therefore the same on both sides, and first the log-probabilities
that transformers gives to some of these tokens are held against the sampler's. Each side has a process of its own.

The loop is as a competent user writes it: all rows that still go on in one batch padded on the left, the cache kept by
`generate` within a turn, each row's conversation and images encoded anew in the next turn, a turn as long as its longest row.
It is spared what our time includes: preparing images, tokenising, running tools. float32 on a CPU, bfloat16 on a GPU.

Sizes: `tiny`, the shipped base with the default configuration (16 x 8); `small` (60 M; 4 x 8) and `2b` (4 x 8, for a GPU): the
base inside a decoder of that width and depth (2b: Qwen2-VL-2B's), which samples the same calls; vocabulary, head width and
tower stay the base's (`grow`). `small_long` is `small` with given images of up to 128 tokens each, shown as large as they are.

Writes benchmarks/results/rollout.json: sampled tokens a second, ratio, peak memory. Meant to take about 6 minutes on two free
cores.
"""

import json
import pickle
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np

SHAPES = {
    "tiny": None,
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 9, "num_heads": 24, "num_kv_heads": 8},
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_layers": 28, "num_heads": 48, "num_kv_heads": 8},
}
SHAPES["small_long"] = SHAPES["small"]
BATCH = {"tiny": (16, 8), "small": (4, 8), "small_long": (4, 8), "2b": (4, 8)}
CHECKED = 4
"""Rows whose log-probabilities are compared."""


# ---- models ---------------------------------------------------------------------------------------------------------


def grow(folder: Path, size: str) -> None:
    """Writes a larger model that computes what the tiny base does.

    The base's residual stream is the first part of a wider one whose rest stays zero: nothing writes there, since the rows
    and columns of the output projections that could are zero, as are those of new heads, units and layers. All other
    new weights are random. A norm over the wider stream divides by a smaller root mean square; its weight makes up for that.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from imagent_jax.model import checkpoint
    from imagent_jax.model.vlm import create
    from imagent_jax.tiny.base import base_folder

    base, params = checkpoint.load(base_folder())
    old, shape = base.cfg.text, SHAPES[size]
    text, width = replace(old, **shape), shape["hidden_size"]
    hf = json.loads(base.cfg.hf)
    hf["text_config"] |= {
        "hidden_size": width, "intermediate_size": text.intermediate_size, "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads, "num_key_value_heads": text.num_kv_heads,
    }  # fmt: skip
    hf["vision_config"]["hidden_size"] = width
    cfg = replace(base.cfg, text=text, vision=replace(base.cfg.vision, hidden_size=width), hf=json.dumps(hf))
    model, wide = create(cfg, param_dtype=jnp.bfloat16 if size == "2b" else jnp.float32)

    def columns(heads: int, per_old: int, per_new: int) -> np.ndarray:
        """Where the base's heads go: a head stays with its key head."""
        at = np.array([h // per_old * per_new + h % per_old for h in range(heads)])
        return (at[:, None] * old.head_dim + np.arange(old.head_dim)).reshape(-1)

    q = columns(old.num_heads, old.num_heads // old.num_kv_heads, text.num_heads // text.num_kv_heads)
    kv, d = columns(old.num_kv_heads, 1, 1), np.arange(old.hidden_size)
    layers, units, shrink = np.arange(old.num_layers), np.arange(old.intermediate_size), (old.hidden_size / width) ** 0.5
    places = {
        "q": (layers, d, q), "q_bias": (layers, q), "k": (layers, d, kv), "k_bias": (layers, kv), "v": (layers, d, kv),
        "v_bias": (layers, kv), "o": (layers, q, d), "gate": (layers, d, units), "up": (layers, d, units),
        "down": (layers, units, d), "input_norm": (layers, d), "post_norm": (layers, d), "norm": (d,),
        "embed": (np.arange(old.vocab_size), d),
    }  # fmt: skip
    source = dict(nnx.to_flat_state(params))

    def place(path, leaf):
        value, name = np.array(leaf.get_value(), np.float32), path[-1]
        new = np.asarray(source[path].get_value(), np.float32)
        if path[0] == "vision":
            if value.shape == new.shape:
                value = new
            else:  # the merger's last matrix and bias
                value[...] = 0
                value[..., : old.hidden_size] = new
        else:
            if name in ("o", "down", "embed"):
                value[...] = 0
            value[np.ix_(*places[name])] = new * shrink if name.endswith("norm") else new
        return leaf.replace(jnp.asarray(value, leaf.get_value().dtype))

    grown = nnx.from_flat_state([(path, place(path, leaf)) for path, leaf in nnx.to_flat_state(wide)])
    checkpoint.save(folder, model, jax.block_until_ready(grown), source=base_folder())


# ---- ours -----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What was sampled in a turn, and what was shown after it (ids and prepared images; nothing after the last)."""

    sampled: np.ndarray
    shown: np.ndarray
    images: list


class Row(NamedTuple):
    """One trajectory as a script: its prompt, its turns, and the sampler's log-probability of every response token."""

    prompt: np.ndarray
    images: list
    turns: list[Turn]
    logprobs: np.ndarray

    def response(self) -> np.ndarray:
        return np.concatenate([ids for turn in self.turns for ids in (turn.sampled, turn.shown)])


def script(engine, batch) -> list[Row]:
    """The rows of a rollout, N*G of them, images normalised."""
    from imagent_jax.model.vision import normalise

    def ready(image):
        return image._replace(patches=np.asarray(normalise(engine.model.cfg.vision, image.patches)))

    rows = []
    for prompt, group in zip(batch.prompts, batch.trajectories, strict=True):
        for t in group:
            turns = []
            for turn, after in zip(t.turns, [*t.turns[1:], None], strict=True):
                shown, images = t.ids[:0], []
                if after is not None:
                    shown = t.ids[turn.stop : after.start]
                    entries = [t.images[number - 1] for number in turn.call.images]
                    images = [ready(engine.processor.prepare_to(entry.image, entry.shown)) for entry in entries]
                turns.append(Turn(t.ids[turn.start : turn.stop], shown, images))
            rows.append(Row(prompt.ids, [ready(image) for image in prompt.images], turns, t.logprobs))
    return rows


def ours(folder: str, args, groups: int, group_size: int, path: Path) -> dict:
    """Samples the trajectories, once for every repeat and always the same, and leaves their script at `path`."""
    memory = common.PeakMemory()
    import jax

    from imagent_jax.config import TINY, load_config
    from imagent_jax.rollout.policy import Policy
    from imagent_jax.tiny.world import task_at

    cfg, accelerated = load_config(TINY), jax.default_backend() != "cpu"
    cfg = replace(
        cfg,
        model=replace(cfg.model, path=folder, param_dtype="bfloat16" if accelerated else "float32"),
        rollout=replace(cfg.rollout, groups=groups, group_size=group_size),
    )
    if args.sizes == ["small_long"]:
        images = replace(cfg.images, max_pixels=100_352, vision_block=512, pack_blocks=8)
        cfg = replace(cfg, images=images, rollout=replace(cfg.rollout, prompt_tokens=640))
    parts, tasks = Policy(cfg), [task_at(0, "train", i) for i in range(groups)]
    batches = []

    def run():
        batches[:] = [parts.collector.collect(parts.params, tasks, group_size=group_size, seed=0)]

    times, batch = common.seconds(run, args.repeats), batches[0]
    rows = script(parts.collector, batch)
    path.write_bytes(pickle.dumps(rows))
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9 if accelerated else memory.read()["peak_resident_gb"]
    return common.median(times) | {
        "peak_memory_gb": round(peak, 3),
        "device": jax.devices()[0].device_kind if accelerated else "cpu",
        "sampled_tokens": batch.sampled_tokens,
        "response_tokens": sum(len(row.logprobs) for row in rows),
        "prompt_tokens": sum(len(row.prompt) for row in rows) / len(rows),
        "turns": sum(len(row.turns) for row in rows) / len(rows),
        "phases_s": {name: round(s, 4) for name, s in batch.times.items()},
    }


# ---- theirs ---------------------------------------------------------------------------------------------------------


class Loop:
    """The multi-turn loop around `generate`."""

    def __init__(self, folder: str):
        import torch
        from transformers import Qwen2VLForConditionalGeneration

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.model.generation_config.update(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
        )

    def collate(self, contexts: list[np.ndarray], images: list[list]) -> dict:
        """Left-padded ids and every image of every row, as the processor of transformers gives them."""
        import torch

        image_token, longest = self.model.config.image_token_id, max(map(len, contexts))
        ids, mask = np.zeros((2, len(contexts), longest), np.int64)
        kinds = np.zeros(ids.shape, np.int32)
        for b, context in enumerate(contexts):
            ids[b, -len(context) :], mask[b, -len(context) :] = context, 1
            kinds[b, -len(context) :] = context == image_token
        shown = [image for row in images for image in row]
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": kinds,
            "pixel_values": np.concatenate([image.patches for image in shown]),
            "image_grid_thw": np.array([[1, *image.grid] for image in shown]),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def run(self, rows: list[Row]) -> None:
        """Every row to its end, a turn of all rows at a time."""
        import torch

        contexts, images = [row.prompt for row in rows], [list(row.images) for row in rows]
        with torch.inference_mode():
            for number in range(max(len(row.turns) for row in rows)):
                going = [i for i, row in enumerate(rows) if number < len(row.turns)]
                turns = [rows[i].turns[number] for i in going]
                inputs = self.collate([contexts[i] for i in going], [images[i] for i in going])
                length = max(len(turn.sampled) for turn in turns)
                self.model.generate(**inputs, max_new_tokens=length)  # no end token is set: always this long
                for i, turn in zip(going, turns, strict=True):
                    contexts[i] = np.concatenate([contexts[i], turn.sampled, turn.shown])
                    images[i] += turn.images
        if self.device == "cuda":
            torch.cuda.synchronize()

    def largest_difference(self, rows: list[Row]) -> float:
        """Between these log-probabilities of sampled tokens and the sampler's."""
        import torch

        contexts = [np.concatenate([row.prompt, row.response()]) for row in rows]
        inputs = self.collate(contexts, [row.images + [image for turn in row.turns for image in turn.images] for row in rows])
        self.model.model.rope_deltas = None
        with torch.inference_mode():
            logprobs = self.model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found = torch.gather(logprobs, -1, inputs["input_ids"][:, 1:, None])[..., 0].cpu().numpy()
        largest = 0.0
        for row, line in zip(rows, found, strict=True):
            sampled = np.concatenate([np.arange(len(turn.sampled) + len(turn.shown)) < len(turn.sampled) for turn in row.turns])
            largest = max(largest, float(np.abs(line[-len(sampled) :] - row.logprobs)[sampled].max()))
        return largest


def theirs(folder: str, args, path: Path) -> dict:
    """The trajectories at `path` replayed."""
    memory = common.PeakMemory()
    import torch

    rows, loop = pickle.loads(path.read_bytes()), Loop(folder)
    difference, tolerance = loop.largest_difference(rows[:CHECKED]), 1e-3 if loop.device == "cpu" else 0.5
    if difference > tolerance:
        sys.exit(f"error: transformers' log-probabilities differ by {difference:.2g} from the sampler's; not the same rollouts.")
    times = common.seconds(lambda: loop.run(rows), args.repeats)
    peak = torch.cuda.max_memory_allocated() / 1e9 if loop.device == "cuda" else memory.read()["peak_resident_gb"]
    return common.median(times) | {"peak_memory_gb": round(peak, 3), "logprob_difference": difference}


# ---- the command ----------------------------------------------------------------------------------------------------


def compare(size: str, args, groups: int, group_size: int) -> dict:
    """Both sides of a size, one process after the other."""
    from imagent_jax.tiny.base import base_folder

    with tempfile.TemporaryDirectory(dir=args.tmp) as scratch:
        folder, path = base_folder(), Path(scratch) / "script.pickle"
        if SHAPES[size]:
            folder = Path(scratch) / "model"
            common.child(__file__, ["--child", "grow", folder, path, "--sizes", size])
        found = {}
        for side in ("ours", "transformers"):
            print(f"{size}, {groups} x {group_size} rollouts: {side}", flush=True)
            batch = ["--groups", groups, "--group-size", group_size, "--repeats", args.repeats]
            found[side] = common.child(__file__, ["--child", side, folder, path, "--sizes", size, *batch])
    tokens = found["ours"]["sampled_tokens"]
    for side in found.values():
        side["tokens_per_second"] = tokens / side["median_s"]
    return found | {
        "groups": groups,
        "group_size": group_size,
        "ratio": found["transformers"]["median_s"] / found["ours"]["median_s"],
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--sizes", choices=SHAPES, nargs="+", default=["tiny", "small", "small_long"])
    options.add_argument("--groups", type=int, help="tasks at once (default: 16 of tiny, else 4)")
    options.add_argument("--group-size", type=int, help="rollouts of each (default: 8)")
    options.add_argument("--tmp", help="where temporary files go (default: the system's)")
    options.add_argument("--child", nargs=3, metavar=("WHAT", "FOLDER", "SCRIPT"), help="used by the command itself")
    args = options.parse_args()
    if args.child:
        what, folder, path = args.child
        if what == "grow":
            grow(Path(folder), args.sizes[0])
            print("{}")
        elif what == "ours":
            print(json.dumps(ours(folder, args, args.groups, args.group_size, Path(path))))
        else:
            print(json.dumps(theirs(folder, args, Path(path))))
        return
    cases = {}
    for size in ["tiny"] if args.quick else args.sizes:
        groups, group_size = (2, 2) if args.quick else BATCH[size]
        cases[size] = compare(size, args, args.groups or groups, args.group_size or group_size)
    rows = [
        (f"{size}  {side}", case[side]["tokens_per_second"], case[side]["median_s"], case[side]["peak_memory_gb"],
         case["ratio"] if side == "ours" else 1.0)
        for size, case in cases.items()
        for side in ("ours", "transformers")
    ]  # fmt: skip
    common.show("Rollouts", ("size and side", "tokens/s", "s a rollout", "peak GB", "x generate"), rows)
    device = next(iter(cases.values()))["ours"]["device"]
    common.report("rollout", args, {"cases": cases}, device)


if __name__ == "__main__":
    main()
