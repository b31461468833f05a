"""The learner: optimizer updates from one batch, with exact accumulation over micro-batches.

The loss takes image features as input. With a frozen vision tower, the rollout's features are used. Otherwise the gradient of
the features is summed over micro-batches and back-propagated through the tower once per update.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagent_jax.config import Config, GRPOConfig
from imagent_jax.model.features import EncodedImages, Pages
from imagent_jax.model.sharding import constrain_params
from imagent_jax.model.vlm import Model, response_logprobs
from imagent_jax.rl.batch import GroupBatch, learning_groups, micro_batches, micro_shapes, place_groups, take_groups
from imagent_jax.rl.loss import finish_metrics, loss_normaliser, policy_loss
from imagent_jax.rl.mask import MaskTables, two_level_mask
from imagent_jax.types import TokenKind


class LossSettings(NamedTuple):
    """The settings that change the compiled loss. `temperature`: of the sampled softmax."""

    grpo: GRPOConfig
    temperature: float

    @classmethod
    def of(cls, cfg: Config) -> "LossSettings":
        return cls(cfg.grpo, cfg.rollout.temperature)


def score(model: Model, params: nnx.State, batch: GroupBatch, shown, temperature: float):
    """Return log-probability and entropy of every response token, [N G R] each; `shown` as in `response_logprobs`."""
    return response_logprobs(
        model,
        params,
        batch.prompt_ids,
        batch.prompt_positions,
        batch.prompt_vision,
        batch.prompt_len,
        batch.response_ids,
        batch.response_positions,
        batch.response_vision,
        shown,
        temperature,
        batch.response_len,
    )


score_jit = jax.jit(score, static_argnums=0, static_argnames="temperature")


def batch_loss(
    model, settings: LossSettings, trained, frozen, shown, batch: GroupBatch, tables: MaskTables, normaliser, reference, old
):
    """Return the loss of a micro-batch and its metrics (sums and counts).

    Args:
        trained, frozen: the two parts of the parameters.
        shown: image features at the tokens, see `response_logprobs`.
        normaliser: see `policy_loss`.
        reference: log-probabilities under the KL reference policy [N G R], or None.
        old: the trainer's log-probabilities before the first update [N G R], or None: those of the sampler.
    """
    params = nnx.merge_state(trained, frozen)
    logprobs, entropy = score(model, params, batch, shown, settings.temperature)
    mask = two_level_mask(batch.kind, batch.end, batch.advantages, tables.action, tables.trajectory)
    observed = batch.kind == TokenKind.OBSERVATION  # observations that train (an ablation) were not sampled: their weight is 1
    sampler = None if old is None else jnp.where(observed, old, batch.logprobs)
    return policy_loss(
        logprobs,
        batch.logprobs if old is None else old,
        batch.advantages,
        mask,
        cfg=settings.grpo,
        normaliser=normaliser,
        ref_logprobs=reference,
        sampler_logprobs=sampler,
        entropy=entropy,
    )


@partial(jax.jit, static_argnums=0)
def group_normalisers(grpo: GRPOConfig, batch, tables):
    """Return each group's contribution to the denominator of the loss, [N]."""
    mask = two_level_mask(batch.kind, batch.end, batch.advantages, tables.action, tables.trajectory)
    return loss_normaliser(mask, cfg=grpo)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def accumulate(model, settings, with_shown, trained, frozen, total, shown, batch, tables, normaliser, reference, old):
    """Add a micro-batch's gradient of the trained parameters to `total`. Returns it, the loss, its metrics, and the gradient of
    `shown` if the tower is trained (else none)."""

    def loss(trained, shown):
        return batch_loss(model, settings, trained, frozen, shown, batch, tables, normaliser, reference, old)

    argnums = (0, 1) if with_shown else (0,)
    (value, metrics), (gradient, *of_shown) = jax.value_and_grad(loss, argnums, has_aux=True)(trained, shown)
    return constrain_params(jax.tree.map(jnp.add, total, gradient)), value, metrics, *of_shown


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def apply_gradients(optimizer, params, opt_state, gradients):
    """Apply one optimizer update; return parameters, optimizer state and the gradient's global norm before clipping."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params, opt_state = constrain_params((optax.apply_updates(params, updates), opt_state))
    return params, opt_state, optax.global_norm(gradients)


def trained_filter(cfg: Config):
    """Return the nnx filter of the trained parameters: adapters if there are any, else all, without a frozen vision tower."""
    whole = nnx.Not(nnx.PathContains("vision")) if cfg.model.freeze_vision else ...
    return nnx.LoRAParam if cfg.lora.on else whole


class Learner:
    """Runs optimizer updates; parameters and optimizer state pass through `update`.

    Args:
        reference: parameters of the KL reference policy, required if `grpo.kl` > 0.
    """

    def __init__(self, model: Model, cfg: Config, optimizer, tables: MaskTables, reference: nnx.State | None = None):
        self.model, self.settings, self.optimizer, self.tables = model, LossSettings.of(cfg), optimizer, tables
        self.warm = False
        self.trained = trained_filter(cfg)
        self.reference = reference
        if reference is not None:  # updates donate the trained parameters
            trained, frozen = self.split(reference)
            self.reference = nnx.merge_state(jax.tree.map(jnp.copy, trained), frozen)
        self.shapes = micro_shapes(cfg)

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Return the trained and the frozen parameters; see `trained_filter`."""
        trained, frozen = nnx.split_state(params, self.trained, ...)
        return trained, frozen

    def init(self, params: nnx.State):
        return self.optimizer.init(self.split(params)[0])

    def update(self, params: nnx.State, opt_state, batch: GroupBatch, store: EncodedImages):
        """Run `grpo.epochs` passes over the batch with `grpo.minibatches` optimizer updates each.

        Groups whose advantages are all zero are skipped, since without KL they have no gradient. They still count in the loss's
        denominator, in equal parts in each update. The first call compiles the gradient for every micro-batch shape; later calls
        compile nothing.

        Returns:
            Parameters, optimizer state, and metrics (floats, over the groups that were run).
        """
        cfg, sums = self.settings.grpo, []
        seen = self.reference if self._learns(params) else None  # by other parameters than those of the rollout
        images = store if seen is None else store.encode_again(seen)

        def with_logprobs(part: GroupBatch):  # the micro-batch, and log-probabilities of reference and trainer
            kl = self._score(self.reference, part, images) if cfg.kl else None
            return part, kl, self._score(params, part, store) if cfg.recompute else None

        if not self.warm:
            for width, size in self.shapes:
                self._gradient(params, [with_logprobs(take_groups(batch, np.zeros(1, int), width, size))], store, 1.0, fresh=True)
            self.warm = True
        index = np.arange(len(batch.prompt_len)) if cfg.kl else learning_groups(batch, cfg.minibatches)
        weight = np.asarray(group_normalisers(cfg, batch, self.tables))
        idle = (weight.sum() - weight[index].sum()) / cfg.minibatches
        updates = [
            (idle + sum(weight[taken].sum() for taken, _ in update), [with_logprobs(part) for _, part in update])
            for update in micro_batches(batch, index, self.shapes, cfg.minibatches)
        ]
        for epoch in range(cfg.epochs):
            for i in np.random.default_rng(epoch).permutation(cfg.minibatches):
                normaliser, parts = updates[i]
                gradients, of_parts = self._gradient(params, parts, store, normaliser, fresh=not sums)
                trained, frozen = self.split(params)
                trained, opt_state, norm = apply_gradients(self.optimizer, trained, opt_state, gradients)
                params = nnx.merge_state(trained, frozen)
                sums.append((of_parts, {"grad_norm": norm}))
        sums = [summed(of_parts) | norm for of_parts, norm in jax.device_get(sums)]
        return params, opt_state, {key: float(np.mean([m[key] for m in sums])) for key in sums[0]}

    def _learns(self, params) -> bool:
        """Return whether the vision tower has trained parameters."""
        return "vision" in self.split(params)[0]

    def _score(self, params, part: GroupBatch, images: EncodedImages):
        shown = shown_in(images, part)
        return score_jit(self.model, params, place_groups(part), shown, temperature=self.settings.temperature)[0]

    def _gradient(self, params, parts, store, normaliser, fresh: bool):
        """Return the gradient of one update, and the metrics of its micro-batches.

        Args:
            fresh: the rollout's features were computed with these parameters.
        """
        trained, frozen = self.split(params)
        learns = self._learns(params)
        images = store if fresh or not learns else store.encode_again(params)
        total, of_pages, sums = jax.tree.map(jnp.zeros_like, trained), Pages(images.pages.room, images.blank), []
        for part, reference, old in parts:
            total, value, metrics, *of_shown = accumulate(
                self.model,
                self.settings,
                learns,
                trained,
                frozen,
                total,
                shown_in(images, part),
                place_groups(part),
                self.tables,
                np.float32(normaliser),
                reference,
                old,
            )
            for gradients in of_shown:
                for gradient, vision in zip(gradients, _vision(part), strict=True):
                    images.add_gradient(of_pages, gradient, vision)
            sums.append(metrics | {"loss": value})
        if learns:
            total["vision"] = jax.tree.map(jnp.add, total["vision"], store.gradient(params, of_pages, self.trained))
        return total, sums


def summed(of_parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the metrics of an update from those of its micro-batches, on the host. (On a device, the first update of several
    micro-batches would compile their sum.)"""
    total: dict[str, Any] = {name: sum(part[name] for part in of_parts) for name in of_parts[0]}
    loss = total.pop("loss")
    return finish_metrics(total) | {"loss": loss}


def _vision(part: GroupBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the feature rows of a micro-batch's prompts and responses."""
    return part.prompt_vision, part.response_vision


def shown_in(images: EncodedImages, part: GroupBatch) -> tuple[jax.Array, ...]:
    """Return the image features at the tokens of a micro-batch's prompts and responses."""
    return tuple(map(images.show, _vision(part)))
