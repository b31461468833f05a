"""Every setting of a run: frozen dataclasses, YAML in and out, dotted overrides on the command line."""

import dataclasses
import difflib
import functools
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class RunConfig:
    """The run itself and where it writes."""

    name: str = field(default="tiny", metadata={"help": "folder of the run inside run.dir"})
    dir: str = field(default="runs", metadata={"help": "folder of all runs"})
    steps: int = field(default=120, metadata={"help": "training steps"})
    seed: int = field(default=0, metadata={"help": "seed of sampling and of the order of tasks"})
    checkpoint_every: int = field(default=40, metadata={"help": "steps between checkpoints (0: only at the end)"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    resume: bool = field(default=False, metadata={"help": "continue the run of this name from its newest checkpoint"})
    compile_cache: str = field(
        default="~/.cache/imagent_jax/xla", metadata={"help": "folder of compiled programs kept between runs ('': none)"}
    )
    log_trajectories: int = field(default=16, metadata={"help": "trajectories written to disk each step"})


@dataclass(frozen=True)
class ModelConfig:
    """The policy's checkpoint and how it computes."""

    path: str = field(default="tiny", metadata={"help": "'tiny' (the embedded base), a folder, or a hub id"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "compute dtype"})
    param_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "storage dtype of parameters"})
    remat: Literal["none", "dots", "full"] = field(default="none", metadata={"help": "what the backward pass recomputes"})
    freeze_vision: bool = field(default=True, metadata={"help": "keep the vision tower as it is"})
    logprob_chunk: int = field(default=4096, metadata={"help": "tokens whose logits exist at one time"})


@dataclass(frozen=True)
class ImagesConfig:
    """How given images are shown, and how patches are packed."""

    min_pixels: int = field(default=3136, metadata={"help": "least pixels of a given image as shown"})
    max_pixels: int = field(default=4704, metadata={"help": "most pixels of a given image as shown"})
    vision_block: int = field(default=144, metadata={"help": "patches in a packed block; no image may have more"})
    pack_blocks: int = field(default=16, metadata={"help": "blocks encoded in one call"})


@dataclass(frozen=True)
class DataConfig:
    """Tasks."""

    name: Literal["tiny_world", "jsonl"] = field(default="tiny_world", metadata={"help": "the embedded world, or JSON Lines"})
    path: str = field(default="", metadata={"help": "folder with train.jsonl and test.jsonl (name=jsonl)"})
    cache_dir: str = field(default="~/.cache/imagent_jax/data", metadata={"help": "where generated tasks are kept"})
    train_size: int = field(default=3072, metadata={"help": "training tasks of the tiny world"})
    test_size: int = field(default=512, metadata={"help": "held-out tasks of the tiny world"})
    seed: int = field(default=0, metadata={"help": "seed of the tiny world and of the order of tasks"})
    skip_bad: bool = field(default=False, metadata={"help": "skip rows with faults (counted and listed) instead of stopping"})


