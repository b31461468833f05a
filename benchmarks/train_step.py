"""One GRPO update (gradient and optimizer), here and in torch: `python benchmarks/train_step.py [--size mini] [--repeats 3]`.

Three ways to make the same update of the same weights from the same batch of N groups x G rollouts with images in prompts and
observations, each in a process of its own:

- `shared`: `Learner.update`. A group's prompt passes the decoder once, an image passes the tower once.
- `naive`: the same learner given N*G groups of one rollout, so that every rollout carries its prompt. What sharing saves.
- `torch`: transformers' Qwen2-VL trained as TRL's GRPOTrainer does: rows [prompt, left-padded | response, right-padded] with
  each row's own images, logits of the response only, entropy as a metric, gradients accumulated over micro-batches, AdamW.

All three: token-level loss, clip 0.2/0.28, frozen tower, no recomputation of activations, 4 rows in a micro-batch (`shared`: one
group), float32 on a CPU, bfloat16 compute over float32 weights on a GPU. `shared` and `naive` encode the batch's images within
the timed step, although a rollout leaves them encoded. Before torch is timed its loss and gradient norm must agree
with ours (1e-3; bfloat16: 2e-2).

Writes benchmarks/results/train_step.json: seconds a step, ratios and peak memory. Meant to take about 6 minutes on two free
cores; `--size small` (63 M) takes some eight times as long there and is meant for a GPU, as is `2b`.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np

WAYS = ("shared", "naive", "torch")


class Shape(NamedTuple):
    """N groups of G rollouts: prompts of up to P tokens, responses of up to R."""

    n: int
    g: int
    p: int
    r: int

    def __str__(self):
        return f"P={self.p} R={self.r} G={self.g} N={self.n}"


SHAPES = (Shape(1, 8, 512, 64), Shape(1, 16, 2048, 256))
QUICK = (Shape(2, 4, 64, 32),)
MICRO_ROWS = 4


# ---- the batch ------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Prompts [N], responses [N][G] with kind and sampler's log-probability of every token, and advantages [N G]."""

    prompts: list
    responses: list
    kinds: list
    logprobs: list
    advantages: np.ndarray


