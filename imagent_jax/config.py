"""Every setting of a run: frozen dataclasses, YAML in and out, dotted overrides on the command line."""

import dataclasses
import difflib
import functools
import math
import re
import sys
import textwrap
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from imagent_jax.model.lora import TARGETS, check_targets
from imagent_jax.tools import tools_by_name


@dataclass(frozen=True)
class RunConfig:
    """The run itself and where it writes."""

    name: str = field(default="tiny", metadata={"help": "folder of the run inside run.dir"})
    dir: str = field(default="runs", metadata={"help": "folder of all runs"})
    steps: int = field(default=240, metadata={"help": "training steps"})
    seed: int = field(default=0, metadata={"help": "seed of sampling and of the order of tasks"})
    checkpoint_every: int = field(default=40, metadata={"help": "steps between checkpoints (0: only at the end)"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    keep_best: int = field(default=1, metadata={"help": "checkpoints kept besides, of best held-out accuracy"})
    checkpoint_dir: str = field(
        default="", metadata={"help": "folder or gs://bucket/path of all runs' checkpoints ('': in the run's folder)"}
    )
    resume: bool = field(default=False, metadata={"help": "continue the run of this name from its newest checkpoint"})
    compile_cache: str = field(
        default="~/.cache/imagent_jax/xla", metadata={"help": "folder of compiled programs kept between runs ('': none)"}
    )
    profile: int = field(default=0, metadata={"help": "step traced into the run's profile/, for Perfetto and XProf (0: none)"})
    wandb: str = field(default="", metadata={"help": "project of Weights & Biases to log to as well ('': none; needs wandb)"})
    log_trajectories: int = field(default=16, metadata={"help": "trajectories logged each step, in whole groups (0: none)"})


@dataclass(frozen=True)
class ModelConfig:
    """The policy's checkpoint and how it computes."""

    path: str = field(default="tiny", metadata={"help": "'tiny' (the embedded base), a folder, or a hub id"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "compute dtype (auto: bfloat16 on GPU and TPU, float32 on CPU)"}
    )
    param_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "storage dtype of parameters, gradients and second moment"}
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = field(
        default="auto", metadata={"help": "attention kernel (auto: splash on TPU, cudnn on GPU in bfloat16, else xla)"}
    )
    remat: Literal["none", "dots", "full", "offload"] = field(
        default="none", metadata={"help": "what the backward pass recomputes (offload: as dots, with those in host memory)"}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "keep the vision tower as it is"})
    logprob_chunk: int = field(default=4096, metadata={"help": "tokens whose logits a device holds at one time"})


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: they are trained, and the model's own weights stay as they are."""

    rank: int = field(default=0, metadata={"help": "inner width of the adapters (0: none, the weights themselves are trained)"})
    alpha: float = field(default=32.0, metadata={"help": "adapters are scaled by alpha / rank"})
    targets: tuple[str, ...] = field(
        default=tuple(TARGETS), metadata={"help": f"matrices of every decoder layer, of {', '.join(TARGETS)}"}
    )
    merger: bool = field(default=False, metadata={"help": "adapt the vision merger too"})
    path: str = field(
        default="", metadata={"help": "folder of a PEFT adapter to begin with; then its rank, alpha and targets count"}
    )

    @property
    def on(self) -> bool:
        return bool(self.rank or self.path)


@dataclass(frozen=True)
class ImagesConfig:
    """How given images are shown, and how patches are packed."""

    min_pixels: int = field(default=3136, metadata={"help": "least pixels of a given image as shown"})
    max_pixels: int = field(default=4704, metadata={"help": "most pixels of a given image as shown"})
    vision_block: int = field(default=144, metadata={"help": "patches in a packed block; no image may have more"})
    pack_blocks: int = field(default=8, metadata={"help": "blocks encoded in one call"})
    packs: int = field(default=16, metadata={"help": "encoded packs there is room for (with more it grows)"})


