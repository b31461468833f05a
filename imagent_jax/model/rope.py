"""Rotary embeddings: the decoder's M-RoPE and the vision tower's 2-D rotary embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _frequencies(width: int, theta: float) -> Float[Array, " half"]:
    return 1.0 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def mrope(
    positions: Int[Array, "3 *b S"], head_dim: int, theta: float, section: tuple[int, int, int], interleaved: bool = False
) -> tuple[Float[Array, "*b S H"], Float[Array, "*b S H"]]:
    """Return cosines and sines of (t, h, w) positions: `section` frequencies use t, h and w.

    Section by section, t first: equals `Qwen2VLRotaryEmbedding` of transformers (arXiv 2409.12191, section 2.1). Interleaved,
    t, h, w, t, h, w, ..., and t where h or w has its number: equals `Qwen3VLTextRotaryEmbedding`.
    """
    angles = positions[..., None].astype(jnp.float32) * _frequencies(head_dim, theta)  # [3 *b S H/2]
    if interleaved:
        index, half = jnp.arange(head_dim // 2), angles[0]
        for part in (1, 2):
            half = jnp.where((index % 3 == part) & (index < 3 * section[part]), angles[part], half)
        parts = [half]
    else:
        edges = (0, section[0], section[0] + section[1], sum(section))
        parts = [angles[i, ..., edges[i] : edges[i + 1]] for i in range(3)]
    full = jnp.concatenate([*parts, *parts], axis=-1)
    return jnp.cos(full), jnp.sin(full)


def rope_2d(coords: Int[Array, "*b 2"], head_dim: int, theta: float) -> tuple[Float[Array, "*b H"], Float[Array, "*b H"]]:
    """Return cosines and sines of patch coordinates (h, w). Equals `Qwen2VLVisionRotaryEmbedding` of transformers."""
    angles = coords[..., None].astype(jnp.float32) * _frequencies(head_dim // 2, theta)  # [*b 2 H/4]
    half = angles.reshape(*coords.shape[:-1], head_dim // 2)
    full = jnp.concatenate([half, half], axis=-1)
    return jnp.cos(full), jnp.sin(full)


def rotate(x: Float[Array, "*b S X H"], cos: Float[Array, "*b S H"], sin: Float[Array, "*b S H"]) -> Array:
    """Apply a rotary embedding to every head (axis -2) of `x`, computed in float32 and returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos[..., None, :] + rotated * sin[..., None, :]).astype(x.dtype)
