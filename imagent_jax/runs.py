"""A run on disk: resolved config, one metrics object a step, trajectories and checkpoints."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from imagent_jax.config import Config


class RunFolder:
    """`runs/<name>/`. Everything appended is flushed at once; nothing written is lost by a later failure.

    Raises:
        ValueError: the folder already holds a run and `run.resume` is off, or holds none and it is on.
    """

    def __init__(self, cfg: Config):
        self.path = Path(cfg.run.dir) / cfg.run.name
        self.checkpoints = (self.path / "checkpoints").absolute()
        exists = (self.path / "metrics.jsonl").exists()
        if exists and not cfg.run.resume:
            self._set_aside()
        if cfg.run.resume and not self.checkpoints.is_dir():
            raise ValueError(f"run.resume is on, but {self.path} holds no checkpoints; check run.dir and run.name.")
        for part in ("trajectories", "checkpoints"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(cfg.to_yaml())
        self.manager = ocp.training.Checkpointer(
            self.checkpoints,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(cfg.run.keep_checkpoints),
            cleanup_tmp_directories=True,
        )

    def _set_aside(self) -> None:
        """An earlier run of the same name is kept, under a number."""
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, kept)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one object to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def log_faults(self, faults: Sequence[Any]) -> None:
        """Lists the rows of data that were left out, one a line, in data_faults.txt (no file: none)."""
        if faults:
            (self.path / "data_faults.txt").write_text("".join(f"{fault}\n" for fault in faults))

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops metrics of steps after `step` (a resumed run writes them anew); returns the training steps it keeps."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
        return [record for record in map(json.loads, kept) if "reward/total" in record]

    def log_trajectories(self, step: int, records: list[dict[str, Any]], name: str = "train") -> None:
        """Writes the trajectories of a step, one JSON object a line."""
        with open(self.path / "trajectories" / f"{name}-{step:06d}.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def save(self, step: int, params, opt_state, progress: dict[str, Any]) -> None:
        """A checkpoint of the trained parameters, optimizer and progress (JSON: step, data iterator, earlier evaluations)."""
        if self.manager.latest is not None and self.manager.latest.step == step:
            return
        self.manager.save_pytree(step, {"params": params, "opt_state": opt_state}, custom_metadata=progress)

    def restore(self, params, opt_state):
        """The newest checkpoint, with the structure and placement of the arguments.

        Raises:
            ValueError: there is none, or it is of another model.
        """
        latest = self.manager.latest
        if latest is None:
            raise ValueError(f"{self.checkpoints} holds no finished checkpoint; start without run.resume.")
        like = jax.tree.map(lambda x: x, {"params": params, "opt_state": opt_state})
        try:
            tree = self.manager.load_pytree(latest.step, like)
        except Exception as error:
            raise ValueError(f"Checkpoint {latest.step} in {self.checkpoints} does not fit this config: {error}") from error
        progress = self.manager.metadata(latest.step).custom_metadata
        return tree["params"], tree["opt_state"], progress

    def close(self) -> None:
        self.manager.close()


def load_params(run: Path, like, step: int | None = None):
    """The trained parameters of a run's checkpoint, and its step; the optimizer's state stays on disk.

    Args:
        like: parameters of the same structure; those restored come to the default device.
        step: default the newest.
    Raises:
        ValueError: there is no such checkpoint (those there are named), or it is of another model.
    """
    folder = (run / "checkpoints").absolute()
    context = ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True)))
    if not folder.is_dir():
        raise ValueError(f"{run} holds no checkpoints; name the folder of a run, such as runs/tiny.")
    with context, ocp.training.Checkpointer(folder) as manager:
        steps = [checkpoint.step for checkpoint in manager.checkpoints]
        if not steps or step not in (None, *steps):
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise ValueError(f"{folder} holds no finished checkpoint{'' if step is None else f' {step}'}; {there}.")
        step = steps[-1] if step is None else step
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), {"params": like})
        saved = jax.tree.structure(manager.metadata(step).metadata["params"]).num_leaves
        if saved != (wanted := jax.tree.structure(like).num_leaves):
            raise ValueError(f"Checkpoint {step} in {folder} holds {saved} parameters, the model of its config has {wanted}.")
        try:
            return manager.load_pytree(step, shapes)["params"], step
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"Checkpoint {step} in {folder} does not fit the model of its config: {reason}") from error
