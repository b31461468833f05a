"""Settings of a run, a section for each part, and how they are read, checked and documented."""

from imagent_jax.config.loading import (
    SETTINGS,
    Config,
    load_config,
    parse_args,
    read_args,
    reference,
)
from imagent_jax.config.naming import import_path
from imagent_jax.config.settings import (
    DataConfig,
    DistributedConfig,
    EvalConfig,
    GRPOConfig,
    ImagesConfig,
    LoraConfig,
    MaskConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
    ToolsConfig,
)

__all__ = [
    "SETTINGS",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "GRPOConfig",
    "ImagesConfig",
    "LoraConfig",
    "MaskConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SandboxConfig",
    "ToolsConfig",
    "import_path",
    "load_config",
    "parse_args",
    "read_args",
    "reference",
]
