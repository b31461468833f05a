"""Every setting of a run, section by section: name, type, default and what it means. `config.Config` is the whole."""

from dataclasses import dataclass, field
from typing import Literal


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
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        metadata={"help": "matrices of every decoder layer that are adapted"},
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
    vision_block: int = field(default=96, metadata={"help": "patches in a packed block; no image may have more"})
    pack_blocks: int = field(default=12, metadata={"help": "blocks encoded in one call"})
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
    length_buckets: int = field(
        default=4, metadata={"help": "number of response lengths that micro-batches are padded to; each adds one compilation"}
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
