"""The main job: train a multi-image agent by reinforcement learning from outcomes alone.

`python -m imagent_jax.train [--config FILE.yaml] [--section.key VALUE ...]`; with no arguments, the embedded tiny world.

Exit codes: 0 done, or stopped by Ctrl-C; 2 after one sentence about what is wrong, here or in another process of the job;
75 (`RESTART`) stopped by SIGTERM, as machines that are taken away send it, or because another process died: start it again with
`--run.resume true`.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

import jax
from flax import nnx
from rich.console import Console

from imagent_jax.config import Config, parse_args
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.distributed import processes as hosts
from imagent_jax.distributed.processes import FAILED, RESTART
from imagent_jax.evals.evaluate import comparison, evaluate
from imagent_jax.model import checkpoint, lora
from imagent_jax.model.sharding import gather_params
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.guards import watch
from imagent_jax.rl.judge import judge
from imagent_jax.rl.learner import Learner, Tables
from imagent_jax.rl.mask import dropped_shares, mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.collect import Stopped
from imagent_jax.rollout.policy import Policy, training_mesh
from imagent_jax.rollout.prefetch import Prefetcher
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.interrupt import Interrupt
from imagent_jax.runs.report import write_report
from imagent_jax.runs.resources import CompileCounter, memory, use_compile_cache
from imagent_jax.runs.trajectory_log import TrajectoryLog


def train(cfg: Config, console: Console, interrupt: Interrupt) -> dict[str, float]:
    """Runs the whole job on the current mesh (`jax.set_mesh`); returns the last evaluation ({}: stopped before). See
    the module docstring.

    Raises:
        ValueError: see `Policy`, `RunFolder`.
        Stopped: by SIGTERM, in an evaluation before or after training, where all that can be saved is.
    """
    began, compiles = time.perf_counter(), CompileCounter()
    use_compile_cache(cfg.run.compile_cache)

    # ---- what this run is ---------------------------------------------------------------------------------------
    console.print(
        f"[bold]imagent-jax[/]: {cfg.run.steps} steps of {cfg.rollout.groups} tasks x {cfg.rollout.group_size} rollouts of "
        f"{cfg.model.path} on {cfg.data.name}, {jax.sharding.get_mesh().size} {jax.devices()[0].platform} device(s)."
    )
    folder = RunFolder(cfg)
    if cfg.run.profile:
        console.print(f"Step {cfg.run.profile} is traced into {folder.path}/profile, for Perfetto and XProf.")
    console.print(f"Writes to {folder.path}: config.yaml, metrics.jsonl, trajectories/, checkpoints/. Ctrl-C saves and stops.")
    with console.status("Loading the model and the tasks (the tiny world is generated once, about ten seconds)"):
        reward_functions(cfg.reward)  # a bad path is refused before any compute is spent
        parts = Policy(cfg, interrupt.stop)
        train_tasks, test_tasks = open_tasks(cfg.data, "train"), parts.test_tasks(cfg.eval.tasks)
    folder.log_faults([*train_tasks.faults, *parts.test_faults])
    log = TrajectoryLog(folder, parts.processor, cfg)
    params = parts.params
    optimizer = make_optimizer(cfg.optim, cfg.run.steps * cfg.grpo.epochs * cfg.grpo.minibatches)
    action, trajectory, _ = mask_tables(cfg.mask)
    reference = params if cfg.grpo.kl > 0 else None
    learner = Learner(parts.model, cfg, optimizer, Tables(action, trajectory), reference)
    opt_state = learner.init(params)
    iterator = task_iterator(train_tasks, cfg.rollout.groups, seed=cfg.data.seed + cfg.run.seed)
    step, evaluations, unlogged = 0, {}, None  # unlogged: metrics of the last step, until they are complete
    trained, frozen = learner.split(params)
    if restored := folder.restore(trained, opt_state):
        trained, opt_state, progress = restored
        params = nnx.merge_state(trained, frozen)
        step, evaluations, unlogged = (progress[key] for key in ("step", "evaluations", "unlogged"))
        iterator.set_state(progress["iterator"])
        console.print(f"Resumed after step {step}.")
    ahead, history = Prefetcher(parts.collector, iterator, cfg.rollout, cfg.run.seed), folder.history()

    def held_out(count: int, name: str) -> dict[str, float]:
        start = time.perf_counter()
        with console.status(f"Evaluating on {min(count, len(test_tasks))} held-out tasks"):
            metrics, trajectories = evaluate(
                parts.collector, params, test_tasks[:count], groups=cfg.eval.groups, seed=cfg.eval.seed,
                greedy=cfg.eval.greedy, temperature=cfg.rollout.temperature,
            )  # fmt: skip
        log.write(step, [[t] for t in trajectories], name=name)
        metrics["time/evaluation"] = time.perf_counter() - start
        console.print(
            f"{name}: {100 * metrics['accuracy']:.1f} % of {len(trajectories)} held-out tasks right, "
            f"{metrics['tools/calls']:.2f} calls a task ({metrics['time/evaluation']:.0f} s)"
        )
        return metrics

    def asked() -> int:
        """The signal that any process got; all stop after the same step."""
        interrupt.asked = max(hosts.gather(interrupt.asked))
        return interrupt.asked

    def save(accuracy: float | None = None) -> None:
        progress = {"step": step, "iterator": ahead.place, "evaluations": evaluations, "unlogged": unlogged}
        folder.save(step, learner.split(params)[0], opt_state, progress, accuracy)

    def book(metrics: dict[str, float]) -> dict[str, float]:
        """Evaluates where that is due, notes what the guards warn of, and logs the step."""
        if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.run.steps:
            metrics = metrics | {f"eval/{k}": v for k, v in held_out(cfg.eval.during, f"step {step}").items()}
        history.append(metrics)
        if warnings := watch(history):
            metrics["warnings"] = warnings
        folder.log({"step": step} | metrics)
        return metrics

    if "base" not in evaluations:
        evaluations["base"] = held_out(cfg.eval.tasks, "base")
        folder.log({"step": 0, "time/evaluation": evaluations["base"]["time/evaluation"]}
                   | {f"base/{k}": v for k, v in evaluations["base"].items()})  # fmt: skip
        if cfg.run.checkpoint_every:
            save()
    if unlogged is not None:
        book(unlogged)
        unlogged = None

    # ---- the loop -----------------------------------------------------------------------------------------------
    while step < cfg.run.steps and not asked():
        if traced := step + 1 == cfg.run.profile:
            jax.profiler.start_trace(folder.path / "profile", create_perfetto_trace=True)
        start, compiled = time.perf_counter(), compiles.count
        try:
            rollout, staleness = ahead.take(step, params)
        except Stopped:
            if traced:
                jax.profiler.stop_trace()
            break
        sampled = time.perf_counter()
        rewards, advantages, scored, metrics = judge(cfg, rollout)
        batch = pack_batch(rollout, rewards, advantages, cfg.rollout.prompt_tokens, cfg.rollout.response_tokens)
        if step + 1 < cfg.run.steps:
            saved = cfg.run.checkpoint_every and (step + 1) % cfg.run.checkpoint_every == 0
            ahead.begin(step + 1, params if cfg.rollout.overlap and not saved else None)
        trained_from = time.perf_counter()
        params, opt_state, learned = learner.update(params, opt_state, batch, rollout.store)
        step += 1

        now, phases = time.perf_counter(), {} if staleness else rollout.times
        if traced:
            jax.profiler.stop_trace()
        metrics |= learned | dropped_shares(batch, cfg.mask) | memory()
        metrics |= {f"time/{name}": seconds for name, seconds in phases.items()}
        metrics |= {
            "time/wait": sampled - start - sum(phases.values()),  # for another process, or for what was begun ahead
            "time/judge": trained_from - sampled,
            "time/train": now - trained_from,
            "time/step": now - start,
            "time/total": now - began,
            "rollout/staleness": staleness,
            "rollout/tokens_per_second": rollout.sampled_tokens / sum(rollout.times.values()),
            "vision/encoded": rollout.store.encoded,
            "vision/shown": rollout.store.shown,
            "vision/waste": 1 - rollout.store.patches / max(1, rollout.store.packed),
            "compile/count": compiles.count - compiled,
        }
        log.write(step, rollout.trajectories, scored, advantages)
        unlogged, said = metrics, history[-1].get("warnings", {}) if history else {}
        try:
            metrics, unlogged = book(metrics), None
        except Stopped:
            break
        console.print(
            f"step {step:4d}/{cfg.run.steps}  reward {metrics['reward/total']:.3f}  right {100 * metrics['accuracy']:5.1f} %  "
            f"tools {metrics['tools/calls']:.2f} a rollout  dropped {100 * metrics['mask/dropped_tokens']:4.1f} %  "
            f"{metrics['time/step']:.1f} s (rollout {sampled - start:.1f}, train {metrics['time/train']:.1f})"
        )
        for name, sentence in metrics.get("warnings", {}).items():
            if name not in said:
                console.print(f"[yellow]warning[/] ({name}): {sentence}")
        if cfg.run.checkpoint_every and step % cfg.run.checkpoint_every == 0:
            save(metrics.get("eval/accuracy"))

    # ---- the end ------------------------------------------------------------------------------------------------
    save()
    folder.settle()
    if asked():
        ahead.close()
        folder.close()
        if hosts.is_writer():
            write_report(folder.path)
        console.print(f"Stopped after step {step}; continue with --run.resume true.")
        return {}
    evaluations["trained"] = final = held_out(cfg.eval.tasks, "trained")
    folder.log({"step": step, "time/total": time.perf_counter() - began} | {f"final/{k}": v for k, v in final.items()})
    if jax.process_count() > 1:
        params = hosts.own_copy(gather_params(params))
    folder.close()
    if hosts.is_writer():
        with hosts.alone():
            checkpoint.save(folder.path / "model", *lora.merge(parts.model, params), source=parts.folder)
            if cfg.lora.on:
                lora.save(folder.path / "adapter", parts.model, params, base=cfg.model.path)
        write_report(folder.path)
    console.print(comparison({"base": evaluations["base"], "trained": final}, f"{cfg.run.name}: {step} steps"))
    console.print(f"{time.perf_counter() - began:.0f} s in all. Model, metrics and checkpoints: {folder.path}")
    console.print(f"Report: {folder.path}/report.html. Look at trajectories: python -m imagent_jax.view {folder.path}")
    return final


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit codes are those of the module docstring."""
    cfg, watcher, code = parse_args(argv), None, FAILED
    try:
        watcher = hosts.start(cfg.distributed)
        with Interrupt() as interrupt, jax.set_mesh(training_mesh(cfg)):
            final = train(cfg, Console(quiet=not hosts.is_writer()), interrupt)
            code = RESTART if not final and interrupt.asked == signal.SIGTERM else 0
    except Stopped:
        print("Stopped by SIGTERM; start again with --run.resume true.", file=sys.stderr)
        code = RESTART
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        if watcher is None:
            raise
        traceback.print_exc()
        watcher.fail(hosts.LONG_GRACE)
    except KeyboardInterrupt:  # the second Ctrl-C: at once
        if watcher is None:
            raise
        os._exit(128 + signal.SIGINT)
    if watcher is not None:
        watcher.fail() if code == FAILED else watcher.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
