"""Run folder: resolved config, metrics (one JSON object per step), trajectories and checkpoints."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from imagent_jax.config import Config, RunConfig
from imagent_jax.distributed import processes
from imagent_jax.runs.lock import Lock
from imagent_jax.runs.trackers import Trackers


def checkpoint_folder(run: RunConfig, folder: Path) -> str:
    """Return the folder of a run's checkpoints, given the run's folder. Addresses such as gs://bucket/path are unchanged."""
    if "://" in run.checkpoint_dir:
        return f"{run.checkpoint_dir.rstrip('/')}/{run.name}"
    place = Path(run.checkpoint_dir).expanduser() / run.name if run.checkpoint_dir else folder / "checkpoints"
    return str(place.absolute())


@jax.jit
def _checksums(tree: Any) -> list[jax.Array]:
    def one(x):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def checksums(tree: Any) -> list[int]:
    """Return a checksum of each array (uint32 sum of its words), independent of sharding.

    TensorStore does not detect a changed byte in an array.
    """
    return [int(total) for total in jax.device_get(_checksums(tree))]


class RunFolder:
    """The folder `runs/<name>/`. Appended lines are flushed at once, so that a later failure loses nothing.

    With several processes, all take part in checkpoints, and process 0 writes everything else. A checkpoint is one Orbax
    checkpoint, written in the background and renamed when complete. It holds the trained parameters, the optimizer state, the
    run's progress, and checksums of all. The newest `run.keep_checkpoints` and the `run.keep_best` with the highest held-out
    accuracy are kept. A folder has one writer (`Lock`), from construction to `close`.

    As a context manager, it is closed at the end of the block. After an error, the checkpoint being written is completed too.

    Raises:
        ValueError: `run.resume` is set and the run does not exist, `run.resume` is not set and checkpoints exist, or another
            process writes into the folder.
    """

    def __init__(self, cfg: Config):
        self.path = Path(cfg.run.dir) / cfg.run.name
        self.checkpoints, self.seed = checkpoint_folder(cfg.run, self.path), cfg.run.seed
        self.writing = None  # the checkpoint being written: its step and its future
        if processes.is_writer():
            self._prepare(cfg)
        processes.barrier("the run's folder is there")
        try:
            self._open(cfg)
        except BaseException:
            self._release()
            raise

    def _open(self, cfg: Config) -> None:
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(cfg.run.keep_checkpoints)]
        if cfg.run.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda found: found["accuracy"],
                    n=cfg.run.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        try:
            self.manager = ocp.training.Checkpointer(
                self.checkpoints,
                # Orbax declares the metrics that a policy sees and those that it gives it differently
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # ty: ignore[invalid-argument-type]
                preservation_policy=policies.AnyPreservationPolicy(kept),  # ty: ignore[invalid-argument-type]
                cleanup_tmp_directories=True,
            )
            self.latest = self.manager.latest and self.manager.latest.step
        except Exception as error:
            sentence = f"The checkpoints in {self.checkpoints} cannot be read ({_reason(error)}); delete what is damaged there."
            raise ValueError(sentence) from error
        if self.latest is not None and not cfg.run.resume:
            raise ValueError(
                f"{self.checkpoints} holds checkpoints of an earlier run; continue it with --run.resume true, or "
                "choose another run.name."
            )
        if processes.is_writer():
            if self.latest is None and (metrics := self.path / "metrics.jsonl").exists():
                metrics.replace(f"{metrics}.before")  # from a run that was killed before its first checkpoint
            (self.path / "config.yaml").write_text(cfg.to_yaml())
            self.trackers = Trackers(cfg, self.path)

    def _prepare(self, cfg: Config) -> None:
        there = (self.path / "config.yaml").exists() or "://" in self.checkpoints or Path(self.checkpoints).is_dir()
        if cfg.run.resume and not there:
            raise ValueError(f"run.resume is on, but {self.path} holds no checkpoints; check run.dir and run.name.")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.path)
        if not cfg.run.resume and (self.path / "metrics.jsonl").exists():
            self._set_aside()
        (self.path / "trajectories").mkdir(exist_ok=True)

    def _set_aside(self) -> None:
        """Rename the folder of an earlier run of the same name, appending a number, and lock a new one."""
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, kept)
        self.path.mkdir(exist_ok=True)  # where another start was faster, its lock says so
        before, self.lock = self.lock, Lock(self.path)
        before.release()

    def log(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and pass it to the trackers (`Trackers`)."""
        if not processes.is_writer():
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        self.trackers.log(record)

    def log_faults(self, faults: Sequence[Any]) -> None:
        """Write the omitted data rows, one per line, to data_faults.txt (no file if there are none)."""
        if faults and processes.is_writer():
            (self.path / "data_faults.txt").write_text("".join(f"{fault}\n" for fault in faults))

    def history(self) -> list[dict[str, Any]]:
        """Return the metrics of the training steps logged so far."""
        path = self.path / "metrics.jsonl"
        records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return [record for record in records if "reward/total" in record]

    def log_trajectories(self, step: int, records: list[dict[str, Any]], name: str = "train") -> None:
        """Write the trajectories of a step, one JSON object per line."""
        with open(self.path / "trajectories" / f"{name}-{step:06d}.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, step: int, params, opt_state, progress: dict[str, Any], accuracy: float | None = None) -> None:
        """Start writing a checkpoint; return as soon as the arrays may be modified. Waits for an earlier checkpoint first.

        Args:
            progress: JSON-serialisable; `restore` returns it.
            accuracy: held-out accuracy of these parameters, if measured.
        Raises:
            ValueError: an earlier checkpoint could not be written, or this one could not be started.
        """
        self.settle()
        if step == self.latest:
            return
        metrics = self.path / "metrics.jsonl"
        tree = {"params": params, "opt_state": opt_state}
        progress = progress | {
            "seed": self.seed,
            "logged": metrics.stat().st_size if metrics.exists() else 0,
            "sums": {name: checksums(part) for name, part in tree.items()},
        }
        try:
            self.writing = (
                step,
                self.manager.save_async(
                    step,
                    tree,
                    custom_metadata=progress | {"crc": _crc(progress)},
                    metrics=None if accuracy is None else {"accuracy": accuracy},
                ),
            )
        except Exception as error:
            raise self._unwritten(step, error) from error

    def settle(self) -> None:
        """Wait until the checkpoint being written is complete.

        Raises:
            ValueError: it could not be written; earlier checkpoints are unchanged.
        """
        if self.writing is None:
            return
        (step, response), self.writing = self.writing, None
        try:
            response.result()  # ty: ignore[missing-union-attribute] - None, where Orbax refused the step, is an error too
        except Exception as error:
            raise self._unwritten(step, error) from error
        self.latest = step

    def _unwritten(self, step: int, error: Exception) -> ValueError:
        before = (
            "there is none before it"
            if self.latest is None
            else (f"checkpoint {self.latest} is whole: make room, then continue from it with --run.resume true")
        )
        return ValueError(f"Checkpoint {step} could not be written to {self.checkpoints} ({_reason(error)}); {before}.")

    def restore(self, params, opt_state) -> tuple[Any, Any, dict[str, Any]] | None:
        """Return parameters, optimizer state and progress of the newest checkpoint; None if there is none.

        Arrays take the structure and sharding of the arguments. metrics.jsonl is truncated to its length at the checkpoint.

        Raises:
            ValueError: the checkpoint is damaged, or of another model or seed. No checkpoint is changed.
        """
        self.settle()
        if self.latest is None:
            return None
        tree, progress = _load(self.manager, self.latest, {"params": params, "opt_state": opt_state})
        if progress["seed"] != self.seed:
            raise ValueError(f"run.seed is {self.seed}, but the run to resume has {progress['seed']}; set the same.")
        path = self.path / "metrics.jsonl"
        if path.exists() and processes.is_writer():
            os.truncate(path, min(path.stat().st_size, progress["logged"]))
        return tree["params"], tree["opt_state"], progress

    def close(self) -> None:
        """Wait for the checkpoint being written (see `settle`), close the trackers and release the folder."""
        self.settle()
        self.manager.close()
        if processes.is_writer():
            self.trackers.close()
        self._release()

    def _release(self) -> None:
        if processes.is_writer():
            self.lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return self.close()
        if isinstance(error, KeyboardInterrupt):  # at once
            return
        try:  # the manager stays open: closing it waits for other processes, which do not know of the error
            self.settle()
        except ValueError as unwritten:
            error.add_note(str(unwritten))
        self._release()


def _crc(progress: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(progress, sort_keys=True).encode())


def _reason(error: Exception) -> str:
    """Return an exception's message on one line, for use in a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _load(manager: ocp.training.Checkpointer, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parts of checkpoint `step` that `like` names, and the progress saved with them.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    whole = [c.step for c in manager.checkpoints if c.step != step]
    remedy = f"delete {manager.directory / str(step)} to use checkpoint {max(whole)}" if whole else "there is no other"
    damaged = f"Checkpoint {step} in {manager.directory} is damaged ({{}}); {remedy}."
    try:
        metadata = manager.metadata(step)
        saved, written = metadata.metadata, metadata.custom_metadata
        progress: dict[str, Any] = dict(written) if isinstance(written, dict) else {}
        counts = {name: (_shapes(saved[name]), _shapes(part)) for name, part in like.items()}
    except Exception as error:
        raise ValueError(damaged.format(_reason(error))) from error
    if progress.pop("crc", None) != _crc(progress):
        raise ValueError(damaged.format("its progress is not what was saved"))
    for name, (there, here) in counts.items():
        if there != here:
            raise ValueError(
                f"Checkpoint {step} in {manager.directory} does not fit the model of its config: of {name} it has "
                f"{[*(there - here).elements()][:3]} where {[*(here - there).elements()][:3]} are wanted."
            )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        tree = manager.load(step, shapes)
    except Exception as error:
        raise ValueError(damaged.format(_reason(error))) from error
    for name in like:
        if wrong := sum(a != b for a, b in zip(checksums(tree[name]), progress["sums"][name], strict=True)):
            raise ValueError(damaged.format(f"{wrong} arrays of {name} are not what was saved"))
    return tree, progress


def _shapes(tree: Any) -> Counter:
    return Counter(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def load_params(checkpoints: str, like, step: int | None = None):
    """Return the trained parameters of a run's checkpoint, and its step. The optimizer state is not read.

    Args:
        checkpoints: see `checkpoint_folder`.
        like: parameters of the same structure; the restored ones are placed on the default device.
        step: default: the newest.
    Raises:
        ValueError: no such checkpoint (the message lists those that exist), or it is damaged or of another model.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if "://" not in checkpoints and not Path(checkpoints).is_dir():
        raise ValueError(f"There are no checkpoints in {checkpoints}; name the folder of a run, such as runs/tiny.")
    with context, ocp.training.Checkpointer(checkpoints) as manager:
        steps = [checkpoint.step for checkpoint in manager.checkpoints]
        if not steps or step not in (None, *steps):
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            asked = "" if step is None else f" {step}"
            raise ValueError(f"{checkpoints} holds no finished checkpoint{asked}; {there}.")
        step = steps[-1] if step is None else step
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
        return _load(manager, step, {"params": shapes})[0]["params"], step