@dataclass(frozen=True)
class DataConfig:
    """Tasks."""

    name: Literal["tiny_world", "jsonl"] = field(default="tiny_world", metadata={"help": "the embedded world, or JSON Lines"})
    path: str = field(default="", metadata={"help": "folder with train.jsonl and test.jsonl (name=jsonl)"})
    cache_dir: str = field(default="~/.cache/imagent_jax/data", metadata={"help": "where generated tasks are kept"})
    train_size: int = field(default=3072, metadata={"help": "training tasks of the tiny world"})
    test_size: int = field(default=512, metadata={"help": "held-out tasks of the tiny world"})
    seed: int = field(default=0, metadata={"help": "seed of the tiny world and of the order of tasks"})
    permute_images: bool = field(
        default=True, metadata={"help": "in random order; else what the answer needs comes first (tiny world, training)"}
    )
    skip_bad: bool = field(default=False, metadata={"help": "skip rows with faults (counted and listed) instead of stopping"})


@dataclass(frozen=True)
class ToolsConfig:
    """Tools, and how they show images."""

    names: tuple[str, ...] = field(
        default=("visual_reflection", "visual_confirmation"),
        metadata={"help": "tools the policy may call; your own as 'package.module:name'"},
    )
    system: str = field(default="Answer with <answer>...</answer>.", metadata={"help": "system text before the tools"})
    coordinates: Literal["relative_1000", "absolute"] = field(
        default="relative_1000", metadata={"help": "space of boxes: 0 to 1000, or pixels of the image as shown"}
    )
    max_turns: int = field(default=5, metadata={"help": "calls a trajectory may make"})
    max_repeats: int = field(default=2, metadata={"help": "times the same call may be made"})
    max_images: int = field(default=16, metadata={"help": "images of a trajectory, given and made"})
    timeout_s: float = field(default=10.0, metadata={"help": "seconds a call may take"})
    patience_s: float = field(default=2.0, metadata={"help": "seconds a slow call may hold up rollouts that could go on"})
    workers: int = field(default=2, metadata={"help": "calls that run at once"})
    low_pixels: int = field(default=4704, metadata={"help": "most pixels of visual_reflection at 'low'"})
    high_pixels: int = field(default=7056, metadata={"help": "most pixels of visual_reflection at 'high'"})
    confirm_min_pixels: int = field(default=7056, metadata={"help": "least pixels of a crop as shown"})
    confirm_max_pixels: int = field(default=9408, metadata={"help": "most pixels of a crop as shown"})
    min_box: float = field(default=0.08, metadata={"help": "least side of a crop, as a fraction of the image's"})


