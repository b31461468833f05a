"""The main job: train a multi-image agent by reinforcement learning from outcomes alone.

`python -m imagent_jax.train [--config FILE.yaml] [--section.key VALUE ...]`; with no arguments, the embedded tiny world.

Exit codes: 0 done, or stopped by Ctrl-C; 2 after one sentence about what is wrong;
75 (`RESTART`) stopped by SIGTERM, as machines that are taken away send it: start it again with `--run.resume true`; 134 (SIGABRT)
ended by JAX because another process of the job died: start all again.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.markup import escape

from imagent_jax.config import Config, parse_args
from imagent_jax.data.check import left_out
from imagent_jax.data.curriculum import PassRates
from imagent_jax.data.pipeline import check_source, task_iterator
from imagent_jax.distributed import processes
from imagent_jax.distributed.processes import FAILED, RESTART
from imagent_jax.evals.evaluate import HeldOut, comparison
from imagent_jax.evals.run import labels, open_benchmarks
from imagent_jax.model import checkpoint, lora
from imagent_jax.model.sharding import gather_params
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.guards import watch
from imagent_jax.rl.judge import grade, judge
from imagent_jax.rl.learner import Learner
from imagent_jax.rl.mask import dropped_shares, mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.collect import Stopped
from imagent_jax.rollout.metrics import rollout_metrics
from imagent_jax.rollout.policy import Policy, training_mesh
from imagent_jax.rollout.prefetch import Prefetcher
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.interrupt import Interrupt
from imagent_jax.runs.report import print_step, progress_on, write_report
from imagent_jax.runs.resources import CompileCounter, memory, use_compile_cache
from imagent_jax.runs.trajectory_log import TrajectoryLog


@dataclass
class TrainState:
    """What changes while a run trains.

    Attributes:
        step: updates done.
        evaluations: metrics of the held-out evaluations before and after training, by name.
        unlogged: metrics of the last step, until its evaluation is done.
    """

    params: nnx.State
    opt_state: Any
    step: int = 0
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    unlogged: dict[str, Any] | None = None


class Run:
    """The parts of a training run.

    Raises:
        ValueError: see `Policy`, `data.pipeline.open_tasks`, `reward_functions`.
    """

    def __init__(self, cfg: Config, folder: RunFolder, console: Console, interrupt: Interrupt):
        self.cfg, self.folder, self.console, self.interrupt, self.began = cfg, folder, console, interrupt, time.perf_counter()
        self.evaluates = cfg.eval.most_tasks > 0
        use_compile_cache(cfg.run.compile_cache)
        console.print(
            f"[bold]imagent-jax[/]: {cfg.run.steps} steps of {cfg.rollout.groups} tasks x {cfg.rollout.group_size} rollouts of "
            f"{cfg.model.path} on {cfg.data.title}, {jax.sharding.get_mesh().size} {jax.devices()[0].platform} device(s)."
        )
        if cfg.run.profile:
            console.print(f"Step {cfg.run.profile} is traced into {folder.path}/profile, for Perfetto and XProf.")
        files = "config.yaml, metrics.jsonl, trajectories/, checkpoints/"
        console.print(f"Writes to {folder.path}: {files}. Ctrl-C saves and stops.")
        with console.status("Loading the model and the tasks (the tiny world is generated once, about ten seconds)") as status:
            check_source(cfg.data)
            labels(cfg.eval.benchmarks)
            # bad settings are refused before any compute is spent
            self.rewards = reward_functions(cfg.reward, cfg.judge, cfg.used_rewards)
            self.policy = policy = Policy(cfg, interrupt.stop)
            progress = progress_on(console, status)
            splits = [policy.open_tasks(split, progress) for split in ("train", "test")[: 1 + self.evaluates]]
            benchmarks = open_benchmarks(cfg.eval.benchmarks if self.evaluates else (), cfg, policy.collector, console, progress)
        folder.log_faults([fault for tasks in splits for fault in tasks.faults])
        for tasks in splits:
            if sentence := left_out(tasks):
                console.print(f"[yellow]{escape(sentence)}[/] All are listed in {folder.path}/data_faults.txt.")
        tasks, held_out = splits[0], list(splits[-1][: cfg.eval.most_tasks])
        self.log = TrajectoryLog(folder, policy.processor, cfg)
        self.held_out = HeldOut(policy.collector, held_out, cfg, self.log, console, benchmarks)
        optimizer = make_optimizer(cfg.optim, cfg.run.steps * cfg.grpo.epochs * cfg.grpo.minibatches)
        reference = policy.params if cfg.grpo.kl > 0 else None
        self.learner = Learner(policy.model, cfg, optimizer, mask_tables(cfg.mask), reference)
        rates = PassRates(cfg.rollout.group_size, cfg.data.curriculum_floor) if cfg.data.curriculum == "pass_rate" else None
        self.iterator = task_iterator(tasks, cfg.rollout.groups, seed=cfg.data.seed + cfg.run.seed, rates=rates)
        grading = partial(grade, cfg, self.rewards)
        self.prefetcher = Prefetcher(policy.collector, self.iterator, cfg.rollout, cfg.run.seed, grading)
        self.history: list[dict[str, Any]] = []
        self.failed: set[str] = set()

    # ---- the beginning --------------------------------------------------------------------------------------------------

    def start(self) -> TrainState:
        """Return the state of the newest checkpoint or a new one, after evaluating the base where that was not done."""
        state = self._restore()
        self.history = self.folder.history()
        if self.cfg.eval.tasks and "base" not in state.evaluations:
            state.evaluations["base"] = base = self.held_out(state.params, self.cfg.eval.tasks, 0, "base")
            self.folder.log({"step": 0, "time/evaluation": base["time/evaluation"]} | _prefixed("base", base))
            if self.cfg.run.checkpoint_every:
                self.save(state)
        self.finish_step(state)
        return state

    def _restore(self) -> TrainState:
        params = self.policy.params
        trained, frozen = self.learner.split(params)
        restored = self.folder.restore(trained, opt_state := self.learner.init(params))
        if restored is None:
            return TrainState(params, opt_state)
        trained, opt_state, progress = restored
        self.iterator.set_state(progress["iterator"])
        self.console.print(f"Resumed after step {progress['step']}.")
        kept = {name: progress[name] for name in ("step", "evaluations", "unlogged")}
        return TrainState(nnx.merge_state(trained, frozen), opt_state, **kept)

    # ---- in every step --------------------------------------------------------------------------------------------------

    def asked(self) -> int:
        """Return the signal that any process got; all stop after the same step."""
        self.interrupt.asked = max(processes.gather(self.interrupt.asked))
        return self.interrupt.asked

    @contextlib.contextmanager
    def traced(self, step: int) -> Generator[None, None, None]:
        """Trace a step where the settings say so."""
        if step != self.cfg.run.profile:
            yield
            return
        jax.profiler.start_trace(self.folder.path / "profile", create_perfetto_trace=True)
        try:
            yield
        finally:
            jax.profiler.stop_trace()

    def prefetch(self, state: TrainState) -> None:
        """Begin the step after the one that is about to be trained. Weights that a checkpoint will hold are not overtaken."""
        following, every = state.step + 1, self.cfg.run.checkpoint_every
        if following < self.cfg.run.steps:
            saved = every and following % every == 0
            self.prefetcher.begin(following, state.params if self.cfg.rollout.overlap and not saved else None)

    def tell_faults(self, faults: dict[str, str]) -> None:
        """Print one error of every reward and tool that fails for the first time."""
        for name in faults.keys() - self.failed:
            self.console.print(f"[yellow]warning[/] ({name}) {escape(faults[name])}; its rollouts do not train.", soft_wrap=True)
        self.failed |= faults.keys()

    def finish_step(self, state: TrainState) -> None:
        """Evaluate where that is due, note what the guards warn of, and log the step, unless that was done.

        Raises:
            Stopped: by SIGTERM in the evaluation. The step stays unlogged until the run is resumed.
        """
        if (metrics := state.unlogged) is None:
            return
        cfg, step = self.cfg, state.step
        if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.run.steps:
            metrics = metrics | _prefixed("eval", self.held_out(state.params, cfg.eval.during, step, f"step {step}"))
        before = self.history[-1].get("warnings", {}) if self.history else {}
        self.history.append(metrics)
        if warnings := watch(self.history):
            metrics["warnings"] = warnings
        self.folder.log({"step": step} | metrics)
        state.unlogged = None
        print_step(self.console, metrics, step, cfg.run.steps, before)

    def save_if_due(self, state: TrainState) -> None:
        """Save a checkpoint every `run.checkpoint_every` steps."""
        if self.cfg.run.checkpoint_every and state.step % self.cfg.run.checkpoint_every == 0:
            self.save(state, self.history[-1].get("eval/accuracy"))

    def save(self, state: TrainState, accuracy: float | None = None) -> None:
        """Begin a checkpoint; see `RunFolder.save`."""
        progress = {
            "step": state.step,
            "iterator": self.prefetcher.place,
            "evaluations": state.evaluations,
            "unlogged": state.unlogged,
        }
        self.folder.save(state.step, self.learner.split(state.params)[0], state.opt_state, progress, accuracy)

    # ---- the end --------------------------------------------------------------------------------------------------------

    def end(self, state: TrainState) -> dict[str, float]:
        """Save, evaluate and export the model. Returns the last evaluation ({}: the run was stopped, or evaluates nothing)."""
        self.save(state)
        self.folder.settle()
        if self.asked():
            self.prefetcher.close()
            self._report()
            self.console.print(f"Stopped after step {state.step}; continue with --run.resume true.")
            return {}
        if self.cfg.eval.tasks:
            state.evaluations["trained"] = self.held_out(state.params, self.cfg.eval.tasks, state.step, "trained")
        trained = state.evaluations.get("trained", {})
        self.folder.log({"step": state.step, "time/total": time.perf_counter() - self.began} | _prefixed("final", trained))
        self._export(state)
        self._report()
        if trained:
            self.console.print(comparison(state.evaluations, f"{self.cfg.run.name}: {state.step} steps"))
        path = self.folder.path
        self.console.print(f"{time.perf_counter() - self.began:.0f} s in all. Model, metrics and checkpoints: {path}")
        self.console.print(f"Report: {path}/report.html. Look at trajectories: python -m imagent_jax.view {path}")
        return trained

    def _export(self, state: TrainState) -> None:
        """Write the trained model in Hugging Face's form, and its adapters in PEFT's."""
        params, policy, path = state.params, self.policy, self.folder.path
        if jax.process_count() > 1:
            params = processes.own_copy(gather_params(params))
        if processes.is_writer():
            with processes.alone():
                checkpoint.save(path / "model", *lora.merge(policy.model, params), source=policy.folder)
                if self.cfg.lora.on:
                    lora.save(path / "adapter", policy.model, params, base=self.cfg.model.path)

    def _report(self) -> None:
        if processes.is_writer():
            write_report(self.folder.path)


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def train(cfg: Config, console: Console, interrupt: Interrupt) -> dict[str, float]:
    """Run the whole job on the current mesh (`jax.set_mesh`).

    Returns:
        The last evaluation ({}: the run was stopped before, or `eval.tasks` is 0).
    Raises:
        ValueError: bad settings, files or data; see `RunFolder` and `Run`.
        Stopped: by SIGTERM, in an evaluation before or after training, where all that can be saved is.
    """
    with RunFolder(cfg) as folder:
        return _train(Run(cfg, folder, console, interrupt))


def _train(run: Run) -> dict[str, float]:
    cfg, compiles, state = run.cfg, CompileCounter(), run.start()
    while state.step < cfg.run.steps and not run.asked():
        try:
            with run.traced(state.step + 1):
                start, compiled = time.perf_counter(), compiles.count
                rollout, staleness = run.prefetcher.take(state.step, state.params)
                sampled = time.perf_counter()

                judged = judge(cfg, rollout, run.rewards)
                run.tell_faults(judged.faults)
                run.iterator.learn(judged.pass_rates)
                judged.metrics.update(run.iterator.metrics())
                batch = pack_batch(
                    rollout, judged.rewards, judged.advantages, cfg.rollout.prompt_tokens, cfg.rollout.response_tokens
                )
                run.prefetch(state)
                packed = time.perf_counter()

                update = run.learner.update(state.params, state.opt_state, batch, rollout.store)
                state.params, state.opt_state, learned = update
                state.step += 1
                trained = time.perf_counter()

            phases = {} if staleness else rollout.times
            state.unlogged = (
                judged.metrics
                | learned
                | dropped_shares(batch, cfg.mask)
                | memory()
                | rollout_metrics(rollout)
                | {
                    **{f"time/{name}": seconds for name, seconds in phases.items()},
                    "time/wait": sampled - start - sum(phases.values()),  # for another process, or for what was begun ahead
                    "time/judge": packed - sampled,
                    "time/train": trained - packed,
                    "time/step": trained - start,
                    "time/total": trained - run.began,
                    "rollout/staleness": staleness,
                    "compile/count": compiles.count - compiled,
                }
            )
            run.log.write(state.step, rollout.trajectories, judged.parts, judged.advantages)
            run.finish_step(state)
        except Stopped:
            break
        run.save_if_due(state)
    return run.end(state)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit codes are those of the module docstring."""
    cfg, code, failure = parse_args(argv), FAILED, None
    try:
        processes.start(cfg.distributed)
        with Interrupt() as interrupt, jax.set_mesh(training_mesh(cfg)):
            final = train(cfg, Console(quiet=not processes.is_writer()), interrupt)
            code = RESTART if not final and interrupt.asked == signal.SIGTERM else 0
    except Stopped:
        print("Stopped by SIGTERM; start again with --run.resume true.", file=sys.stderr)
        code = RESTART
    except (ValueError, OSError) as error:
        print("error:", *(error, *getattr(error, "__notes__", ())), file=sys.stderr)
        failure = error
    except Exception as error:
        if not processes.several():
            raise
        traceback.print_exc()  # raised, it would wait for the other processes
        failure = error
    except KeyboardInterrupt:  # the second Ctrl-C: at once
        if not processes.several():
            raise
        os._exit(128 + signal.SIGINT)
    if processes.several():
        processes.fail(failure, cfg.distributed) if failure else processes.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
