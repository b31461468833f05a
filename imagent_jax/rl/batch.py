"""Trajectories -> `GroupBatch`, the unit of training."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_mesh

from imagent_jax.model.interleave import pad_prompts
from imagent_jax.model.sharding import GROUPS
from imagent_jax.rl.rollout import RolloutBatch
from imagent_jax.rl.trajectory import GroupBatch, TokenKind, Trajectory


def pack_batch(rollout: RolloutBatch, rewards: np.ndarray, advantages: np.ndarray, prompt_tokens: int,
               response_tokens: int) -> GroupBatch:  # fmt: skip
    """The batch of a rollout: [N, P] prompts, [N, G, R] responses, rewards and advantages [N, G].

    Raises:
        ValueError: placeholders and feature rows differ for a trajectory (promise 5; the task is named).
    """
    ids, positions, vision = pad_prompts(rollout.prompts, rollout.prompt_vision, prompt_tokens)
    groups = rollout.trajectories
    check_images([t for group in groups for t in group], rollout.image_token_id)
    n, g, r = len(groups), len(groups[0]), response_tokens
    response = {
        "response_ids": np.zeros((n, g, r), np.int32),
        "response_positions": np.zeros((3, n, g, r), np.int32),
        "response_vision": np.full((n, g, r), -1, np.int32),
        "kind": np.full((n, g, r), TokenKind.PAD, np.uint8),
        "logprobs": np.zeros((n, g, r), np.float32),
    }
    for i, group in enumerate(groups):
        for j, t in enumerate(group):
            s = len(t.ids)
            response["response_ids"][i, j, :s] = t.ids
            response["response_positions"][:, i, j, :s] = t.positions
            response["response_vision"][i, j, :s] = t.vision
            response["kind"][i, j, :s] = t.kind
            response["logprobs"][i, j, :s] = t.logprobs
    return GroupBatch(
        prompt_ids=ids,
        prompt_positions=positions,
        prompt_len=np.asarray([len(prompt.ids) for prompt in rollout.prompts], np.int32),
        prompt_vision=vision,
        response_len=np.asarray([[len(t.ids) for t in group] for group in groups], np.int32),
        end=np.asarray([[t.end for t in group] for group in groups], np.uint8),
        rewards=rewards.astype(np.float32),
        advantages=advantages.astype(np.float32),
        **response,
    )


def check_images(trajectories: Sequence[Trajectory], image_token_id: int) -> None:
    """Every placeholder has a feature row, and every feature row a placeholder (promise 5).

    Raises:
        ValueError: they differ; the sentence names the task and both counts.
    """
    for t in trajectories:
        placeholders = int(np.sum((t.ids == image_token_id) & (t.kind == TokenKind.OBSERVATION)))
        features = int(np.sum(t.vision >= 0))
        if placeholders != features:
            raise ValueError(
                f"Task {t.task.uid}, rollout {t.rollout}: {placeholders} image placeholders but {features} image features."
            )


def split_groups(batch: GroupBatch, size: int, widths: Sequence[int]) -> list[GroupBatch]:
    """Micro-batches of `size` groups each, groups of like length together, responses cut to the smallest width of
    `widths` that holds them (a few compiled shapes).

    Raises:
        ValueError: the groups do not divide by `size`.
    """
    n = batch.prompt_len.shape[0]
    if n % size:
        raise ValueError(f"{n} groups do not divide into micro-batches of {size}; set grpo.micro_groups to a divisor.")
    order = np.argsort(batch.response_len.max(axis=1), kind="stable")
    parts = []
    for begin in range(0, n, size):
        index = order[begin : begin + size]
        longest = int(batch.response_len[index].max())
        width = min(w for w in widths if w >= longest)
        parts.append(take_groups(batch, index, width))
    return parts


def learning_groups(batch: GroupBatch, multiple: int) -> np.ndarray:
    """Indices of the groups that have an advantage, with as many others as make their number a multiple of `multiple`
    (at least one multiple). Groups without an advantage have no gradient."""
    idle = ~np.any(batch.advantages, axis=1)
    count = max(1, -(-int((~idle).sum()) // multiple)) * multiple
    return np.argsort(idle, kind="stable")[:count]


def take_groups(batch: GroupBatch, index: np.ndarray, width: int) -> GroupBatch:
    """Groups `index` of the batch, responses cut to `width` tokens."""
    fields = {}
    for name, value in vars(batch).items():
        if value is None:
            continue
        value = np.take(value, index, axis=_group_axis(name))
        if name in ("response_ids", "response_positions", "response_vision", "kind", "logprobs"):
            value = value[..., :width]
        fields[name] = value
    return GroupBatch(**fields)


def place_groups(batch: GroupBatch) -> GroupBatch:
    """The batch on the current mesh (`jax.set_mesh`), each device with its groups; without a mesh as it is."""
    mesh = get_mesh()
    if mesh.empty:
        return batch
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    places = {name: group_sharding(mesh, name) for name in fields}
    shapes = {name: value.shape for name, value in fields.items()}  # every process has the whole, and places its part
    return GroupBatch(**jax.make_array_from_process_local_data(places, fields, shapes))


def group_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Where a field of a `GroupBatch` lives: by groups over `GROUPS`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * _group_axis(name), GROUPS))


def _group_axis(name: str) -> int:
    return 1 if name.endswith("_positions") else 0
