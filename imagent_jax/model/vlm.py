"""A vision-language model: vision tower and decoder as one, and the pure functions that training and sampling call.

A model is split once into a static `Model` and its parameters. Every function below takes both and works under `jax.jit`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from imagent_jax.distributed.mesh import GROUPS, constrain, fitting, per_device
from imagent_jax.model.config import VLMConfig
from imagent_jax.model.families import family_of
from imagent_jax.model.text import Decoder, Deep, PromptCache, ResponseCache


class VLM(nnx.Module):
    """Modules of a model with their parameters, randomly initialised or from a checkpoint.

    Example:
        model, params = checkpoint.from_pretrained("Qwen/Qwen2-VL-7B-Instruct", mesh=mesh).split(remat="full")
    """

    def __init__(self, cfg: VLMConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        self.cfg = cfg
        self.vision = family_of(cfg).tower(cfg.vision, rngs, dtype)
        self.text = Decoder(cfg.text, rngs, dtype)

    def split(self, **settings) -> "tuple[Model, nnx.State]":
        """Return the static `Model` and the parameters that the functions below take.

        Args:
            settings: fields of `Model`; the compute dtype defaults to the parameters' dtype.
        """
        graphdef, params = nnx.split(self)
        return Model(graphdef, self.cfg, **{"dtype": self.text.embed[...].dtype.name} | settings), params


class Model(NamedTuple):
    """Static part of a model: module definition and compute settings (hashable, a static argument of `jax.jit`).

    Attributes:
        unsampled: ids that a policy never samples and whose probability is 0; see `Processor.unsampled_ids`.
    """

    graphdef: nnx.GraphDef
    cfg: VLMConfig
    dtype: str = "float32"
    remat: str = "none"
    vision_block: int = 144
    logprob_chunk: int = 2048
    attention: str = "xla"
    unsampled: tuple[int, ...] = ()

    def bind(self, params: nnx.State) -> VLM:
        return nnx.merge(self.graphdef, params)


def encode_images(
    model: Model,
    params: nnx.State,
    patches: UInt8[Array, "M bytes"],
    coords: Int[Array, "M 2"],
    image: Int[Array, " M"],
) -> Float[Array, "F E"]:
    """Return the features of a pack of images (F = M / 4, E = `cfg.vision.feature_dim`); see `VisionTower`."""
    with jax.named_scope("vision"):
        return model.bind(params).vision(
            patches,
            coords,
            image,
            block=model.vision_block,
            dtype=model.dtype,
            remat=model.remat != "none",
            backend=model.attention,
        )


def at_tokens(features: Float[Array, "F E"], vision: Int[Array, "*b S"]) -> Float[Array, "*b S E"]:
    """Return feature row `vision[...]` of every image placeholder, and zeros for text (-1)."""
    return jnp.where((vision >= 0)[..., None], features[jnp.maximum(vision, 0)], 0)


def embed(
    model: Model, params: nnx.State, ids: Int[Array, "*b S"], vision: Int[Array, "*b S"], shown: Float[Array, "*b S E"]
) -> Float[Array, "*b S D"]:
    """Return token embeddings, with the image's feature (`at_tokens`) in place of every placeholder."""
    table = constrain(jnp.asarray(model.bind(params).text.embed[...], model.dtype), "tensor")
    return jnp.where((vision >= 0)[..., None], shown[..., : table.shape[1]].astype(table.dtype), table[ids])


def deep_features(model: Model, shown: Float[Array, "*b S E"]) -> Deep | None:
    """Return what the first decoder layers add at image tokens; None for a family without DeepStack."""
    width = model.cfg.vision.hidden_size
    return Deep(shown[..., width:], width) if model.cfg.vision.deepstack else None


def prefill(
    model: Model,
    params: nnx.State,
    ids: Int[Array, "N P"],
    positions: Int[Array, "3 N P"],
    vision: Int[Array, "N P"],
    prompt_len: Int[Array, " N"],
    shown: Float[Array, "N P E"],
) -> tuple[Float[Array, "N V"], PromptCache]:
    """Run the prompts, once per group; return the logits after the last prompt token (float32) and the prompt cache."""
    with jax.named_scope("prefill"):
        text = model.bind(params).text
        x, deep = embed(model, params, ids, vision, shown), deep_features(model, shown)
        hidden, cache = text.prefill(x, positions, prompt_len, model.attention, deep=deep)
        last = jnp.take_along_axis(hidden, prompt_len[:, None, None] - 1, axis=1)[:, 0]
        return logits(last, text.head(model.dtype)), cache


def attention_by_source(
    model: Model,
    params: nnx.State,
    ids: Int[Array, "N S"],
    positions: Int[Array, "3 N S"],
    vision: Int[Array, "N S"],
    length: Int[Array, " N"],
    shown: Float[Array, "N S E"],
    source: Bool[Array, "N S C"],
) -> Float[Array, "L N S C"]:
    """Return the share of every token's attention that goes to each of C sources, by layer; see `attention_shares`."""
    text = model.bind(params).text
    x, deep = embed(model, params, ids, vision, shown), deep_features(model, shown)
    return text.attention_by_source(x, positions, length, source, model.attention, deep)


def extend(
    model: Model,
    params: nnx.State,
    ids: Int[Array, "B S"],
    positions: Int[Array, "3 B S"],
    vision: Int[Array, "B S"] | None,
    count: Int[Array, " B"],
    start: Int[Array, " B"],
    prompt: PromptCache,
    prompt_len: Int[Array, " N"],
    cache: ResponseCache,
    shown: Float[Array, "B S E"] | None = None,
) -> tuple[Float[Array, "B V"], ResponseCache]:
    """Append `count[b] <= S` tokens to response row b, from index `start[b]` on. Without `vision` and `shown`, they are text.

    Returns:
        Logits after the last appended token of each row (float32), and the cache.
    """
    text = model.bind(params).text
    plain = vision is None or shown is None
    x = jnp.asarray(text.embed[...], model.dtype)[ids] if plain else embed(model, params, ids, vision, shown)
    deep = None if plain else deep_features(model, shown)
    hidden, cache = text.extend(x, positions, start, prompt, prompt_len, cache, deep)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return logits(last, text.head(model.dtype)), cache


