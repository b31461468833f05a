"""A run of the main job, and what it asked of its parts."""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import jax
import pytest

from imagent_jax import train as job
from imagent_jax.config import Config, read_args
from imagent_jax.rl import guards
from imagent_jax.rollout.collect import Collector

SMALL = [
    "--run.compile_cache=", "--run.steps=4", "--run.checkpoint_every=1", "--run.keep_checkpoints=1", "--run.seed=5",
    "--run.log_trajectories=12", "--rollout.groups=3", "--rollout.group_size=4", "--rollout.response_tokens=96",
    "--rollout.temperature=0.9", "--images.pack_blocks=1", "--images.pages=2", "--grpo.micro_groups=1", "--grpo.minibatches=3",
    "--grpo.epochs=2", "--grpo.length_buckets=1", "--grpo.kl=0.01", "--grpo.normalise_std=false", "--reward.answer=2",
    "--reward.format=0.3", "--reward.tool_gain=0.5", "--mask.drop_void=true", "--mask.count_truncated=false", "--eval.every=2",
    "--eval.tasks=6", "--eval.during=3", "--eval.groups=2", "--eval.greedy=true", "--eval.seed=77", "--data.seed=3",
    "--data.train_size=64", "--data.test_size=32",
]  # fmt: skip
PAID = "Too much was paid."


class Watched:
    """A run of the job, and what it asked of its parts, which are the real ones.

    Attributes:
        code, out: exit code, and what was printed.
        rollouts, updates, saves, optimizers, judged, traced: calls in order, see `_note`.
    """

    def __init__(self, folder: Path, data: Path, name: str, *flags: str, when=lambda record: False, strike: int = 0):
        """`strike`: a signal sent to the job as it logs the first record of which `when` holds (None: as it starts)."""
        self.path, self.argv = (
            folder / name,
            [*SMALL, f"--run.dir={folder}", f"--run.name={name}", f"--data.cache_dir={data}", *flags],
        )
        self.rollouts, self.updates, self.saves, self.optimizers, self.judged, self.traced = [], [], [], [], [], []
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setenv("COLUMNS", "300")
            patch.setitem(guards.GUARDS, "bonus_unearned", lambda history: PAID if len(history) > 1 else None)
            self._spy(patch, Collector, "collect", self.rollouts, lambda engine, params, tasks, **how: how | {
                "tasks": [task.uid for task in tasks]})  # fmt: skip
            self._spy(patch, job.Learner, "update", self.updates, lambda learner, params, state, batch, store: {
                "batch": batch, "encoded": store.encoded, "shown": store.shown,
                "filled": store.patches / store.packed})  # fmt: skip
            self._spy(patch, job.RunFolder, "save", self.saves, lambda folder, step, params, state, progress, accuracy=None: {
                "step": step, "progress": json.loads(json.dumps(progress)), "accuracy": accuracy})  # fmt: skip
            self._spy(patch, job, "make_optimizer", self.optimizers, lambda cfg, updates: {"cfg": cfg, "updates": updates})
            self._spy(patch, job, "judge", self.judged, lambda cfg, rollout, functions: {})
            self._spy(patch, jax.profiler, "start_trace", self.traced, lambda *_, **__: {"updates": len(self.updates)})
            if strike:
                log = job.RunFolder.log

                def struck(run, record):
                    log(run, record)
                    if when(record):
                        os.kill(os.getpid(), strike)

                patch.setattr(job.RunFolder, "log", struck)
            self.code = job.main(self.argv)
        self.out = out.getvalue()

    @staticmethod
    def _spy(patch, owner, name, notes, note):
        real = getattr(owner, name)

        def called(*args, **how):
            began = time.perf_counter()
            result = real(*args, **how)
            notes.append(note(*args, **how) | {"seconds": time.perf_counter() - began, "result": result})
            return result

        patch.setattr(owner, name, called)

    @property
    def cfg(self) -> Config:
        return read_args(self.argv)

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict]:
        return [record for record in self.records if "reward/total" in record]

    @property
    def evaluations(self) -> list[dict]:
        """Rollouts of held-out tasks."""
        return [roll for roll in self.rollouts if roll["group_size"] == 1]

    @property
    def training(self) -> list[dict]:
        return [roll for roll in self.rollouts if roll["group_size"] != 1]

    @property
    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.path / "checkpoints").iterdir()}

    def logged(self, stem: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / "trajectories" / f"{stem}.jsonl").read_text().splitlines()]
