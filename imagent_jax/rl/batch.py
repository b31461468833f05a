"""The unit of training, `GroupBatch`, and how trajectories are packed into it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_mesh
from jaxtyping import Float, Float32, Int32, UInt8

from imagent_jax.config import Config
from imagent_jax.distributed.mesh import GROUPS, ways
from imagent_jax.model.interleave import pad_prompts
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.types import TokenKind, Trajectory

AnyArray = jax.Array | np.ndarray


@no_type_check  # as a tree it may hold anything in place of its arrays: shapes, shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupBatch:
    """The unit of training, arrays of NumPy or JAX. Responses are right-padded with kind PAD.

    N groups, G rollouts a group, P prompt tokens, R response tokens, F merged features.
    """

    prompt_ids: Int32[AnyArray, "N P"]
    prompt_positions: Int32[AnyArray, "3 N P"]
    prompt_len: Int32[AnyArray, " N"]
    prompt_vision: Int32[AnyArray, "N P"]  # feature row, -1 for text
    response_ids: Int32[AnyArray, "N G R"]
    response_positions: Int32[AnyArray, "3 N G R"]
    response_len: Int32[AnyArray, "N G"]
    response_vision: Int32[AnyArray, "N G R"]
    kind: UInt8[AnyArray, "N G R"]
    logprobs: Float32[AnyArray, "N G R"]  # the sampler's
    end: UInt8[AnyArray, "N G"]
    rewards: Float32[AnyArray, "N G"]
    advantages: Float32[AnyArray, "N G"]
    features: Float[AnyArray, "F D"] | None = None  # already encoded, for a frozen tower


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


def micro_shapes(cfg: Config) -> list[tuple[int, int]]:
    """The compiled shapes of a micro-batch, narrowest first: width of its responses (multiples of R / `grpo.widths`), and its
    groups.

    None holds more tokens than `grpo.micro_groups` groups (made a multiple of the mesh's data x fsdp) with responses of R
    tokens, P + G R each: where responses are short there are two, four or more times as many groups.
    """
    r, shards = cfg.rollout, ways(GROUPS)
    widths = sorted({-(-i * r.response_tokens // cfg.grpo.widths) for i in range(1, cfg.grpo.widths + 1)})
    groups = -(-min(cfg.grpo.micro_groups, r.groups) // shards) * shards

    def tokens(width):
        return r.prompt_tokens + r.group_size * width

    return [(width, groups << int(math.log2(tokens(r.response_tokens) / tokens(width)))) for width in widths]


def micro_batches(
    batch: GroupBatch, index: np.ndarray, shapes: Sequence[tuple[int, int]], updates: int
) -> list[list[tuple[np.ndarray, GroupBatch]]]:
    """Groups `index` of the batch, at least `updates` of them, in micro-batches of `shapes` (`micro_shapes`) with the groups
    they are of, dealt to as many updates.

    Groups of like length are together. Where there are too few for a shape, it is filled up with groups that train nothing.
    """
    longest = batch.response_len.max(axis=1)
    left, parts = sorted(index, key=lambda i: -longest[i]), []
    while left:
        width, size = next(shape for shape in shapes if shape[0] >= longest[left[0]])
        taken = np.asarray(left[: min(size, len(index) // updates)])  # at most an update's share: none goes without
        parts.append((taken, take_groups(batch, taken, width, size)))
        left = left[len(taken) :]
    dealt = [[] for _ in range(updates)]
    for i in np.random.default_rng(0).permutation(len(parts)):
        min(dealt, key=lambda update: sum(len(taken) for taken, _ in update)).append(parts[i])
    return dealt


def learning_groups(batch: GroupBatch, least: int) -> np.ndarray:
    """Indices of the groups that have an advantage, filled up with others to `least`. Groups without one have no gradient."""
    idle = ~np.any(batch.advantages, axis=1)
    return np.argsort(idle, kind="stable")[: max(least, int((~idle).sum()))]


def take_groups(batch: GroupBatch, index: np.ndarray, width: int, size: int | None = None) -> GroupBatch:
    """Groups `index` of the batch, responses cut to `width` tokens; up to `size` filled up with groups that train nothing."""
    fields, more = {}, (size or len(index)) - len(index)
    for name, value in vars(batch).items():
        if value is None:
            continue
        value = np.take(value, [*index, *[index[0]] * more], axis=_group_axis(name))
        if name in ("response_ids", "response_positions", "response_vision", "kind", "logprobs"):
            value = value[..., :width]
        fields[name] = value
    fields["kind"][len(index) :] = TokenKind.PAD
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
