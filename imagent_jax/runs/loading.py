"""Policies from disk: a run at a checkpoint, a folder, a hub id, or the embedded base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from imagent_jax.config import TINY, Config, MeshConfig, load_config
from imagent_jax.rl.learner import trained_filter
from imagent_jax.rollout.policy import Policy
from imagent_jax.runs.folder import checkpoint_folder, load_params


def load_policy(
    path: str | Path, *, step: int | None = None, mesh: MeshConfig | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[Policy, int | None]:
    """Load the policy of a run at a checkpoint, with the run's settings, or of a model.

    Args:
        path: folder of a run; "tiny", folder of a model, or hub id.
        step: of the run's checkpoint (default: the newest).
        mesh: devices of the policy (default: one).
        settings: section.key overrides of the settings.
    Returns:
        The policy, and the step of the checkpoint (None: not a run).
    Raises:
        ValueError: there is no such run, checkpoint or model; see `load_params` and `Policy`.
    """
    run = Path(path)
    is_run = (run / "config.yaml").is_file()
    if is_run or str(path) == "tiny":
        cfg = load_config(run / "config.yaml" if is_run else TINY)
    else:
        cfg = Config.from_dict({"model": {"path": str(path)}})
    policy = Policy(cfg := replace(cfg.changed(settings or {}), mesh=mesh or MeshConfig()))
    if not is_run:
        return policy, None
    trained, frozen = nnx.split_state(policy.params, trained_filter(cfg), ...)
    trained, step = load_params(checkpoint_folder(cfg.run, run), trained, step)
    policy.replace_params(nnx.merge_state(trained, frozen))
    return policy, step
