"""Group advantages: who counts, who is compared, who gets nothing."""

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from imagent_jax.rl.advantages import group_advantages as unchecked

group_advantages = jaxtyped(typechecker=beartype)(unchecked)
EVERY = np.ones((1, 4), bool)


@pytest.mark.parametrize("normalise_std", [True, False])
def test_mean_and_deviation_of_the_group(normalise_std):
    rewards = np.array([[1.0, 0.0, 0.0, 3.0], [0.5, 1.5, 0.5, 1.5]])
    advantages, stats = group_advantages(rewards, np.ones((2, 4), bool), normalise_std=normalise_std)
    centred = [[0, -1, -1, 2], [-0.5, 0.5, -0.5, 0.5]]
    scale = [[np.sqrt(1.5)], [0.5]] if normalise_std else 1.0
    np.testing.assert_allclose(advantages, np.array(centred) / scale, rtol=1e-6)
    assert stats["groups/flat"] == 0.0 and stats["groups/std"] == pytest.approx((np.sqrt(1.5) + 0.5) / 2)


def test_uncounted_rollouts_are_compared_but_do_not_shift_the_group():
    counted = np.array([[True, True, False, True]])
    low, _ = group_advantages(np.array([[1.0, 0.0, -5.0, 2.0]]), counted, normalise_std=False)
    assert low.tolist() == [[0.0, -1.0, -6.0, 1.0]]
    scaled, stats = group_advantages(np.array([[1.0, 0.0, -5.0, 2.0]]), counted, normalise_std=True)
    np.testing.assert_allclose(scaled, low / np.sqrt(2 / 3), rtol=1e-6)
    assert stats["groups/std"] == pytest.approx(np.sqrt(2 / 3))


@pytest.mark.parametrize("broken", [0.0, 9.0, np.nan, np.inf])
def test_faults_count_nowhere_and_get_zero_whatever_their_reward(broken):
    rewards, fault = np.array([[1.0, 0.0, broken, 2.0]]), np.array([[False, False, True, False]])
    advantages, stats = group_advantages(rewards, EVERY, normalise_std=False, fault=fault)
    assert advantages.tolist() == [[0.0, -1.0, 0.0, 1.0]] and stats["groups/std"] == pytest.approx(np.sqrt(2 / 3))


def test_a_reward_that_is_not_finite_never_poisons_its_group():
    advantages, _ = group_advantages(np.array([[1.0, 0.0, np.nan, 2.0]]), EVERY, normalise_std=False)
    assert advantages.tolist() == [[0.0, -1.0, 0.0, 1.0]]


def test_groups_without_spread_give_zeros_and_are_counted():
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    counted = np.array([[True] * 4, [True] * 4, [True] + [False] * 3, [False] * 4])
    advantages, stats = group_advantages(rewards, counted, normalise_std=True)
    assert advantages.tolist() == [[0.0] * 4, [1.0, -1.0, 1.0, -1.0], [0.0] * 4, [0.0] * 4]
    assert stats["groups/flat"] == 0.75


def test_a_spread_of_no_more_than_eps_is_none():
    rewards = np.array([[0.0, 0.5], [0.0, 0.5 + 2**-20]])  # deviations of a quarter, and a little more
    advantages, stats = group_advantages(rewards, np.ones((2, 2), bool), normalise_std=True, eps=0.25)
    assert advantages.tolist() == [[0.0, 0.0], [-1.0, 1.0]] and stats["groups/flat"] == 0.5
    small = np.array([[0.0, 1e-5], [0.0, 1e-7]])
    assert group_advantages(small, np.ones((2, 2), bool), normalise_std=True)[0].tolist() == [[-1.0, 1.0], [0.0, 0.0]]