class Ids:
    """Stands for a processor where text is ids already, written with spaces."""

    merge_size, image_token_id = 2, common.IMAGE

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def image_ids(self, grid: tuple[int, int]) -> list[int]:
        return [common.VISION_START, *[common.IMAGE] * (grid[0] * grid[1] // 4), common.VISION_END]


def make_problem(shape: Shape, vocab: int, seed: int = 0) -> Problem:
    """Random text with two images a prompt and, in the middle of every response, an observation with one.

    The longest prompt has P tokens and the longest response R; others are up to a quarter shorter.
    """
    from imagent_jax.images.prepare import PreparedImage
    from imagent_jax.model.interleave import encode_parts
    from imagent_jax.types import TokenKind

    rng = np.random.default_rng(seed)

    def text(count: int) -> str:
        return " ".join(map(str, rng.integers(common.FIRST_TEXT, vocab, count)))

    def image(h: int, w: int) -> PreparedImage:
        return PreparedImage(rng.integers(0, 256, (h * w, 588), np.uint8), (h, w), (14 * h, 14 * w))

    def lengths(longest: int, count: int) -> np.ndarray:
        made = rng.integers(longest - longest // 4, longest + 1, count)
        made[-1] = longest
        return made

    prompts, responses, kinds, logprobs = [], [], [], []
    for p in lengths(shape.p, shape.n):
        before = int(p) // 3
        after = int(p) - before - (8 * 8 + 4 * 12) // 4 - 4
        parts = [text(before), image(8, 8), image(4, 12), text(after)]
        prompts.append(encode_parts(parts, Ids()))
        rows = []
        for r in lengths(shape.r, shape.g):
            first = int(r) // 2 - 6
            observation = [text(2), image(8, 4), text(2)]
            last = int(r) - first - (8 * 4) // 4 - 2 - 4
            rows.append(encode_parts([text(first), *observation, text(last)], Ids(), prompts[-1].next_position))
            kind = np.full(r, TokenKind.OBSERVATION, np.uint8)
            kind[:first] = kind[-last:] = TokenKind.TEXT
            kinds.append(kind)
            # near what random weights give to a random token, so that ratios lie on both sides of both clips
            logprobs.append(rng.normal(-np.log(vocab) - 0.5, 0.3, r).astype(np.float32))
        responses.append(rows)
    g = shape.g
    group = lambda flat: [flat[i : i + g] for i in range(0, len(flat), g)]  # noqa: E731
    return Problem(prompts, responses, group(kinds), group(logprobs), rng.normal(size=(shape.n, g)).astype(np.float32))


def ungroup(problem: Problem) -> Problem:
    """The same rollouts as groups of one, each with its own copy of the prompt."""

    def alone(groups):
        return [[row] for group in groups for row in group]

    prompts = [prompt for prompt, group in zip(problem.prompts, problem.responses, strict=True) for _ in group]
    return Problem(
        prompts, alone(problem.responses), alone(problem.kinds), alone(problem.logprobs), problem.advantages.reshape(-1, 1)
    )


# ---- ours -----------------------------------------------------------------------------------------------------------


def pack(problem: Problem, store, shape: Shape):
    """The `GroupBatch` of a problem; its images are encoded into `store`."""
    from imagent_jax.rl.batch import pack_batch
    from imagent_jax.rollout.batch import RolloutBatch
    from imagent_jax.types import EndReason, Task, Trajectory

    flat = [*problem.prompts, *(row for group in problem.responses for row in group)]
    first = iter(store.add([image for encoded in flat for image in encoded.images]))
    vision = iter([encoded.vision([next(first) for _ in encoded.images]) for encoded in flat])
    prompt_vision = [next(vision) for _ in problem.prompts]
    tasks = [Task(str(i), "", (), "") for i in range(len(problem.prompts))]
    trajectories = [
        [
            Trajectory(task, j, row.ids, logprobs, kind, row.positions, next(vision), [], EndReason.ANSWERED, None)
            for j, (row, kind, logprobs) in enumerate(zip(*group, strict=True))
        ]
        for task, *group in zip(tasks, problem.responses, problem.kinds, problem.logprobs, strict=True)
    ]
    rollout = RolloutBatch(tasks, problem.prompts, prompt_vision, trajectories, store, {}, 0, common.IMAGE)
    return pack_batch(rollout, problem.advantages, problem.advantages, shape.p, shape.r)


class Ours:
    """The learner, a step at a time."""

    def __init__(self, folder: Path, problem: Problem, shape: Shape):
        from imagent_jax.config import TINY, load_config
        from imagent_jax.model import checkpoint
        from imagent_jax.model.attention import choose_attention, choose_dtype
        from imagent_jax.rl.learner import Learner
        from imagent_jax.rl.mask import mask_tables
        from imagent_jax.rl.optim import make_optimizer

        n, g = problem.advantages.shape
        self.shape, self.problem, cfg = shape, problem, load_config(TINY)
        self.cfg = replace(
            cfg,
            rollout=replace(cfg.rollout, groups=n, group_size=g, prompt_tokens=shape.p, response_tokens=shape.r),
            grpo=replace(cfg.grpo, minibatches=1, micro_groups=1 if g > 1 else min(MICRO_ROWS, n)),
        )
        dtype = choose_dtype("auto")
        self.model, self.params = checkpoint.load(
            folder, dtype=dtype, attention=choose_attention("auto", dtype), vision_block=64, logprob_chunk=4096
        )
        optimizer = make_optimizer(replace(cfg.optim, schedule="constant"), 1000)
        self.learner = Learner(self.model, self.cfg, optimizer, mask_tables(cfg.mask))
        self.learner.shapes = self.learner.shapes[-1:]  # the batch fills the widest, so no other shape need be compiled
        self.state = self.learner.init(self.params)

    def step(self) -> dict[str, float]:
        """Encodes the images and makes one update; its loss and gradient norm."""
        from imagent_jax.model.features import FeatureStore

        store = FeatureStore(self.model, self.params, pack_blocks=8)
        batch = pack(self.problem, store, self.shape)
        self.params, self.state, metrics = self.learner.update(self.params, self.state, batch, store)
        return {name: metrics[name] for name in ("loss", "grad_norm")}


# ---- theirs ---------------------------------------------------------------------------------------------------------


class Theirs:
    """The same update in torch and transformers, as TRL's GRPOTrainer makes it."""

    def __init__(self, folder: Path, problem: Problem, shape: Shape):
        import torch
        from transformers import Qwen2VLForConditionalGeneration

        from imagent_jax.config import OptimConfig
        from imagent_jax.model.families import read_folder
        from imagent_jax.model.vision import normalise

        tower, cfg = read_folder(folder).vision, OptimConfig()

        def ready(part):
            images = [image._replace(patches=np.asarray(normalise(tower, image.patches))) for image in part.images]
            return part._replace(images=images)

        responses = [list(map(ready, group)) for group in problem.responses]
        self.problem = ungroup(replace(problem, prompts=list(map(ready, problem.prompts)), responses=responses))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(self.device).train()
        self.model.model.visual.requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.clip_norm = cfg.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=cfg.learning_rate, betas=(cfg.b1, cfg.b2), weight_decay=cfg.weight_decay, fused=True
        )

    def collate(self, rows: range) -> dict:
        """Prompts padded on the left, responses on the right, the images of every row."""
        import torch

        prompts, responses = [self.problem.prompts[i].ids for i in rows], [self.problem.responses[i][0].ids for i in rows]
        p, r = max(map(len, prompts)), max(map(len, responses))
        ids, mask = np.zeros((2, len(rows), p + r), np.int64)
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            span = slice(p - len(prompt), p + len(response))
            ids[b, span], mask[b, span] = np.concatenate([prompt, response]), 1
        shown = [image for i in rows for part in (self.problem.prompts[i], self.problem.responses[i][0]) for image in part.images]
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == common.IMAGE).astype(np.int32),
            "pixel_values": np.concatenate([image.patches for image in shown]),
            "image_grid_thw": np.array([[1, *image.grid] for image in shown]),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def logprobs(self, rows: range):
        """Log-probabilities of the responses [b r], padding on the right; entropies are computed, as TRL logs them."""
        import torch

        inputs = self.collate(rows)
        r = max(len(self.problem.responses[i][0].ids) for i in rows)
        self.model.model.rope_deltas = None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(**inputs, logits_to_keep=r + 1, use_cache=False).logits[:, :-1].float()
        targets = inputs["input_ids"][:, -r:]
        # a row at a time, as TRL does: log_softmax of all of them at once would take as much memory again
        chosen = torch.gather(logits, -1, targets[..., None])[..., 0]
        logprobs = chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        with torch.no_grad():
            for row in logits:
                log = row.log_softmax(-1)
                -(log.exp() * log).sum(-1).mean()
        return logprobs

    def step(self) -> dict[str, float]:
        """One update over micro-batches; its loss and gradient norm."""
        import torch

        from imagent_jax.config import GRPOConfig
        from imagent_jax.types import TokenKind

        cfg, count = GRPOConfig(), len(self.problem.prompts)
        acted = [kind[0] != TokenKind.OBSERVATION for kind in self.problem.kinds]
        total, loss = sum(int(mask.sum()) for mask in acted), 0.0
        for begin in range(0, count, MICRO_ROWS):
            rows = range(begin, min(begin + MICRO_ROWS, count))
            logprobs = self.logprobs(rows)
            old, mask = np.zeros((2, *logprobs.shape), np.float32)
            for b, i in enumerate(rows):
                length = len(acted[i])
                old[b, :length], mask[b, :length] = self.problem.logprobs[i][0], acted[i]
            old, mask = torch.from_numpy(old).to(self.device), torch.from_numpy(mask).to(self.device)
            advantages = torch.from_numpy(self.problem.advantages[rows.start : rows.stop]).to(self.device)
            ratio = torch.exp(logprobs - old)
            clipped = torch.clamp(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
            part = (-torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / total
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm}


# ---- the command ----------------------------------------------------------------------------------------------------


def differences(found: dict, expected: dict) -> dict[str, float]:
    """Loss: absolute; gradient norm: relative."""
    return {
        "loss": abs(found["loss"] - expected["loss"]),
        "grad_norm": abs(found["grad_norm"] / expected["grad_norm"] - 1),
    }


def measure(way: str, folder: Path, size: str, shape: Shape, repeats: int, expected: dict | None) -> dict:
    """One way at one shape, in this process. `expected`: the first step's figures, checked before anything is timed."""
    memory = common.PeakMemory()
    problem = make_problem(shape, common.SIZES[size]["vocab_size"])
    if way == "torch":
        side = Theirs(folder, problem, shape)
        import torch

        device = torch.cuda.get_device_name() if side.device == "cuda" else "cpu"
    else:
        side = Ours(folder, ungroup(problem) if way == "naive" else problem, shape)
        import jax

        device = "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    found, tolerance = side.step(), 1e-3 if device == "cpu" else 2e-2
    if expected and any(d > tolerance for d in differences(found, expected).values()):
        sys.exit(f"error: {way} at {shape} gives {found}, not {expected}; the ways do not compute the same update.")
    times = common.seconds(side.step, repeats, warmup=0)
    if device == "cpu":
        peak = memory.read()["peak_resident_gb"]
    elif way == "torch":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    return found | common.median(times) | {"peak_memory_gb": round(peak, 3), "device": device}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--size", choices=common.SIZES, help="default: mini; with --quick: tiny")
    options.add_argument("--tmp", help="where the temporary checkpoint goes (default: the system's)")
    options.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "JSON"), help="used by the command itself")
    args = options.parse_args()
    size = args.size or ("tiny" if args.quick else "mini")
    if args.child:
        way, folder, settings = args.child
        shape, expected = json.loads(settings)
        print(json.dumps(measure(way, Path(folder), size, Shape(*shape), args.repeats, expected)))
        return
    cases = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        common.random_checkpoint(Path(folder), size)
        for shape in QUICK if args.quick else SHAPES:
            case = cases[str(shape)] = {}
            for way in WAYS:
                print(f"{shape}: {way}", flush=True)
                settings = json.dumps([shape, case.get("shared")])
                case[way] = common.child(__file__, ["--child", way, folder, settings, "--size", size, "--repeats", args.repeats])
            base = case["shared"]["median_s"]
            case["slower_than_shared"] = {way: case[way]["median_s"] / base for way in WAYS}
            case["difference_from_shared"] = {way: differences(case[way], case["shared"]) for way in WAYS[1:]}
    rows = [
        (
            f"{shape}  {way}",
            case[way]["median_s"],
            case["slower_than_shared"][way],
            case[way]["peak_memory_gb"],
            case[way]["loss"],
        )
        for shape, case in cases.items()
        for way in WAYS
    ]
    common.show(f"One GRPO update, {size}", ("batch and way", "s a step", "x shared", "peak GB", "loss"), rows)
    device = next(iter(cases.values()))["shared"]["device"]
    common.report("train_step", args, {"size": size, "cases": cases}, device)


if __name__ == "__main__":
    main()
