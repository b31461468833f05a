"""Statistics of evaluations: standard errors over questions, and paired differences on the same questions."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its standard error; NaN where one cluster is too few."""

    mean: float
    error: float


FEWEST = 6
"""Clusters that must differ before a difference is called one: of five on the same side, a sign test's p is still 1 in 16."""


class Difference(NamedTuple):
    """A mean paired difference with its 95 % bootstrap interval, and the number of clusters that differ at all."""

    mean: float
    low: float
    high: float
    differing: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero, and enough clusters differ for a bootstrap."""
        return self.differing >= FEWEST and not self.low <= 0 <= self.high


def _sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of values in each cluster, in the order in which clusters first occur."""
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    index = np.asarray([places[name] for name in clusters])
    return np.bincount(index, np.asarray(values, float)), np.bincount(index).astype(float)


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean of values and its standard error, with values of one cluster as dependent.

    The error is that of a mean of cluster totals: sqrt(C / (C - 1) x sum over clusters of (sum of deviations)^2) / n. With one
    value in each cluster it is the standard error of the mean.

    Args:
        clusters: cluster of each value; None: all values are independent.
    """
    sums, counts = _sums(values, range(len(values)) if clusters is None else clusters)
    mean, c = sums.sum() / counts.sum(), len(sums)
    if c < 2:
        return Estimate(float(mean), float("nan"))
    deviations = sums - mean * counts
    return Estimate(float(mean), float(np.sqrt(c / (c - 1) * np.sum(deviations**2)) / counts.sum()))


def macro_estimate(groups: Sequence[Sequence[tuple[float, Hashable]]]) -> Estimate:
    """Return the mean over groups, which count equally, and its standard error.

    Deviations of a cluster are added over all groups that it is in. Where no cluster is in two groups, the error is that of a
    mean of independent groups; where every cluster is in all of them, it is that of `estimate`.

    Args:
        groups: values, each with its cluster, of each group.
    """
    means, totals = [], defaultdict(float)
    for values, clusters in (zip(*group, strict=True) for group in groups):
        sums, counts = _sums(values, clusters)
        mean, c = sums.sum() / counts.sum(), len(sums)
        means.append(mean)
        scale = np.sqrt(c / (c - 1)) / counts.sum() if c > 1 else np.nan
        for name, deviation in zip(dict.fromkeys(clusters), sums - mean * counts, strict=True):
            totals[name] += scale * deviation
    return Estimate(float(np.mean(means)), float(np.sqrt(sum(total**2 for total in totals.values())) / len(means)))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> Difference:
    """Return the mean of second - first with a 95 % interval by bootstrap over clusters (percentiles).

    Args:
        first, second: values of the same rows, in the same order.
        clusters: cluster of each row, drawn as a whole; None: every row is one.
    """
    differences = np.asarray(second, float) - np.asarray(first, float)
    sums, counts = _sums(differences, range(len(differences)) if clusters is None else clusters)
    rng, means = np.random.default_rng(seed), []
    for begin in range(0, draws, 1000):  # bounds the memory
        times = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(1000, draws - begin))
        means.append(times @ sums / (times @ counts))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(float(sums.sum() / counts.sum()), float(low), float(high), int(np.count_nonzero(np.abs(sums) > 1e-9)))
