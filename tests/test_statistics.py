"""Statistics of evaluations, against SciPy, closed forms and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from imagent_jax.evals.statistics import Difference, estimate, macro_estimate, paired_difference


def test_the_error_of_independent_values_is_that_of_scipy():
    values = np.random.default_rng(0).random(37)
    mean, error = estimate(values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(scipy.stats.sem(values))
    assert math.isnan(estimate([1.0]).error) and estimate([1.0]).mean == 1


def test_values_of_one_question_are_dependent():
    """Every value twice in a cluster has the error of each once; four answers that always agree are one."""
    values = np.random.default_rng(1).random(25)
    doubled = estimate([*values, *values], [*range(25), *range(25)])
    assert doubled == pytest.approx(estimate(values))
    assert estimate([*values, *values]).error < 0.75 * doubled.error


def test_the_error_of_clusters_of_other_sizes_is_the_closed_form():
    """(Cochran: the linearised variance of a ratio of cluster totals.)"""
    values, clusters = [1, 0, 1, 1, 0, 0, 1], ["a", "a", "a", "b", "c", "c", "b"]
    totals, counts = np.asarray([2, 2, 0]), np.asarray([3, 2, 2])
    residuals = totals - 4 / 7 * counts
    wanted = math.sqrt(3 * np.var(residuals, ddof=1) / 7**2)
    assert residuals.sum() == pytest.approx(0) and estimate(values, clusters).error == pytest.approx(wanted)


def test_the_error_over_groups_is_that_of_independent_ones_or_of_the_questions_that_they_share():
    rng = np.random.default_rng(5)
    groups = [(rng.random(n), [f"{n} {i}" for i in range(n)]) for n in (7, 20, 4)]
    made = macro_estimate([[*zip(*group, strict=True)] for group in groups])
    assert made.mean == pytest.approx(np.mean([values.mean() for values, _ in groups]))
    assert made.error == pytest.approx(math.sqrt(sum(scipy.stats.sem(values) ** 2 for values, _ in groups)) / 3)
    values = rng.random(40)
    shared = [(value, i) for i, value in enumerate(values)]
    assert macro_estimate([shared] * 4) == pytest.approx(estimate(values))
    assert math.isnan(macro_estimate([[(1.0, "a")], shared]).error)


def test_few_questions_that_differ_show_nothing():
    """The sign test of five pairs that all favour one side has p = 1/16, of six 1/32."""
    for count, shown in ((1, False), (5, False), (6, True)):
        a, b = np.zeros(100), np.r_[np.ones(count), np.zeros(100 - count)]
        assert paired_difference(a, b).shown is shown and paired_difference(a, b).differing == count
        assert bool(scipy.stats.binomtest(count, count).pvalue < 0.05) is shown
    assert not paired_difference([0], [1]).shown
    assert not Difference(0.1, 0.0, 0.2, 50).shown and not Difference(-0.1, -0.2, 0.0, 50).shown  # zero is in the interval
    assert Difference(0.1, 0.01, 0.2, 50).shown and Difference(-0.1, -0.2, -0.01, 50).shown


def test_the_bootstrap_is_that_of_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.random(60), rng.random(60) + 0.1
    found = paired_difference(a, b)
    wanted = scipy.stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", random_state=3).confidence_interval
    assert found.mean == pytest.approx(np.mean(b - a))
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.01)  # five standard errors of a quantile of 10,000 draws
    assert paired_difference(a, b) == found != paired_difference(a, b, seed=1)


def test_a_difference_of_nothing_is_rarely_called_one_and_a_true_one_is():
    """Two models of the same accuracy on the same 100 questions of two rows each: about one in twenty is called different."""
    rng, called = np.random.default_rng(4), 0
    clusters, runs = np.repeat(np.arange(100), 2), 300
    for i in range(runs):
        p = np.repeat(rng.beta(2, 2, 100), 2)
        a, b = (rng.random(200) < p).astype(float), (rng.random(200) < p).astype(float)
        called += paired_difference(a, b, clusters, seed=i, draws=400).shown
    low, high = scipy.stats.binom.interval(0.998, runs, 0.05)
    assert low <= called <= high, called
    assert paired_difference(a, np.minimum(a + (rng.random(200) < 0.3), 1), clusters).shown


def test_rows_of_a_question_are_drawn_together():
    """The same difference in all four rows of a question counts once."""
    differences = np.random.default_rng(5).normal(size=30)
    once = paired_difference(np.zeros(30), differences)
    four = paired_difference(np.zeros(120), np.repeat(differences, 4), np.repeat(np.arange(30), 4))
    apart = paired_difference(np.zeros(120), np.repeat(differences, 4))
    assert (four.low, four.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low < 0.6 * (four.high - four.low)
