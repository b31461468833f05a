"""The policy of a configuration: model, parameters, processor, tools and rollout engine."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from imagent_jax.chat.prompts import read_prompt
from imagent_jax.config import Config
from imagent_jax.data.check import Progress, Tasks
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.distributed import processes
from imagent_jax.distributed.mesh import make_mesh
from imagent_jax.model import checkpoint, lora
from imagent_jax.model.attention import choose_attention, choose_dtype
from imagent_jax.model.config import VisionConfig
from imagent_jax.model.families import read_folder
from imagent_jax.model.processor import Processor
from imagent_jax.model.sharding import shardings
from imagent_jax.rollout.collect import Collector
from imagent_jax.tools import ToolSet, tools_by_name
from imagent_jax.tools.mcp_servers import mcp_tools
from imagent_jax.types import Task


def model_settings(cfg: Config, platform: str | None = None) -> dict[str, Any]:
    """Return the fields of `Model` for a configuration.

    Args:
        platform: default: that of the attached devices.
    """
    dtype = choose_dtype(cfg.model.dtype, platform)
    return {
        "dtype": dtype,
        "remat": cfg.model.remat,
        "vision_block": cfg.images.vision_block,
        "logprob_chunk": cfg.model.logprob_chunk,
        "attention": choose_attention(cfg.model.attention, dtype, platform),
    }


def check_images(cfg: Config, vision: VisionConfig) -> None:
    """Check the sizes of images and of a vision block against the model's patches.

    Raises:
        ValueError: a block is no multiple of a merge unit, or does not hold the largest image (one sentence with the remedy).
    """
    block, unit, area = cfg.images.vision_block, vision.merge_unit, vision.patch_size**2
    if block % unit:
        raise ValueError(f"images.vision_block is {block}; it must be a multiple of {unit}, the patches of one token.")
    for name in ("images.max_pixels", "tools.high_pixels", "tools.confirm_max_pixels"):
        if (patches := cfg.get(name) // area) > block:
            raise ValueError(
                f"{name} {cfg.get(name)} allows {patches} patches but images.vision_block holds {block}; raise "
                f"images.vision_block or lower {name}."
            )


def tools_of(cfg: Config) -> ToolSet:
    """Return the tools of a configuration: those of `tools.names`, then those of its MCP servers.

    Raises:
        ValueError: see `tools_by_name` and `mcp_tools`.
    """
    named = tools_by_name(cfg.tools.names, cfg.sandbox, cfg.search, read_prompt(cfg.tools.prompt))
    return ToolSet([*named, *mcp_tools(cfg.tools.mcp, cfg.tools.mcp_chars, cfg.tools.timeout_s)], cfg.tools.settings)


def check_tool_settings(cfg: Config, collector: Collector) -> None:
    """Check that `tools.settings` names tools of the run, of its environment, or of that of a source.

    Raises:
        ValueError: it names another.
    """
    worlds = {source.environment for source in cfg.data.mixture.values()} - {""}
    known = [*collector.names, *(name for path in sorted(worlds) for name in collector.offered(path=path).names)]
    for name in cfg.tools.settings:
        if name not in known:
            raise ValueError(f"tools.settings names {name!r}, which is no tool of the run; there are {', '.join(known)}.")


class Policy:
    """Model, processor, tools and rollout engine of a configuration, shared by training and evaluation.

    Raises:
        ValueError: invalid settings, files or data; the message is one sentence with a remedy.
    """

    def __init__(self, cfg: Config, stop: threading.Event | None = None):
        self.cfg = cfg
        self.tools = tools_of(cfg)
        for name, source in cfg.data.mixture.items():
            try:
                self.tools.subset(source.tools)
            except ValueError as error:
                raise ValueError(f"data.mixture.{name}.tools: {error}; name some of tools.names, or add it there.") from None
        folder = checkpoint.resolve(cfg.model.path)
        self.folder, self.processor = folder, Processor.from_pretrained(folder)
        found = read_folder(folder)
        check_images(cfg, found.vision)
        self.mesh = make_mesh(**vars(cfg.mesh))
        self.model, self.params = checkpoint.load(
            folder,
            mesh=self.mesh,
            param_dtype=cfg.model.param_dtype,
            unsampled=self.processor.unsampled_ids(found.text.vocab_size),
            **model_settings(cfg),
        )
        if cfg.lora.path:
            self.model, self.params = lora.load(cfg.lora.path, self.model, self.params)
        elif cfg.lora.rank:
            self.model, self.params = lora.attach(self.model, self.params, cfg.lora, cfg.run.seed)
        if cfg.rollout.overlap and lora.adapts_vision(self.params):
            raise ValueError("rollout.overlap is for a tower that stays as it is, but its adapters are trained; unset it.")
        self.replace_params(self.params)  # adapters are sharded like their matrices
        self.collector = Collector(self.model, self.processor, self.tools, cfg, stop=stop)
        check_tool_settings(cfg, self.collector)

    def replace_params(self, params: nnx.State) -> None:
        """Use other parameters of the same model, placed on the policy's mesh."""
        self.params = jax.device_put(params, shardings(params, self.mesh))

    def open_tasks(self, split: str, progress: Progress = lambda sentence: None) -> Tasks:
        """Return the tasks of a split, each tried against the settings of this policy; see `data.pipeline.open_tasks`."""
        return open_tasks(self.cfg.data, split, self.collector.check, progress)

    def test_tasks(self, count: int) -> list[Task]:
        """Return the first `count` held-out tasks."""
        return list(self.open_tasks("test")[:count])


def training_mesh(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `cfg.mesh`. Rollouts and micro-batches are split by groups over its data and fsdp axes.

    Args:
        devices: default: all of `jax.devices()`.
    Raises:
        ValueError: the axis sizes do not divide the devices or do not suit the processes, or `rollout.overlap` is set with
            several devices.
    """
    mesh = make_mesh(**vars(cfg.mesh), devices=devices)
    processes.check_mesh(mesh)
    if cfg.rollout.overlap and mesh.size > 1:
        raise ValueError("rollout.overlap is for one device: two programs at a time wait for each other on several.")
    return mesh
