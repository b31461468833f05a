"""The `splash` backend of `attention`: the Pallas splash-attention kernel for TPUs."""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from imagent_jax.model.params import pad_to

BLOCKS = (512, 256, 128)
"""Candidate tile sizes of queries and keys, in tokens; the first that divides the sequence is used."""
_LANES = 128


@dataclass(frozen=True)
class _GroupMask(splash_mask.Mask):
    """Mask of G rows of S queries over [P shared | G x S own keys]: all shared keys, and causally the row's own keys."""

    p: int
    g: int
    s: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.g * self.s, self.p + self.g * self.s

    def __getitem__(self, idx) -> np.ndarray:
        (q, q_end), (k, k_end) = (slice_.indices(n)[:2] for slice_, n in zip(idx, self.shape, strict=True))
        k, k_end, shape = k - self.p, k_end - self.p, (q_end - q, k_end - k)
        same_row = q // self.s == (q_end - 1) // self.s == max(k, 0) // self.s == (k_end - 1) // self.s
        if k_end <= 0 or (k >= 0 and same_row and q >= k_end - 1):
            return _uniform(shape, True)  # without building the block: a sequence of 10^5 tokens has 10^5 blocks
        if k >= 0 and (q_end <= k or k_end <= q // self.s * self.s):
            return _uniform(shape, False)
        q, k = np.arange(q, q_end)[:, None], np.arange(k, k_end)[None, :]
        return (k < 0) | ((q // self.s == k // self.s) & (q >= k))


@lru_cache
def _uniform(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


@lru_cache
def _splash_kernel(mask: splash_mask.Mask | int, heads: int, interpret: bool):
    """Return the kernel for a static mask (an int: full attention among that many tokens)."""
    mask = splash_mask.FullMask((mask, mask)) if isinstance(mask, int) else mask
    bq, bk = (next(b for b in BLOCKS if n % b == 0) for n in mask.shape)
    blocks = splash.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_kv_compute=bk,
        block_q_dkv=bq,
        block_kv_dkv=bk,
        block_kv_dkv_compute=bk,
        block_q_dq=bq,
        block_kv_dq=bk,
    )
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )


def splash_attention(q, k, v, packed, shared, *, interpret: bool = False):
    """Compute `attention` by the splash kernel.

    All rows of a group form one sequence of the kernel: G rows of queries over [shared | own keys of all rows]. A static mask
    restricts who attends to whom, fully masked blocks are skipped, and segment ids mask padding. The shared keys thus exist once,
    and the kernel sums their gradient over the group.

    Args:
        packed: ids of `Packed`, or None for `Causal`.
        shared: see `attention`.
        interpret: run in Pallas' interpreter.
    """
    if shared is None:
        q, k, v = (x[..., None, :, :, :] for x in (q, k, v))  # G = 1
    *lead, g, s, heads, width = q.shape
    q, k, v = (pad_to(x.reshape(-1, *x.shape[-4:]), 2, _LANES) for x in (q, k, v))
    b, padded = q.shape[0], q.shape[2]
    q_ids = jnp.zeros((b, g * padded), jnp.int32)
    if packed is not None:
        q_ids = pad_to(packed.reshape(b, s), 1, _LANES, -1)
    q, k, v = (x.reshape(b, g * padded, *x.shape[3:]) for x in (q, k, v))
    k_ids, p = q_ids, 0
    if shared is not None:
        hidden = jnp.where(jnp.arange(shared.k.shape[1]) < shared.length[:, None], 0, -1)
        k_ids = jnp.concatenate([pad_to(hidden, 1, _LANES, -1), q_ids], axis=1)
        p = k_ids.shape[1] - g * padded
        k = jnp.concatenate([pad_to(shared.k, 1, _LANES), k], axis=1)
        v = jnp.concatenate([pad_to(shared.v, 1, _LANES), v], axis=1)
    kernel = _splash_kernel(padded if packed is not None else _GroupMask(p, g, padded), heads, interpret)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * width**-0.5, k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_ids, k_ids))  # [B Q G*S H]
    out = jnp.swapaxes(out, 1, 2).reshape(b, g, padded, heads, width)[:, :, :s]
    return out.reshape(*lead, g, s, heads, width) if shared is not None else out.reshape(*lead, s, heads, width)