@dataclass(frozen=True)
class ToolsConfig:
    """Tools, and how they show images."""

    names: tuple[str, ...] = field(
        default=("visual_reflection", "visual_confirmation"), metadata={"help": "tools the policy may call"}
    )
    system: str = field(default="Answer with <answer>...</answer>.", metadata={"help": "system text before the tools"})
    coordinates: Literal["relative_1000", "absolute"] = field(
        default="relative_1000", metadata={"help": "space of boxes: 0 to 1000, or pixels of the image as shown"}
    )
    max_turns: int = field(default=5, metadata={"help": "calls a trajectory may make"})
    max_repeats: int = field(default=2, metadata={"help": "times the same call may be made"})
    max_images: int = field(default=16, metadata={"help": "images of a trajectory, given and made"})
    timeout_s: float = field(default=10.0, metadata={"help": "seconds a call may take"})
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
    prompt_tokens: int = field(default=160, metadata={"help": "P: tokens of the longest prompt"})
    response_tokens: int = field(default=256, metadata={"help": "R: tokens of the longest response, observations included"})
    observation_tokens: int = field(default=32, metadata={"help": "tokens of an observation appended at once"})
    decode_chunk: int = field(default=64, metadata={"help": "tokens decoded before the host looks"})


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
        default="drop_positive", metadata={"help": "tokens of invalid calls: train, never, or only where the advantage is not positive"}
    )
    observations: bool = field(default=True, metadata={"help": "never train observation tokens (off only for ablations)"})
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
    constant: int = field(default=256, metadata={"help": "tokens a trajectory counts for at level=constant"})
    ratio: Literal["token", "sequence"] = field(default="token", metadata={"help": "importance ratio of a token, or of its sequence (GSPO)"})
    kl: float = field(default=0.0, metadata={"help": "weight of the KL to the starting policy (k3)"})
    importance_cap: float = field(default=2.0, metadata={"help": "cap of truncated importance weights"})
    epochs: int = field(default=1, metadata={"help": "passes over a batch"})
    minibatches: int = field(default=2, metadata={"help": "optimizer updates in a pass"})
    micro_groups: int = field(default=8, metadata={"help": "groups in one forward and backward pass"})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and global-norm clipping."""

    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    schedule: Literal["constant", "cosine"] = field(default="cosine", metadata={"help": "after warm-up"})
    warmup_steps: int = field(default=5, metadata={"help": "updates of linear warm-up"})
    weight_decay: float = field(default=0.0, metadata={"help": "of matrices only"})
    clip_norm: float = field(default=1.0, metadata={"help": "global norm of the gradient"})
    b1: float = field(default=0.9, metadata={"help": "first-moment decay"})
    b2: float = field(default=0.98, metadata={"help": "second-moment decay"})


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = field(default=40, metadata={"help": "steps between evaluations during training (0: none)"})
    tasks: int = field(default=512, metadata={"help": "held-out tasks before and after training"})
    during: int = field(default=128, metadata={"help": "held-out tasks during training"})
    groups: int = field(default=128, metadata={"help": "tasks evaluated at once"})
    seed: int = field(default=1234, metadata={"help": "seed of sampling in evaluation"})
    greedy: bool = field(default=True, metadata={"help": "greedy decoding in evaluation"})


@dataclass(frozen=True)
class MeshConfig:
    """Mesh axes; -1 fills an axis with the devices that are left."""

    data: int = field(default=1, metadata={"help": "groups are split over it"})
    fsdp: int = field(default=1, metadata={"help": "parameters are split over it"})
    tensor: int = field(default=1, metadata={"help": "heads and hidden units are split over it"})


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From nested dictionaries; what is missing keeps its default.

        Raises:
            ValueError: an unknown or ill-typed key (the nearest valid name is given), or values that do not go together.
        """
        sections = {}
        for name, section in values.items():
            if name not in _SECTIONS:
                raise ValueError(f"There is no config section {name!r}; {_nearest(name, _SECTIONS)}.")
            if not isinstance(section, dict):
                raise ValueError(f"Config section {name!r} must hold settings, not {section!r}.")
            types = _field_types(_SECTIONS[name])
            for key in section:
                if key not in types:
                    dotted = [f"{name}.{k}" for k in types] + [f"{s}.{k}" for s in _SECTIONS for k in _field_types(_SECTIONS[s])]
                    raise ValueError(f"There is no setting {name}.{key}; {_nearest(f'{name}.{key}', dotted)}.")
            sections[name] = _SECTIONS[name](**{k: _coerce(f"{name}.{k}", v, types[k]) for k, v in section.items()})
        config = cls(**sections)
        config.validate()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries; `from_dict` is the inverse."""
        plain = dataclasses.asdict(self)
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} for s, d in plain.items()}

    def to_yaml(self) -> str:
        """Complete and reloadable."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def validate(self) -> None:
        """Raises ValueError for a value out of range or values that do not go together; the sentence says what to change."""
        least_one = (
            "run.keep_checkpoints", "images.min_pixels", "images.vision_block", "images.pack_blocks", "data.train_size",
            "data.test_size", "tools.max_turns", "tools.workers", "rollout.groups", "rollout.group_size",
            "rollout.prompt_tokens", "rollout.response_tokens", "rollout.observation_tokens", "rollout.decode_chunk",
            "grpo.epochs", "grpo.minibatches", "grpo.micro_groups", "eval.tasks", "eval.groups", "model.logprob_chunk",
        )  # fmt: skip
        for dotted in least_one:
            if self.get(dotted) < 1:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be at least 1.")
        for dotted in ("rollout.temperature", "optim.learning_rate", "optim.clip_norm", "tools.timeout_s"):
            if not self.get(dotted) > 0:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must be above 0.")
        for dotted in ("run.steps", "run.checkpoint_every", "eval.every", "grpo.kl", "optim.weight_decay"):
            if self.get(dotted) < 0:
                raise ValueError(f"{dotted} is {self.get(dotted)}; it must not be negative.")
        if self.images.max_pixels < self.images.min_pixels:
            raise ValueError(f"images.max_pixels {self.images.max_pixels} is below images.min_pixels {self.images.min_pixels}.")
        if self.images.vision_block % 4:
            raise ValueError(f"images.vision_block is {self.images.vision_block}; it must be a multiple of 4 (2x2 patches).")
        micro = min(self.grpo.micro_groups, self.rollout.groups)
        if self.rollout.groups % micro:
            raise ValueError(
                f"rollout.groups {self.rollout.groups} does not divide by grpo.micro_groups {micro}; choose a divisor."
            )
        if (self.rollout.groups // micro) % self.grpo.minibatches:
            raise ValueError(
                f"{self.rollout.groups // micro} micro-batches do not divide into grpo.minibatches {self.grpo.minibatches}; "
                "lower grpo.micro_groups or grpo.minibatches."
            )
        if self.data.name == "jsonl" and not self.data.path:
            raise ValueError("data.name is 'jsonl' but data.path is empty; name the folder with train.jsonl and test.jsonl.")
        if sum(axis == -1 for axis in (self.mesh.data, self.mesh.fsdp, self.mesh.tensor)) > 1:
            raise ValueError("Only one mesh axis can be -1 (what is left); give the others a size.")

    def get(self, dotted: str) -> Any:
        """The value of a setting by dotted name."""
        return functools.reduce(getattr, dotted.split("."), self)


_SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}


