"""`GroupBatch`, the unit of training, and packing of trajectories into batches and micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, no_type_check

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_mesh
from jaxtyping import Float32, Int32, UInt8

from imagent_jax.config import Config
from imagent_jax.distributed.mesh import GROUPS, shard_count
from imagent_jax.model.interleave import pad_prompts
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.types import TokenKind, Trajectory

if TYPE_CHECKING:
    AnyArray = Any  # in a pytree also tracers, shapes and shardings
else:
    AnyArray = jax.Array | np.ndarray


@no_type_check  # as a pytree it may hold shapes or shardings in place of arrays
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupBatch:
    """The unit of training: arrays of NumPy or JAX. Responses are right-padded with kind PAD.

    N groups, G rollouts per group, P prompt tokens, R response tokens.
    """

    prompt_ids: Int32[AnyArray, "N P"]
    prompt_positions: Int32[AnyArray, "3 N P"]
    prompt_len: Int32[AnyArray, " N"]
    prompt_vision: Int32[AnyArray, "N P"]  # feature row, -1: text
    response_ids: Int32[AnyArray, "N G R"]
    response_positions: Int32[AnyArray, "3 N G R"]
    response_len: Int32[AnyArray, "N G"]
    response_vision: Int32[AnyArray, "N G R"]
    kind: UInt8[AnyArray, "N G R"]
    logprobs: Float32[AnyArray, "N G R"]  # of the sampler
    end: UInt8[AnyArray, "N G"]
    rewards: Float32[AnyArray, "N G"]
    advantages: Float32[AnyArray, "N G"]


def pack_batch(
    rollout: RolloutBatch, rewards: np.ndarray, advantages: np.ndarray, prompt_tokens: int, response_tokens: int
) -> GroupBatch:
    """Pack a rollout into a batch: prompts [N, P], responses [N, G, R], rewards and advantages [N, G].

    Raises:
        ValueError: image placeholders and feature rows of a trajectory differ (promise 5; the message names the task).
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
    """Check that every image placeholder has a feature row and every feature row a placeholder (promise 5).

    Raises:
        ValueError: the counts differ; the message names the task and both counts.
    """
    for t in trajectories:
        placeholders = int(np.sum((t.ids == image_token_id) & (t.kind == TokenKind.OBSERVATION)))
        features = int(np.sum(t.vision >= 0))
        if placeholders != features:
            raise ValueError(
                f"Task {t.task.uid}, rollout {t.rollout}: {placeholders} image placeholders but {features} image features."
            )


def micro_shapes(cfg: Config) -> list[tuple[int, int]]:
    """Return the compiled shapes of a micro-batch, narrowest first: (response width, number of groups).

    Widths are multiples of R / `grpo.length_buckets`. No shape holds more tokens than `grpo.micro_groups` groups (rounded up to a
    multiple of the mesh's data x fsdp) of P + G R tokens each. Narrow shapes hold two, four or more times as many groups.
    """
    r, shards = cfg.rollout, shard_count(GROUPS)
    widths = sorted({-(-i * r.response_tokens // cfg.grpo.length_buckets) for i in range(1, cfg.grpo.length_buckets + 1)})
    groups = -(-min(cfg.grpo.micro_groups, r.groups) // shards) * shards

    def tokens(width):
        return r.prompt_tokens + r.group_size * width

    return [(width, groups << int(math.log2(tokens(r.response_tokens) / tokens(width)))) for width in widths]


def micro_batches(
    batch: GroupBatch, index: np.ndarray, shapes: Sequence[tuple[int, int]], updates: int
) -> list[list[tuple[np.ndarray, GroupBatch]]]:
    """Split groups `index` of the batch into micro-batches and deal them to `updates` updates.

    Groups of similar length share a micro-batch. A micro-batch with too few groups is padded with groups that are masked.

    Args:
        index: groups to use, at least `updates`.
        shapes: see `micro_shapes`.
    Returns:
        Per update, its micro-batches, each with the indices of its groups.
    """
    longest = batch.response_len.max(axis=1)
    left, parts = sorted(index, key=lambda i: -longest[i]), []
    while left:
        width, size = next(shape for shape in shapes if shape[0] >= longest[left[0]])
        taken = np.asarray(left[: min(size, len(index) // updates)])  # at most an update's share, so that no update is empty
        parts.append((taken, take_groups(batch, taken, width, size)))
        left = left[len(taken) :]
    dealt = [[] for _ in range(updates)]
    for i in np.random.default_rng(0).permutation(len(parts)):
        min(dealt, key=lambda update: sum(len(taken) for taken, _ in update)).append(parts[i])
    return dealt


def learning_groups(batch: GroupBatch, least: int) -> np.ndarray:
    """Return the indices of the groups with a nonzero advantage, extended by others to at least `least` groups.

    Groups without a nonzero advantage have no gradient.
    """
    idle = ~np.any(batch.advantages, axis=1)
    return np.argsort(idle, kind="stable")[: max(least, int((~idle).sum()))]


def take_groups(batch: GroupBatch, index: np.ndarray, width: int, size: int | None = None) -> GroupBatch:
    """Return groups `index` of the batch with responses cut to `width` tokens, padded with masked groups to `size`."""
    fields, more = {}, (size or len(index)) - len(index)
    for name, value in vars(batch).items():
        value = np.take(value, [*index, *[index[0]] * more], axis=_group_axis(name))
        if name in ("response_ids", "response_positions", "response_vision", "kind", "logprobs"):
            value = value[..., :width]
        fields[name] = value
    fields["kind"][len(index) :] = TokenKind.PAD
    return GroupBatch(**fields)


def place_groups(batch: GroupBatch) -> GroupBatch:
    """Return the batch sharded by groups over the current mesh; unchanged without a mesh."""
    mesh = get_mesh()
    if mesh.empty:
        return batch
    fields = dict(vars(batch))
    places = {name: group_sharding(mesh, name) for name in fields}
    shapes = {name: value.shape for name, value in fields.items()}  # every process holds the whole batch and places its part
    return GroupBatch(**jax.make_array_from_process_local_data(places, fields, shapes))


def group_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Return the sharding of a field of `GroupBatch`: groups over `GROUPS`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * _group_axis(name), GROUPS))


def _group_axis(name: str) -> int:
    return 1 if name.endswith("_positions") else 0
