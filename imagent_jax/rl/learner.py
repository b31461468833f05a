"""The learner: one optimizer update from one batch, in exact micro-batches.

The loss takes image *features*. With a frozen tower they are the rollout's own; otherwise the gradient of the features
is summed over micro-batches and pulled back through the tower once, so every image is encoded once per update.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagent_jax.config import Config
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.qwen2_vl import Model, response_logprobs
from imagent_jax.model.sharding import constrain_params
from imagent_jax.rl.batch import GroupBatch, learning_groups, micro_batches, micro_shapes, place_groups, take_groups
from imagent_jax.rl.loss import finish_metrics, loss_normaliser, policy_loss
from imagent_jax.rl.mask import two_level_mask
from imagent_jax.types import TokenKind


class Tables(NamedTuple):
    """The look-up tables of the two-level mask (`rl.mask.mask_tables`)."""

    action: jax.Array
    trajectory: jax.Array


def score(model: Model, params: nnx.State, batch: GroupBatch, features, temperature: float):
    """Log-probability and entropy of every response token, [N G R] each."""
    return response_logprobs(
        model, params, batch.prompt_ids, batch.prompt_positions, batch.prompt_vision, batch.prompt_len,
        batch.response_ids, batch.response_positions, batch.response_vision, features, temperature,
        batch.response_len,
    )  # fmt: skip


score_jit = jax.jit(score, static_argnums=0, static_argnames="temperature")


def batch_loss(model, cfg, trained, frozen, features, batch: GroupBatch, tables: Tables, normaliser, reference, old):
    """GRPO loss of a micro-batch and its metrics (sums and counts). `trained` and `frozen` are parts of the parameters."""
    params = nnx.merge_state(trained, frozen)
    logprobs, entropy = score(model, params, batch, features, cfg.rollout.temperature)
    mask = two_level_mask(batch.kind, batch.end, batch.advantages, tables.action, tables.trajectory)
    sampled = mask & (batch.kind != TokenKind.OBSERVATION)  # an observation that trains, in an ablation, was not sampled
    importance = None if old is None else jnp.exp(jnp.where(sampled, old - batch.logprobs, 0.0))
    return policy_loss(
        logprobs, batch.logprobs if old is None else old, batch.advantages, mask, cfg=cfg.grpo, normaliser=normaliser,
        ref_logprobs=reference, importance=importance, entropy=entropy,
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def group_normalisers(cfg, batch, tables):
    """What each group adds to the denominator of the loss, [N]."""
    return loss_normaliser(two_level_mask(batch.kind, batch.end, batch.advantages, *tables), cfg=cfg.grpo)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def accumulate(model, cfg, with_features, trained, frozen, total, features, batch, tables, normaliser, reference, old):
    """Adds a micro-batch's gradient (parameters, and features where the tower learns) to `total`."""
    argnums = (0, 2) if with_features else (0,)

    def loss(trained, frozen, features):
        return batch_loss(model, cfg, trained, frozen, features, batch, tables, normaliser, reference, old)

    (value, metrics), gradients = jax.value_and_grad(loss, argnums, has_aux=True)(trained, frozen, features)
    return constrain_params(jax.tree.map(jnp.add, total, gradients)), value, metrics


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def apply_gradients(optimizer, params, opt_state, gradients):
    """One optax update; returns parameters, optimizer state and the gradient's global norm before clipping."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params, opt_state = constrain_params((optax.apply_updates(params, updates), opt_state))
    return params, opt_state, optax.global_norm(gradients)


def trained_filter(cfg: Config):
    """An nnx filter of what is trained: adapters alone where there are any, else all, or all but the tower."""
    whole = nnx.Not(nnx.PathContains("vision")) if cfg.model.freeze_vision else ...
    return nnx.LoRAParam if cfg.lora.on else whole


class Learner:
    """Owns the optimizer; parameters and optimizer state pass through `update`.

    Args:
        reference: parameters of the KL reference policy, needed where `grpo.kl` > 0.
    """

    def __init__(self, model: Model, cfg: Config, optimizer, tables: Tables, reference: nnx.State | None = None):
        self.model, self.cfg, self.optimizer, self.tables = model, cfg, optimizer, tables
        self.warm = False
        self.trained = trained_filter(cfg)
        self.reference = reference
        if reference is not None:  # updates donate what they train
            trained, frozen = self.split(reference)
            self.reference = nnx.merge_state(jax.tree.map(jnp.copy, trained), frozen)
        self.shapes = micro_shapes(cfg)

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(trained, frozen) parameters; see `trained_filter`."""
        return nnx.split_state(params, self.trained, ...)

    def init(self, params: nnx.State):
        return self.optimizer.init(self.split(params)[0])

    def update(self, params: nnx.State, opt_state, batch: GroupBatch, store: FeatureStore):
        """`grpo.epochs` passes over the batch in `grpo.minibatches` optimizer updates each.

        Groups whose advantages are all zero are not run: without KL they have no gradient. They count in the loss's
        denominator all the same, an equal share in each update.
        The first call compiles the gradient for every shape of a micro-batch, so that no later one compiles anything.
        Returns parameters, optimizer state, metrics (floats; of the groups that were run).
        """
        cfg, sums = self.cfg.grpo, []
        reference = (store.encode_again(self.reference) if self._learns(params) else store.features) if cfg.kl else None

        def with_logprobs(part: GroupBatch):  # micro-batch, the reference's log-probabilities, the trainer's at the start
            part = place_groups(part)
            kl = self._score(self.reference, part, reference) if cfg.kl else None
            return part, kl, self._score(params, part, store.features) if cfg.recompute else None

        if not self.warm:
            for width, size in self.shapes:
                self._gradient(params, [with_logprobs(take_groups(batch, np.zeros(1, int), width, size))], store, 1.0, fresh=True)
            self.warm = True
        index = np.arange(len(batch.prompt_len)) if cfg.kl else learning_groups(batch, cfg.minibatches)
        weight = np.asarray(group_normalisers(self.cfg, batch, self.tables))
        idle = (weight.sum() - weight[index].sum()) / cfg.minibatches
        updates = [
            (idle + sum(weight[taken].sum() for taken, _ in update), [with_logprobs(part) for _, part in update])
            for update in micro_batches(batch, index, self.shapes, cfg.minibatches)
        ]
        for epoch in range(cfg.epochs):
            for i in np.random.default_rng(epoch).permutation(cfg.minibatches):
                normaliser, parts = updates[i]
                gradients, metrics = self._gradient(params, parts, store, normaliser, fresh=not sums)
                trained, frozen = self.split(params)
                trained, opt_state, norm = apply_gradients(self.optimizer, trained, opt_state, gradients)
                params = nnx.merge_state(trained, frozen)
                sums.append(metrics | {"grad_norm": norm})
        sums = jax.device_get(sums)
        return params, opt_state, {key: float(np.mean([m[key] for m in sums])) for key in sums[0]}

    def _learns(self, params) -> bool:
        """Whether anything in the vision tower is trained."""
        return "vision" in self.split(params)[0]

    def _score(self, params, part, features):
        return score_jit(self.model, params, part, features, temperature=self.cfg.rollout.temperature)[0]

    def _gradient(self, params, parts, store, normaliser, fresh: bool):
        """Gradient and metrics of one update. `fresh`: the rollout's features are those of these parameters."""
        trained, frozen = self.split(params)
        learns = self._learns(params)
        features = store.features if fresh or not learns else store.encode_again(params)
        total = jax.tree.map(jnp.zeros_like, (trained, features) if learns else (trained,))
        normaliser = np.float32(normaliser)
        sums = []
        for part, reference, old in parts:
            total, value, metrics = accumulate(
                self.model, self.cfg, learns, trained, frozen, total, features, part, self.tables, normaliser, reference, old
            )
            sums.append(metrics | {"loss": value})
        summed = jax.tree.map(lambda *x: sum(x), *sums)
        loss, metrics = summed.pop("loss"), finish_metrics(summed)
        gradients = total[0]
        if learns:
            vision = store.gradient(params, total[1], self.trained)
            gradients["vision"] = jax.tree.map(jnp.add, gradients["vision"], vision)
        return gradients, metrics | {"loss": loss}