def _field_types(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?".rstrip("?") if close else f"there are {', '.join(sorted(set(names))[:12])}"


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of setting `name`; strings (from the command line) are read as YAML first."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, options))}.")
        return value
    if origin is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ValueError(f"{name} is {value!r}; it must be a list of names.")
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; it must be of type {kind.__name__}.")
    return value


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: no such file, or not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no config file {path}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections with settings.")
    return values


def read_args(argv: Sequence[str]) -> Config:
    """The config of a command line: `--config FILE` first, then `--section.key VALUE` (or `=VALUE`) overrides.

    Raises:
        ValueError: see `Config.from_dict`.
    """
    values: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not a setting; settings are given as --section.key VALUE.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} needs a value.")
            value = rest.pop(0)
        if name == "config":
            for section, settings in load_config(value).items():
                values.setdefault(section, {}).update(settings if isinstance(settings, dict) else {"": settings})
        else:
            overrides.append((name, value))
    for name, value in overrides:
        section, dot, key = name.partition(".")
        if not dot:
            every = [f"{s}.{k}" for s, t in _SECTIONS.items() for k in _field_types(t)]
            close = [d for d in every if d.endswith(f".{name}")]
            raise ValueError(f"There is no setting {name!r}; {f'did you mean {close[0]!r}' if close else _nearest(name, every)}.")
        kind = _field_types(_SECTIONS[section]).get(key) if section in _SECTIONS else None
        values.setdefault(section, {})[key] = value if kind is str or typing.get_origin(kind) is Literal else yaml.safe_load(value)
    return Config.from_dict(values)


def help_text(program: str) -> str:
    """All settings with type, default and meaning."""
    lines = [f"usage: python -m {program} [--config FILE.yaml] [--section.key VALUE ...]", ""]
    for section, kind in _SECTIONS.items():
        lines += [f"{section}: {kind.__doc__.splitlines()[0]}"]
        types = _field_types(kind)
        for f in dataclasses.fields(kind):
            options = typing.get_args(types[f.name]) if typing.get_origin(types[f.name]) is Literal else None
            shown = "|".join(options) if options else "list" if typing.get_origin(types[f.name]) is tuple else types[f.name].__name__
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            lines.append(f"  --{section}.{f.name} {shown}  (default {default!r})\n        {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None, program: str = "imagent_jax.train") -> Config:
    """`read_args`, or one sentence on standard error and exit code 2; `--help` prints every setting."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(arg in ("-h", "--help") for arg in argv):
        print(help_text(program))
        raise SystemExit(0)
    try:
        return read_args(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
