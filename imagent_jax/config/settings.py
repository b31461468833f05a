"""Every setting of a run, section by section: name, type, default and what it means. `config.Config` is the whole."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


def setting(default: Any, help: str, hash: bool | None = None, **bounds: float) -> Any:
    """Declare a setting.

    Args:
        default: default value; its field's annotation is the type.
        help: what the setting means, for `--help` and the reference.
        hash: False for a setting that may be a mapping, which has no hash. A configuration has one: jitted functions need it.
        bounds: its range: `least` and `most` (inclusive), `above` and `below` (exclusive).
    """
    return field(default=default, hash=hash, metadata={"help": help, "bounds": bounds})


class Table(dict):
    """A mapping that is a value, so that settings which hold one can be hashed. Never changed."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class RunConfig:
    """The run itself and where it writes."""

    name: str = setting("run", "folder of the run inside run.dir")
    dir: str = setting("runs", "folder of all runs")
    steps: int = setting(200, "training steps", least=0)
    seed: int = setting(0, "seed of sampling and of the order of tasks")
    checkpoint_every: int = setting(25, "steps between checkpoints (0: only at the end)", least=0)
    keep_checkpoints: int = setting(2, "newest checkpoints kept", least=1)
    keep_best: int = setting(1, "checkpoints kept besides, of best held-out accuracy", least=0)
    checkpoint_dir: str = setting("", "folder or gs://bucket/path of all runs' checkpoints ('': in the run's folder)")
    resume: bool = setting(False, "continue the run of this name from its newest checkpoint")
    compile_cache: str = setting("~/.cache/imagent_jax/xla", "folder of compiled programs kept between runs ('': none)")
    profile: int = setting(0, "step traced into the run's profile/, for Perfetto and XProf (0: none)", least=0)
    wandb: str = setting("", "project of Weights & Biases to log to as well ('': none; needs wandb)")
    log_trajectories: int = setting(16, "trajectories logged each step, in whole groups (0: none)", least=0)


@dataclass(frozen=True)
class ModelConfig:
    """The policy's checkpoint and how it computes."""

    path: str = setting("Qwen/Qwen2-VL-2B-Instruct", "a folder, a hub id, or 'tiny' or 'tiny_tools' (the embedded bases)")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute dtype (auto: bfloat16 on GPU and TPU, float32 on CPU)"
    )
    param_dtype: Literal["float32", "bfloat16"] = setting("float32", "storage dtype of parameters, gradients and second moment")
    attention: Literal["auto", "xla", "cudnn", "splash"] = setting(
        "auto", "attention kernel (auto: splash on TPU, cudnn on GPU in bfloat16, else xla)"
    )
    remat: Literal["none", "dots", "full", "offload"] = setting(
        "none", "what the backward pass recomputes (offload: as dots, with those in host memory)"
    )
    freeze_vision: bool = setting(True, "keep the vision tower as it is")
    logprob_chunk: int = setting(4096, "tokens whose logits a device holds at one time", least=1)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: they are trained, and the model's own weights stay as they are."""

    rank: int = setting(0, "inner width of the adapters (0: none, the weights themselves are trained)", least=0)
    alpha: float = setting(32.0, "adapters are scaled by alpha / rank", above=0)
    targets: tuple[
        Literal[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "qkv",
            "proj",
            "fc1",
            "fc2",
            "linear_fc1",
            "linear_fc2",
        ],
        ...,
    ] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "names of the matrices that are adapted, in every layer; from qkv on, they are the vision tower's",
    )
    tower: bool = setting(False, "targets are the vision tower's matrices too (of Qwen2.5-VL, gate_proj, up_proj, down_proj)")
    merger: bool = setting(False, "adapt the vision merger too")
    modules_to_save: tuple[str, ...] = setting((), "modules trained and saved whole, as in PEFT, such as merger or lm_head")
    path: str = setting("", "folder of a PEFT adapter to begin with; it then says what is adapted, and how")

    @property
    def on(self) -> bool:
        return bool(self.rank or self.path)


