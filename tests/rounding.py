"""Bounds on rounding that follow from the arithmetic, so that they hold on every machine.

CPUs sum in different orders (vector widths, fused multiply-adds, matrix units), so results in float32 differ between them.
`assert_rounded(ours, exact, terms)` allows what `terms` independent roundings add up to, and no more.
"""

import jax.numpy as jnp
import numpy as np

FACTOR = 4
"""How often the standard growth of a rounding error is allowed: the largest of many values, and cancellation on the way."""


def rounding(scale, terms: float, dtype="float32") -> float:
    """The most by which rounding moves a result: FACTOR x eps(dtype) x scale x sqrt(terms).

    Args:
        scale: the largest absolute value that is summed, or an array of results, whose largest stands for it.
        terms: roundings on the way to a result: products of a sum; of several sums one after another, all of them.
        dtype: of the computation. Compare with a result in float64, or with one that is as far from exact.
    """
    return FACTOR * float(jnp.finfo(dtype).eps) * float(np.abs(scale).max()) * terms**0.5


def assert_rounded(ours, exact, terms: float, *, scale=None, dtype="float32", note="") -> None:
    """`ours` equals `exact` within `rounding(scale, terms, dtype)` everywhere; `scale` is `exact` by default."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    bound = rounding(exact if scale is None else scale, terms, dtype)
    assert np.isfinite(exact).all() and bound > 0, note
    np.testing.assert_allclose(ours, exact, rtol=0, atol=bound, err_msg=str(note))