def empty_cache(model: Model, kind: type, rows: int, length: int):
    """Return a zero `PromptCache` or `ResponseCache` (`kind`) for `rows` sequences of up to `length` tokens."""
    t = model.cfg.text
    shapes = (rows, t.num_kv_heads, t.head_dim, length), (rows, t.num_kv_heads, length, t.head_dim)
    return kind(*(tuple(jnp.zeros(shape, model.dtype) for _ in range(t.num_layers)) for shape in shapes))


def logits(hidden: Float[Array, "*b D"], head: Float[Array, "D V"]) -> Float[Array, "*b V"]:
    """Return logits in float32 for any compute dtype; products are accumulated and returned without rounding to bfloat16."""
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def sampled_only(logits: Float[Array, "*b V"], unsampled: tuple[int, ...]) -> Float[Array, "*b V"]:
    """Return logits with -inf at the ids `unsampled`."""
    if not unsampled:
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[-1]), unsampled), -jnp.inf, logits)


def token_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " T"],
    temperature: float = 1.0,
    chunk: int = 2048,
    unsampled: tuple[int, ...] = (),
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Compute the log-probability of every target and the entropy (nats) of every softmax(hidden @ head / temperature).

    Memory: logits exist for `chunk` tokens at a time in the forward and the backward pass, never as [T, V].

    Args:
        unsampled: ids without a share of the softmax. As targets they get their logit less the others' log-sum, which is finite.
    """
    total = hidden.shape[0]
    chunk = min(chunk, total)
    pad = -total % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def one(_, inputs):
        h, t = inputs
        scores = logits(h, head) / temperature
        chances = sampled_only(scores, unsampled)
        logprobs = scores - jax.nn.logsumexp(chances, axis=-1, keepdims=True)
        entropy = -jnp.sum(jnp.where(chances > -jnp.inf, jnp.exp(logprobs) * logprobs, 0), axis=-1)
        return None, (jnp.take_along_axis(logprobs, t[:, None], axis=-1)[:, 0], jax.lax.stop_gradient(entropy))

    _, (logprobs, entropy) = jax.lax.scan(one, None, (hidden, targets))
    return logprobs.reshape(-1)[:total], entropy.reshape(-1)[:total]


def response_logprobs(
    model: Model,
    params: nnx.State,
    prompt_ids: Int[Array, "N P"],
    prompt_positions: Int[Array, "3 N P"],
    prompt_vision: Int[Array, "N P"],
    prompt_len: Int[Array, " N"],
    response_ids: Int[Array, "N G R"],
    response_positions: Int[Array, "3 N G R"],
    response_vision: Int[Array, "N G R"],
    shown: tuple[Float[Array, "N P E"], Float[Array, "N G R E"]],
    temperature: float = 1.0,
    response_len: Int[Array, "N G"] | None = None,
) -> tuple[Float[Array, "N G R"], Float[Array, "N G R"]]:
    """Run the training forward pass: log-probability and entropy of every response token given the preceding tokens.

    Args:
        shown: image features at the tokens of the prompts and of the responses (`at_tokens`).
        response_len: real tokens of each response; None: all.
    """
    with jax.named_scope("two_streams"):
        text = model.bind(params).text
        deep_prompt, deep_response = (deep_features(model, one) for one in shown)
        prompt, hidden = text.two_streams(
            embed(model, params, prompt_ids, prompt_vision, shown[0]),
            prompt_positions,
            prompt_len,
            embed(model, params, response_ids, response_vision, shown[1]),
            response_positions,
            response_len,
            model.remat,
            model.attention,
            (deep_prompt, deep_response) if deep_prompt and deep_response else None,
        )
        n, g, r, d = hidden.shape
        last = jnp.take_along_axis(prompt, prompt_len[:, None, None] - 1, axis=1)[:, None]  # [N 1 1 D]
        before = jnp.concatenate([jnp.broadcast_to(last, (n, g, 1, d)), hidden[:, :, :-1]], axis=2)
    with jax.named_scope("logprobs"):

        def own_tokens(hidden, targets, head):
            values = token_logprobs(
                hidden.reshape(-1, d), head, targets.reshape(-1), temperature, model.logprob_chunk, model.unsampled
            )
            return tuple(x.reshape(targets.shape) for x in values)

        rows = fitting(response_ids, GROUPS)  # per-device chunks: the head is gathered, and its gradient reduced, once
        return per_device(own_tokens, (rows, rows, PartitionSpec()), (rows, rows), GROUPS)(
            before, response_ids, text.head(model.dtype)
        )


def create(cfg: VLMConfig, seed: int = 0, param_dtype=jnp.float32, **settings) -> tuple[Model, nnx.State]:
    """Return a model with random parameters. `settings` are fields of `Model`."""
    graphdef, params = nnx.split(jax.jit(partial(VLM, cfg, dtype=param_dtype))(rngs=nnx.Rngs(seed)))
    return Model(graphdef, cfg, **settings), params


def abstract(cfg: VLMConfig, param_dtype=jnp.float32, **settings) -> tuple[Model, nnx.State]:
    """Return a model as `create` does, with `jax.ShapeDtypeStruct`s in place of arrays."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: VLM(cfg, nnx.Rngs(0), param_dtype)))
    return Model(graphdef, cfg, **settings), params