@dataclass(frozen=True)
class ImagesConfig:
    """How given images are shown, and how patches are packed."""

    min_pixels: int = setting(3136, "least pixels of a given image as shown", least=1)
    max_pixels: int = setting(1_003_520, "most pixels of a given image as shown")
    vision_block: int = setting(5120, "patches in a packed block; no image may have more", least=1)
    pack_blocks: int = setting(1, "blocks encoded in one call", least=1)
    pages: int = setting(16, "encoded packs kept on the device; older ones are in host memory", least=1)
    originals_gb: float = setting(
        4.0, "host memory for decoded originals of given images; others are decoded again when a tool needs them", least=0
    )


DataSet = Literal["files", "tiny_world", "tiny_code", "tiny_search", "tiny_total", "tiny_code_steps", "tiny_search_steps"]
"""Where tasks come from: the user's files, or a world of the package's own."""


@dataclass(frozen=True)
class SourceConfig:
    """A source of a mixture."""

    name: DataSet = setting("files", "as data.name")
    path: str = setting("", "as data.path")
    test_path: str = setting("", "as data.test_path")
    weight: float = setting(1.0, "share of the tasks, relative to the weights of the others", above=0)
    answer_type: str = setting("", "of rows that name none ('': data.answer_type)")
    tools: tuple[str, ...] | None = setting(None, "tools its tasks may call, of those of the run (null: all)")
    reward: dict[str, float] = setting(Table(), "weights of rewards by name, in place of the run's")
    environment: str = setting("", "the environment of its tasks, 'package.module:Class' ('': the run's)")


_SOURCE = "; ".join(f"{f.name} ({f.metadata['help']})" for f in fields(SourceConfig))


@dataclass(frozen=True)
class DataConfig:
    """Tasks."""

    name: DataSet = setting("files", "your own files, or an embedded world")
    path: str = setting("", "folder with train.* and, where anything is evaluated, test.*; a file, a pattern, or a hub id")
    test_path: str = setting("", "held-out tasks, where they are not in data.path; as data.path")
    mixture: dict[str, SourceConfig] = setting(
        Table(), f"several sources in place of data.path: their names, and below each what differs of {_SOURCE}"
    )
    answer_type: str = setting("", "answer type of rows that name none ('': by options and format)")
    curriculum: Literal["none", "pass_rate"] = setting(
        "none",
        "how often tasks come again (pass_rate: rarer where rollouts of a group are likely all right or all wrong; before a "
        "task is measured, by the column pass_rate of its row)",
    )
    curriculum_floor: float = setting(0.1, "least chance that the curriculum leaves a task in an epoch", above=0, most=1)
    cache_dir: str = setting("~/.cache/imagent_jax/data", "where generated tasks and verdicts on task files are kept")
    train_size: int = setting(3072, "training tasks of a tiny world", least=1)
    test_size: int = setting(512, "held-out tasks of a tiny world", least=1)
    seed: int = setting(0, "seed of a tiny world, of the order of tasks and of options")
    shuffle_options: bool = setting(False, "show the options of a question in an order of its own (files)")
    permute_images: bool = setting(True, "in random order; else what the answer needs comes first (tiny world, training)")
    skip_bad: bool = setting(False, "skip rows with faults (counted and listed) instead of stopping")

    @property
    def title(self) -> str:
        """What the tasks are, for messages."""
        return ", ".join(self.mixture) or self.name