@dataclass(frozen=True)
class RolloutConfig:
    """The shape of a batch of rollouts."""

    groups: int = field(default=16, metadata={"help": "N: tasks a step"})
    group_size: int = field(default=8, metadata={"help": "G: rollouts of each task"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampled softmax"})
    prompt_tokens: int = field(default=112, metadata={"help": "P: tokens of the longest prompt"})
    response_tokens: int = field(default=192, metadata={"help": "R: tokens of the longest response, observations included"})
    observation_tokens: int = field(default=32, metadata={"help": "tokens of an observation appended at once"})
    decode_chunk: int = field(default=16, metadata={"help": "tokens decoded before the host looks"})
    overlap: bool = field(
        default=False, metadata={"help": "sample the next step's rollouts while one trains, by weights one update older"}
    )


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the rewards, by name; a dotted path 'package.module:function' in `custom` adds your own."""

    answer: float = field(default=1.0, metadata={"help": "right answer"})
    format: float = field(default=0.1, metadata={"help": "one well-formed answer and no invalid call"})
    tool_gain: float = field(default=0.2, metadata={"help": "right answer after at least one executed call"})
    custom: tuple[str, ...] = field(default=(), metadata={"help": "your own rewards, 'package.module:function', weight 1"})


@dataclass(frozen=True)
class MaskConfig:
    """The two-level mask: which tokens and trajectories train, and which count in their group's statistics."""

    invalid_call: Literal["keep", "drop", "drop_positive"] = field(
        default="drop_positive", metadata={"help": "tokens of invalid calls: train, never, or only at advantages <= 0"}
    )
    observations: Literal["keep", "drop"] = field(
        default="drop", metadata={"help": "tokens of observations: never train, or do (an ablation; needs grpo.recompute)"}
    )
    drop_truncated: bool = field(default=True, metadata={"help": "drop trajectories cut off by length"})
    drop_over_turns: bool = field(default=True, metadata={"help": "drop trajectories with too many calls"})
    drop_void: bool = field(default=False, metadata={"help": "drop trajectories that ended without an answer"})
    drop_repeated: bool = field(default=True, metadata={"help": "drop trajectories that repeated a call"})
    count_truncated: bool = field(default=True, metadata={"help": "truncated trajectories count in group statistics"})
    count_over_turns: bool = field(default=True, metadata={"help": "over-turn trajectories count in group statistics"})
    count_void: bool = field(default=True, metadata={"help": "void trajectories count in group statistics"})
    count_repeated: bool = field(default=True, metadata={"help": "repeated trajectories count in group statistics"})


@dataclass(frozen=True)
class GRPOConfig:
    """The policy loss: GRPO, Dr.GRPO, DAPO and GSPO are settings of one function (`imagent_jax.rl.loss.PRESETS`)."""

    normalise_std: bool = field(default=True, metadata={"help": "divide advantages by the group's deviation"})
    clip_low: float = field(default=0.2, metadata={"help": "the ratio is clipped below 1 - clip_low"})
    clip_high: float = field(default=0.28, metadata={"help": "the ratio is clipped above 1 + clip_high"})
    level: Literal["token", "sequence", "constant"] = field(
        default="token", metadata={"help": "sums are divided by kept tokens, by each trajectory's tokens, or by N*G*constant"}
    )
    constant: int = field(default=192, metadata={"help": "tokens a trajectory counts for at level=constant"})
    ratio: Literal["token", "sequence"] = field(
        default="token", metadata={"help": "importance ratio of a token, or of its sequence (GSPO)"}
    )
    kl: float = field(default=0.0, metadata={"help": "weight of the KL to the starting policy (k3)"})
    recompute: bool = field(
        default=False,
        metadata={"help": "take old log-probabilities from the trainer, and weight by trainer/sampler (low-precision sampling)"},
    )
    importance_cap: float = field(default=2.0, metadata={"help": "where those weights are truncated"})
    epochs: int = field(default=1, metadata={"help": "passes over a batch"})
    minibatches: int = field(default=2, metadata={"help": "optimizer updates in a pass"})
    micro_groups: int = field(
        default=2, metadata={"help": "groups in one forward and backward pass; of short responses more, for the same tokens"}
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and global-norm clipping."""

    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate"})
    schedule: Literal["constant", "cosine"] = field(default="cosine", metadata={"help": "after warm-up"})
    warmup_steps: int = field(default=5, metadata={"help": "updates of linear warm-up"})
    weight_decay: float = field(default=0.0, metadata={"help": "of matrices only"})
    clip_norm: float = field(default=1.0, metadata={"help": "global norm of the gradient"})
    b1: float = field(default=0.9, metadata={"help": "first-moment decay"})
    b2: float = field(default=0.98, metadata={"help": "second-moment decay"})
    moment_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "storage of the first moment"})


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = field(default=40, metadata={"help": "steps between evaluations during training (0: none)"})
    tasks: int = field(default=512, metadata={"help": "held-out tasks before and after training"})
    during: int = field(default=128, metadata={"help": "held-out tasks during training"})
    groups: int = field(default=128, metadata={"help": "tasks evaluated at once"})
    seed: int = field(default=1234, metadata={"help": "seed of sampling in evaluation"})
    greedy: bool = field(default=False, metadata={"help": "greedy decoding in evaluation"})


@dataclass(frozen=True)
class MeshConfig:
    """Mesh axes; -1 fills an axis with the devices that are left."""

    data: int = field(default=1, metadata={"help": "groups are split over it; parameters are repeated"})
    fsdp: int = field(default=1, metadata={"help": "groups are split over it, and parameters"})
    tensor: int = field(default=1, metadata={"help": "heads and hidden units are split over it"})


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one job; TPU VMs, Slurm and Open MPI need none of this."""

    coordinator: str = field(default="", metadata={"help": "host:port of process 0 ('': one process, or the cluster's)"})
    num_processes: int = field(default=0, metadata={"help": "processes of the job (0: one, or as the cluster says)"})
    process_id: int = field(default=-1, metadata={"help": "which of them this is, from 0 (-1: as the cluster says)"})
    timeout_s: int = field(default=300, metadata={"help": "seconds to wait at the start for processes that are late"})


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    images: ImagesConfig = ImagesConfig()
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    mask: MaskConfig = MaskConfig()
    grpo: GRPOConfig = GRPOConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From nested dictionaries; what is missing keeps its default.

        Raises:
            ValueError: an unknown or ill-typed key (the nearest valid name is given), or values that do not go together.
        """
        _check_names(values)
        return _build(_checked(_parser().parse_object, values))

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """From YAML text, the inverse of `to_yaml`; what is missing keeps its default.

        Raises:
            ValueError: not a YAML mapping, or see `from_dict`.
        """
        return cls.from_dict(_read_yaml(text, "The text"))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries; `from_dict` is the inverse."""
        plain = dataclasses.asdict(self)
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} for s, d in plain.items()}

    def to_yaml(self) -> str:
        """Complete and reloadable."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def get(self, dotted: str) -> Any:
        """The value of a setting by dotted name."""
        return functools.reduce(getattr, dotted.split("."), self)

    def validate(self) -> None:
        """Raises ValueError for a value out of range or values that do not go together; the sentence says what to change."""
        self._validate_ranges()
        self._validate_images()
        if self.grpo.minibatches > self.rollout.groups:
            raise ValueError(
                f"grpo.minibatches is {self.grpo.minibatches}, more than rollout.groups {self.rollout.groups}; an update needs a "
                "group at least."
            )
        if self.rollout.overlap and not (self.model.freeze_vision and not self.lora.merger):
            raise ValueError("rollout.overlap is for a tower that stays as it is; set model.freeze_vision, unset lora.merger.")
        if self.mask.observations == "keep" and not self.grpo.recompute:
            raise ValueError(
                "mask.observations is 'keep', but a sampler has no log-probabilities of observations; set grpo.recompute true."
            )
        if self.data.name == "jsonl" and not self.data.path:
            raise ValueError("data.name is 'jsonl' but data.path is empty; name the folder with train.jsonl and test.jsonl.")
        if not self.run.name.strip():
            raise ValueError("run.name is empty; give the run a name, which becomes its folder in run.dir.")
        for axis in dataclasses.fields(MeshConfig):
            if (size := self.get(f"mesh.{axis.name}")) != -1 and size < 1:
                raise ValueError(f"mesh.{axis.name} is {size}; it must be at least 1, or -1 for the devices that are left.")
        if sum(axis == -1 for axis in (self.mesh.data, self.mesh.fsdp, self.mesh.tensor)) > 1:
            raise ValueError("Only one mesh axis can be -1 (what is left); give the others a size.")
        if self.lora.on and not self.model.freeze_vision:
            raise ValueError(
                "model.freeze_vision is false, but with LoRA the model's own weights stay as they are; leave it true, and set "
                "lora.merger to adapt the vision merger."
            )
        try:
            check_targets(self.lora.targets, self.lora.merger)
        except ValueError as error:
            raise ValueError(f"lora.targets: {error}") from None
        try:
            tools_by_name([name for name in self.tools.names if ":" not in name])  # your own: as a run starts
        except ValueError as error:
            raise ValueError(f"tools.names: {str(error).rstrip('.')}{'' if str(error).endswith('?') else '.'}") from None

    def _validate_ranges(self) -> None:
        for dotted, kind in SETTINGS.items():
            if kind is float and not math.isfinite(self.get(dotted)):
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be a finite number.")
        for dotted in _AT_LEAST_ONE:
            if self.get(dotted) < 1:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be at least 1.")
        for dotted in _ABOVE_ZERO:
            if self.get(dotted) <= 0:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be above 0.")
        for dotted in _NOT_NEGATIVE:
            if self.get(dotted) < 0:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must not be negative.")
        for dotted in ("optim.b1", "optim.b2", "grpo.clip_low"):
            if not 0 <= self.get(dotted) < 1:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be at least 0 and below 1.")
        if self.tools.min_box > 1:
            raise ValueError(f"tools.min_box is {self.tools.min_box}; it is a fraction of the image's side, at most 1.")

    def _validate_images(self) -> None:
        if self.images.vision_block % 4:
            raise ValueError(f"images.vision_block is {self.images.vision_block}; it must be a multiple of 4 (2x2 patches).")
        for low, high in (
            ("images.min_pixels", "images.max_pixels"),
            ("tools.low_pixels", "tools.high_pixels"),
            ("tools.confirm_min_pixels", "tools.confirm_max_pixels"),
        ):
            if self.get(high) < self.get(low):
                raise ValueError(f"{high} {self.get(high)} is below {low} {self.get(low)}; raise {high} or lower {low}.")
        for dotted in ("images.max_pixels", "tools.high_pixels", "tools.confirm_max_pixels"):
            patches = self.get(dotted) // _PATCH_PIXELS
            if patches > self.images.vision_block:
                raise ValueError(
                    f"{dotted} {self.get(dotted)} allows {patches} patches but images.vision_block holds "
                    f"{self.images.vision_block}; raise images.vision_block or lower {dotted}."
                )


_AT_LEAST_ONE = (
    "run.keep_checkpoints", "images.min_pixels", "images.vision_block", "images.pack_blocks", "data.train_size",
    "data.test_size", "tools.max_turns", "tools.max_repeats", "tools.max_images", "tools.workers", "tools.low_pixels",
    "tools.confirm_min_pixels", "rollout.groups", "rollout.group_size", "rollout.prompt_tokens", "rollout.response_tokens",
    "rollout.observation_tokens", "rollout.decode_chunk", "grpo.constant", "grpo.epochs", "grpo.minibatches",
    "grpo.micro_groups", "eval.tasks", "eval.during", "eval.groups", "model.logprob_chunk",
    "distributed.timeout_s",
)  # fmt: skip
_ABOVE_ZERO = (
    "rollout.temperature", "optim.learning_rate", "optim.clip_norm", "tools.timeout_s", "tools.patience_s", "tools.min_box",
    "grpo.importance_cap", "lora.alpha",
)  # fmt: skip
_NOT_NEGATIVE = (
    "run.steps", "run.profile", "run.checkpoint_every", "run.keep_best", "run.log_trajectories", "eval.every", "grpo.kl",
    "grpo.clip_high", "optim.weight_decay", "optim.warmup_steps", "lora.rank", "distributed.num_processes",
)  # fmt: skip
_PATCH_PIXELS = 14 * 14  # a patch of Qwen2-VL and Qwen2.5-VL
_SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}
SETTINGS: dict[str, Any] = {f"{s}.{k}": t for s, kind in _SECTIONS.items() for k, t in typing.get_type_hints(kind).items()}
"""The type of every setting, by dotted name."""


def load_config(path: str | Path) -> Config:
    """The config in a YAML file; settings it does not name keep their defaults.

    Raises:
        ValueError: no such file, not a YAML mapping, or see `Config.from_dict`.
    """
    return Config.from_dict(_read_file(path))


def read_args(argv: Sequence[str], program: str = "imagent_jax.train") -> Config:
    """The config of a command line: the files of `--config`, in order, then `--section.key VALUE` (or `=VALUE`).

    Raises:
        ValueError: see `Config.from_dict`.
    """
    for arg in argv:
        if arg.startswith("--") and (name := arg[2:].partition("=")[0]) not in ("help", "config", "") and name not in SETTINGS:
            raise ValueError(f"There is no setting {name!r}; {_nearest(name, SETTINGS)}")
    parser = _parser(program)
    base = parser.get_defaults()
    for path in _checked(parser.parse_args, list(argv)).config or ():
        values = _read_file(path)
        _check_names(values)
        base = _checked(parser.parse_object, values, cfg_base=base)
    return _build(_checked(parser.parse_args, list(argv), namespace=base))


def parse_args(argv: Sequence[str] | None = None, program: str = "imagent_jax.train") -> Config:
    """`read_args`, or one sentence on standard error and exit code 2; `--help` prints every setting."""
    try:
        return read_args(sys.argv[1:] if argv is None else argv, program)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def reference() -> str:
    """`docs/configuration.md`: every setting with its type, default and meaning, from the dataclasses themselves."""
    lines = ["# Configuration", "", "Every setting: its default, its type and what it means. This page is written by", ""]
    lines += ["```bash", "python -m imagent_jax.config > docs/configuration.md", "```"]
    for section, settings in _SECTIONS.items():
        lines += ["", f"## {section}", *textwrap.wrap(settings.__doc__, 120), ""]
        for f in dataclasses.fields(settings):
            name = f"{section}.{f.name}"
            value = list(f.default) if isinstance(f.default, tuple) else f.default
            written = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            kind = re.split(r" \(|, such", _kind(SETTINGS[name]))[0]
            words = f"- `{name}: {written}`, {kind}: {f.metadata['help']}"
            lines += textwrap.wrap(words, 120, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _parser(program: str = "imagent_jax.train") -> ArgumentParser:
    """One argument per setting: type, default and help are the dataclasses' own."""
    parser = ArgumentParser(
        prog=f"python -m {program}",
        usage="%(prog)s [--config FILE.yaml] [--section.key VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    files = "YAML file of settings, may be given again; settings of the command line win"
    parser.add_argument("--config", action="append", metavar="FILE.yaml", help=files)
    for section, kind in _SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        for f in dataclasses.fields(kind):
            name = f"{section}.{f.name}"
            options = {} if typing.get_origin(SETTINGS[name]) is Literal or SETTINGS[name] is bool else {"metavar": "VALUE"}
            group.add_argument(f"--{name}", type=SETTINGS[name], default=f.default, help=f.metadata["help"], **options)
    return parser


def _build(parsed: Namespace) -> Config:
    for name, kind in SETTINGS.items():
        if parsed[name] is None:
            raise ValueError(f"{name} is empty; it must be {_kind(kind)}, or be left out for its default.")
    config = Config(**{section: kind(**vars(parsed[section])) for section, kind in _SECTIONS.items()})
    config.validate()
    return config


def _checked(parse: Callable[..., Namespace], *args: Any, **kwargs: Any) -> Namespace:
    """The parser's result, or its complaint as one sentence in our words."""
    try:
        return parse(*args, **kwargs)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        ill = re.fullmatch(r'Parser key "([\w.]+)": .*Got value: ?(.*)', message)
        if ill and ill[1] in SETTINGS:
            raise ValueError(f"{ill[1]} is {ill[2]!r}; it must be {_kind(SETTINGS[ill[1]])}.") from None
        if lacks := re.match(r"argument --([\w.]+): expected one argument", message):
            raise ValueError(f"--{lacks[1]} needs a value, as in --{lacks[1]}=VALUE.") from None
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}; see --help for every setting.") from None


def _check_names(values: dict[str, Any]) -> None:
    for section, settings in values.items():
        if section not in _SECTIONS:
            raise ValueError(f"There is no section {section!r}; {_nearest(str(section), _SECTIONS)}")
        if not isinstance(settings, dict):
            raise ValueError(f"Section {section!r} must hold settings, such as {_example(section)}, not {settings!r}.")
        for key in settings:
            if f"{section}.{key}" not in SETTINGS:
                name = f"{section}.{key}"
                raise ValueError(f"There is no setting {name!r}; {_nearest(name, SETTINGS)}")


def _example(section: str) -> str:
    return next(name for name in SETTINGS if name.startswith(f"{section}."))


def _nearest(name: str, names: Iterable[str]) -> str:
    """The valid name closest to `name`: one that ends in it, else the most similar, else where to look."""
    names = list(names)
    last = name.rpartition(".")[2]
    close = [n for n in names if n == last or n.endswith(f".{last}")] or difflib.get_close_matches(name, names, 1, 0.5)
    if not close:  # a setting given without its section, and misspelt
        keys = {n.rpartition(".")[2]: n for n in names}
        close = [keys[key] for key in difflib.get_close_matches(last, keys, 1, 0.5)]
    return f"did you mean {close[0]!r}?" if close else "see --help for every setting."


def _kind(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (quote it in YAML)"}
    return words.get(kind, "a list of names, such as [a, b]")


def _read_file(path: str | Path) -> dict[str, Any]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no config file {path}.")
    return _read_yaml(path.read_text(), str(path))


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}.") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{origin} must hold sections with settings, such as 'run:' with 'steps: 100' below it.")
    return values or {}


if __name__ == "__main__":
    print(reference(), end="")
