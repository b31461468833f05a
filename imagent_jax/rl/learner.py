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
from imagent_jax.rl.batch import split_groups
from imagent_jax.rl.loss import loss_normaliser, policy_loss
from imagent_jax.rl.mask import two_level_mask
from imagent_jax.rl.trajectory import GroupBatch


class Tables(NamedTuple):
    """The look-up tables of the two-level mask (`rl.mask.mask_tables`)."""

    action: jax.Array
    trajectory: jax.Array


def score(model: Model, params: nnx.State, batch: GroupBatch, features, temperature: float):
    """Log-probability and entropy of every response token, [N G R] each."""
    return response_logprobs(
        model, params, batch.prompt_ids, batch.prompt_positions, batch.prompt_vision, batch.prompt_len,
        batch.response_ids, batch.response_positions, batch.response_vision, features, temperature,
    )  # fmt: skip


score_jit = jax.jit(score, static_argnums=0, static_argnames="temperature")


def batch_loss(model, cfg, trained, frozen, features, batch: GroupBatch, tables: Tables, normaliser, reference):
    """GRPO loss of a micro-batch and its metrics (sums and counts). `trained` and `frozen` are parts of the parameters."""
    params = nnx.merge_state(trained, frozen)
    logprobs, entropy = score(model, params, batch, features, cfg.rollout.temperature)
    mask = two_level_mask(batch.kind, batch.end, batch.advantages, tables.action, tables.trajectory)
    return policy_loss(
        logprobs, batch.logprobs, batch.advantages, mask, cfg=cfg.grpo, normaliser=normaliser,
        ref_logprobs=reference, entropy=entropy,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def accumulate(model, cfg, with_features, trained, frozen, total, features, batch, tables, normaliser, reference):
    """Adds a micro-batch's gradient (parameters, and features where the tower learns) to `total`."""
    argnums = (0, 2) if with_features else (0,)

    def loss(trained, frozen, features):
        return batch_loss(model, cfg, trained, frozen, features, batch, tables, normaliser, reference)

    (value, metrics), gradients = jax.value_and_grad(loss, argnums, has_aux=True)(trained, frozen, features)
    return jax.tree.map(jnp.add, total, gradients), value, metrics


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def apply_gradients(optimizer, params, opt_state, gradients):
    """One optax update; returns parameters, optimizer state and the gradient's global norm before clipping."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.global_norm(gradients)


class Learner:
    """Owns the optimizer; parameters and optimizer state pass through `update`.

    Args:
        reference: parameters of the KL reference policy, needed where `grpo.kl` > 0.
    """

    def __init__(self, model: Model, cfg: Config, optimizer, tables: Tables, reference: nnx.State | None = None):
        self.model, self.cfg, self.optimizer, self.tables, self.reference = model, cfg, optimizer, tables, reference
        r = cfg.rollout.response_tokens
        self.widths = sorted({max(1, r // 2), max(1, 3 * r // 4), r})

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(trained, frozen) parameters."""
        frozen = ("vision",) if self.cfg.model.freeze_vision else ()
        part = [nnx.State({k: v for k, v in params.items() if (k in frozen) == flag}) for flag in (False, True)]
        return part[0], part[1]

    def init(self, params: nnx.State):
        return self.optimizer.init(self.split(params)[0])

    def update(self, params: nnx.State, opt_state, batch: GroupBatch, store: FeatureStore):
        """`grpo.epochs` passes over the batch in `grpo.minibatches` optimizer updates each.

        Returns parameters, optimizer state, metrics (floats).
        """
        cfg, sums = self.cfg.grpo, []
        reference = None if cfg.kl == 0 else store.encode_again(self.reference["vision"])
        parts = split_groups(batch, min(cfg.micro_groups, len(batch.prompt_len)), self.widths)
        per_update = max(1, len(parts) // cfg.minibatches)
        order = np.random.default_rng(0)
        first = True
        for _ in range(cfg.epochs):
            shuffled = [parts[i] for i in order.permutation(len(parts))]
            for begin in range(0, len(shuffled), per_update):
                chunk = shuffled[begin : begin + per_update]
                params, opt_state, metrics = self._update_once(params, opt_state, chunk, store, reference, first)
                sums.append(metrics)
                first = False
        sums = jax.device_get(sums)
        return params, opt_state, {key: float(np.mean([m[key] for m in sums])) for key in sums[0]}

    def _update_once(self, params, opt_state, parts, store, reference, first):
        trained, frozen = self.split(params)
        learns = not self.cfg.model.freeze_vision
        features = store.features if first or not learns else store.encode_again(params["vision"])
        zero = jax.tree.map(jnp.zeros_like, (trained, features) if learns else (trained,))
        total, metrics, losses = zero, None, 0.0
        masks = [two_level_mask(p.kind, p.end, p.advantages, *self.tables) for p in parts]
        normaliser = sum(loss_normaliser(m, cfg=self.cfg.grpo) for m in masks)
        for part in parts:
            ref = None
            if reference is not None:
                ref, _ = score_jit(self.model, self.reference, part, reference, temperature=self.cfg.rollout.temperature)
            total, value, m = accumulate(
                self.model, self.cfg, learns, trained, frozen, total, features, part, self.tables, normaliser, ref
            )
            losses += value
            metrics = m if metrics is None else jax.tree.map(jnp.add, metrics, m)
        gradients = total[0]
        if learns:
            gradients["vision"] = jax.tree.map(jnp.add, gradients["vision"], store.gradient(params["vision"], total[1]))
        trained, opt_state, norm = apply_gradients(self.optimizer, trained, opt_state, gradients)
        return nnx.merge_state(trained, frozen), opt_state, metrics | {"loss": losses, "grad_norm": norm}