@dataclass(frozen=True)
class ToolsConfig:
    """Tools, and how they show images."""

    names: tuple[str, ...] = setting(
        ("visual_reflection", "visual_confirmation"), "tools the policy may call; your own as 'package.module:name'"
    )
    settings: dict[str, dict[str, Any]] = setting(
        Table(), "settings of a tool's own, by its name, such as {python: {timeout_s: 20}}; every tool has timeout_s", hash=False
    )
    mcp: tuple[str, ...] = setting((), "MCP servers whose tools are offered too: commands that start them, or URLs (needs mcp)")
    mcp_chars: int = setting(4000, "most characters of text that a call of an MCP tool returns", least=1)
    environment: str = setting("", "your own world, 'package.module:Class'; its @tool methods are tools too")
    prompt: str = setting("default", "system text and descriptions of tools: 'default', 'tiny', or a YAML file of your own")
    system: str = setting("", "system text before the tools ('': the prompt's)")
    coordinates: Literal["relative_1000", "absolute"] = setting(
        "relative_1000", "space of boxes: 0 to 1000, or pixels of the image as shown"
    )
    max_turns: int = setting(5, "calls a trajectory may make", least=1)
    max_repeats: int = setting(2, "times the same call may be made", least=1)
    max_images: int = setting(16, "images of a trajectory, given and made", least=1)
    timeout_s: float = setting(10.0, "seconds a call, or a method of an environment of your own, may take", above=0)
    patience_s: float = setting(2.0, "seconds a slow call may hold up rollouts that could go on", above=0)
    workers: int = setting(8, "calls that run at once", least=1)
    low_pixels: int = setting(200_704, "most pixels of visual_reflection at 'low'", least=1)
    high_pixels: int = setting(1_003_520, "most pixels of visual_reflection at 'high'")
    confirm_min_pixels: int = setting(200_704, "least pixels of a crop as shown", least=1)
    confirm_max_pixels: int = setting(1_003_520, "most pixels of a crop as shown")
    min_box: float = setting(0.05, "least side of a crop, as a fraction of the image's", above=0, most=1)


@dataclass(frozen=True)
class CallSettings:
    """Settings that every tool has. A tool with settings of its own has a frozen dataclass that inherits from this one."""

    timeout_s: float | None = setting(None, "seconds a call may take (null: tools.timeout_s)", above=0)


@dataclass(frozen=True)
class SandboxConfig:
    """The sandbox in which the tool 'python' runs code of the policy."""

    backend: Literal["auto", "namespaces", "landlock", "remote"] = setting(
        "auto", "how code is confined (auto: namespaces or landlock, the first that holds here; remote: by the server of url)"
    )
    url: str = setting("", "remote: full address of a server that speaks SandboxFusion's POST /run_code")
    wall_s: float = setting(5.0, "seconds a call may take", above=0)
    cpu_s: int = setting(60, "processor seconds of a trajectory", least=1)
    memory_mb: int = setting(512, "MiB of a trajectory's code, beyond the libraries", least=16)
    disk_mb: int = setting(64, "MiB of a trajectory's files", least=1)
    files: int = setting(64, "open files", least=16)
    printed: int = setting(2000, "characters of output that a call returns; the rest is cut", least=1)


@dataclass(frozen=True)
class SearchConfig:
    """Where the tool 'search' finds passages, and how many it shows."""

    backend: Literal["index", "server", "serper"] = setting(
        "index", "a folder of `imagent index`, a server that speaks Search-R1's POST /retrieve, or Serper's web search"
    )
    path: str = setting("", "index: its folder, or 'tiny' (the embedded encyclopaedia, built on first use)")
    url: str = setting("", "server: its full address, such as http://127.0.0.1:8000/retrieve ('' with serper: Serper's own)")
    key_env: str = setting("SERPER_API_KEY", "serper: environment variable that holds the key")
    passages: int = setting(3, "passages that a call returns", least=1, most=100)
    passage_chars: int = setting(500, "characters of a passage's text; the rest is cut", least=1)
    timeout_s: float = setting(5.0, "seconds a server may take to answer", above=0)
    record: Literal["auto", "off", "record", "replay"] = setting(
        "auto",
        "record keeps every answer and asks nothing twice; replay asks nothing, and what is not recorded is a fault of the "
        "environment (auto: record with serper, else off)",
    )
    recordings: str = setting("recordings", "folder of the answers that are kept")


@dataclass(frozen=True)
class RolloutConfig:
    """The shape of a batch of rollouts."""

    groups: int = setting(16, "N: tasks a step", least=1)
    group_size: int = setting(8, "G: rollouts of each task, which learn by comparison with each other", least=2)
    temperature: float = setting(1.0, "of the sampled softmax", above=0)
    prompt_tokens: int = setting(8192, "P: tokens of the longest prompt", least=1)
    response_tokens: int = setting(4096, "R: tokens of the longest response, observations included", least=1)
    observation_tokens: int = setting(512, "tokens of an observation appended at once", least=1)
    decode_chunk: int = setting(128, "tokens decoded before the host looks", least=1)
    overlap: bool = setting(False, "sample the next step's rollouts while one trains, by weights one update older")
    refill: int = setting(0, "fresh tasks that a step may draw in place of groups without spread (0: none)", least=0)


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the rewards, by name; a dotted path 'package.module:function' in `custom` adds your own."""

    answer: float = setting(1.0, "score of the answer, by the task's answer type")
    format: float = setting(0.1, "one well-formed answer and no invalid call")
    tool_gain: float = setting(0.2, "right answer after at least one executed call")
    iou: float = setting(0.0, "overlap (IoU) of boxes; abstains where the reference is no box")
    point_in_box: float = setting(0.0, "a point in the reference box; abstains where the reference is no box")
    set_f1: float = setting(0.0, "F1 of the sets of words of answer and reference")
    math_verify: float = setting(0.0, "equal expressions, by math-verify; abstains where the reference is none")
    judge: float = setting(0.0, "score by the model of the section judge")
    published_code: float = setting(0.0, "as Visual-ARFT pays code: 0.9, whatever it is; rows with a step only, as the next four")
    problem_set: float = setting(0.0, "the set of problems of a picture, half a point for its turn alone")
    published_answer: float = setting(0.0, "F1 of the answer of a row's one step")
    published_query: float = setting(0.0, "similarity of the query, from 0.5 on")
    published_format: float = setting(0.0, "one step of the row's sort, and nothing beside it")
    environment: float = setting(1.0, "what the task's own environment pays, where it does")
    custom: dict[str, float] | tuple[str, ...] = setting(
        (), "your own rewards: 'package.module:function', weight 1, or a mapping from these to weights", hash=False
    )
    concurrency: int = setting(16, "calls of async rewards that run at once", least=1)
    timeout_s: float = setting(60.0, "seconds a call of an async reward of your own may take", above=0)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every reward but that of environments, by name or path."""
        named = (
            "answer",
            "format",
            "tool_gain",
            "iou",
            "point_in_box",
            "set_f1",
            "math_verify",
            "judge",
            "published_code",
            "problem_set",
            "published_answer",
            "published_query",
            "published_format",
        )
        return {name: getattr(self, name) for name in named} | self.custom_weights

    @property
    def custom_weights(self) -> dict[str, float]:
        """The weight of every reward in `custom`, by path."""
        return self.custom if isinstance(self.custom, dict) else dict.fromkeys(self.custom, 1.0)


@dataclass(frozen=True)
class JudgeConfig:
    """The judge: a model behind an OpenAI-compatible server that scores answers (reward.judge; needs the extra judge)."""

    base_url: str = setting("http://localhost:8000/v1", "address of the server, up to /v1")
    model: str = setting("", "name of the model on that server")
    key_env: str = setting("", "environment variable that holds the server's key ('': it needs none)")
    prompt: str = setting("", "file of the prompt, with {question}, {references} and {answer} in it ('': ours)")
    concurrency: int = setting(16, "requests at once", least=1)
    timeout_s: float = setting(60.0, "seconds a request may take", above=0)
    retries: int = setting(3, "further requests where one fails or its reply holds no score", least=0)
    cache_dir: str = setting("~/.cache/imagent_jax/judge", "where replies are kept, so that none is asked for twice")


@dataclass(frozen=True)
class MaskConfig:
    """The two-level mask: which tokens and trajectories train, and which count in their group's statistics."""

    invalid_call: Literal["keep", "drop", "drop_positive"] = setting(
        "drop_positive", "tokens of invalid calls: train, never, or only at advantages <= 0"
    )
    observations: Literal["keep", "drop"] = setting(
        "drop", "tokens of observations: never train, or do (an ablation; needs grpo.recompute)"
    )
    drop_truncated: bool = setting(True, "drop trajectories cut off by length")
    drop_over_turns: bool = setting(True, "drop trajectories with too many calls")
    drop_void: bool = setting(False, "drop trajectories that ended without an answer")
    drop_repeated: bool = setting(True, "drop trajectories that repeated a call")
    count_truncated: bool = setting(True, "truncated trajectories count in group statistics")
    count_over_turns: bool = setting(True, "over-turn trajectories count in group statistics")
    count_void: bool = setting(True, "void trajectories count in group statistics")
    count_repeated: bool = setting(True, "repeated trajectories count in group statistics")


@dataclass(frozen=True)
class GRPOConfig:
    """The policy loss: GRPO, Dr.GRPO, DAPO and GSPO are settings of one function (`imagent_jax.rl.loss.PRESETS`)."""

    normalise_std: bool = setting(True, "divide advantages by the group's deviation")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", least=0, below=1)
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high", least=0)
    level: Literal["token", "sequence", "constant"] = setting(
        "token", "sums are divided by kept tokens, by each trajectory's tokens, or by N*G*constant"
    )
    constant: int = setting(4096, "tokens a trajectory counts for at level=constant", least=1)
    ratio: Literal["token", "sequence"] = setting("token", "importance ratio of a token, or of its sequence (GSPO)")
    kl: float = setting(0.0, "weight of the KL to the starting policy (k3)", least=0)
    recompute: bool = setting(
        False, "take old log-probabilities from the trainer, and weight by trainer/sampler (low-precision sampling)"
    )
    importance_cap: float = setting(2.0, "where those weights are truncated", above=0)
    epochs: int = setting(1, "passes over a batch", least=1)
    minibatches: int = setting(2, "optimizer updates in a pass", least=1)
    micro_groups: int = setting(
        1, "groups in one forward and backward pass; of short responses more, for the same tokens", least=1
    )
    length_buckets: int = setting(
        4, "number of response lengths that micro-batches are padded to; each adds one compilation", least=1
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and global-norm clipping."""

    learning_rate: float = setting(1e-6, "peak learning rate", above=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "after warm-up")
    warmup_steps: int = setting(5, "updates of linear warm-up", least=0)
    weight_decay: float = setting(0.01, "of matrices only", least=0)
    clip_norm: float = setting(1.0, "global norm of the gradient", above=0)
    b1: float = setting(0.9, "first-moment decay", least=0, below=1)
    b2: float = setting(0.999, "second-moment decay", least=0, below=1)
    moment_dtype: Literal["float32", "bfloat16"] = setting("float32", "storage of the first moment")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = setting(25, "steps between evaluations during training (0: none)", least=0)
    tasks: int = setting(512, "held-out tasks before and after training (0: none)", least=0)
    during: int = setting(128, "held-out tasks during training", least=1)
    groups: int = setting(16, "tasks evaluated at once", least=1)
    seed: int = setting(1234, "seed of sampling in evaluation")
    greedy: bool = setting(False, "greedy decoding in evaluation")
    benchmarks: tuple[str, ...] = setting(
        (), "benchmarks evaluated whenever held-out tasks are, NAME or NAME=PATH of their files (docs/benchmarks.md)"
    )
    samples: int = setting(1, "k of Avg@k: samples of each question of a benchmark", least=1)
    prompt: Literal["agent", "benchmark", "published"] = setting(
        "agent", "of benchmarks: question and options as in training, the benchmark's own prompt, or its published loop"
    )
    published_texts: str = setting("", "YAML file with the texts of published loops ('': in words of our own)")
    shuffle_options: Literal["auto", "on", "off"] = setting(
        "auto", "order of options in benchmarks (auto: shuffled where the released order gives the answer away)"
    )
    judge: bool = setting(False, "score the replies to benchmarks by the model of the section judge too")

    @property
    def most_tasks(self) -> int:
        """Held-out tasks that a training run needs; 0: no test split is read."""
        return max(self.tasks, self.during if self.every else 0)


@dataclass(frozen=True)
class MeshConfig:
    """Mesh axes; -1 fills an axis with the devices that are left."""

    data: int = setting(1, "groups are split over it; parameters are repeated")
    fsdp: int = setting(1, "groups are split over it, and parameters")
    tensor: int = setting(1, "heads and hidden units are split over it")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one job; TPU VMs, Slurm and Open MPI need none of this."""

    coordinator: str = setting("", "host:port of process 0 ('': one process, or the cluster's)")
    num_processes: int = setting(0, "processes of the job (0: one, or as the cluster says)", least=0)
    process_id: int = setting(-1, "which of them this is, from 0 (-1: as the cluster says)")
    timeout_s: int = setting(300, "seconds to wait at the start for processes that are late", least=1)
    heartbeat_s: int = setting(30, "seconds without a sign of a process after which JAX ends the others", least=10)
