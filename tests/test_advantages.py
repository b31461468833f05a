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
    np.testing.assert_allclose(scaled, [[0.0, -np.sqrt(1.5), -np.sqrt(3), np.sqrt(1.5)]], rtol=1e-6)  # -6 / std is bounded
    assert stats["groups/std"] == pytest.approx(np.sqrt(2 / 3))


@pytest.mark.parametrize("broken", [0.0, 9.0, np.nan, np.inf])
def test_faults_count_nowhere_and_get_zero_whatever_their_reward(broken):
    rewards, fault = np.array([[1.0, 0.0, broken, 2.0]]), np.array([[False, False, True, False]])
    advantages, stats = group_advantages(rewards, EVERY, normalise_std=False, fault=fault)
    assert advantages.tolist() == [[0.0, -1.0, 0.0, 1.0]] and stats["groups/std"] == pytest.approx(np.sqrt(2 / 3))


@pytest.mark.parametrize("reward", [np.nan, -np.inf, 1e300, -1e39])
def test_a_reward_that_is_not_finite_in_float32_never_poisons_its_group(reward):
    advantages, _ = group_advantages(np.array([[1.0, 0.0, reward, 2.0]]), EVERY, normalise_std=False)
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


def test_an_uncounted_rollout_gets_no_larger_advantage_than_a_counted_one_can_have():
    close = np.array([[1.1, 1.1001, 1.1, 0.0], [1.1, 1.1001, 1.1, 9.0]])
    counted = np.array([[True, True, True, False]] * 2)
    advantages, _ = group_advantages(close, counted, normalise_std=True)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(advantages, [[-half, 2 * half, -half, s * np.sqrt(3)] for s in (-1, 1)], rtol=1e-5)
    plain, _ = group_advantages(close, counted, normalise_std=False)
    np.testing.assert_allclose(plain[:, 3], [-1.1, 7.9], rtol=1e-4)


@pytest.mark.parametrize("group_size", [2, 3, 8, 64])
def test_the_bound_is_reached_by_one_rollout_that_differs_and_changes_no_counted_advantage(group_size):
    rewards = np.zeros((1, group_size))
    rewards[0, 0] = 1.0
    advantages, _ = group_advantages(rewards, np.ones((1, group_size), bool), normalise_std=True)
    assert advantages[0, 0] == pytest.approx(np.sqrt(group_size - 1), rel=1e-6)
    random = np.random.default_rng(group_size).normal(size=(50, group_size))
    advantages, _ = group_advantages(random, np.ones(random.shape, bool), normalise_std=True)
    expected = (random - random.mean(1, keepdims=True)) / random.std(1, keepdims=True)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.9, 1 / 3, 0.1 + 0.2, 1.1, -0.7, 0.0, 1e-12, 1e10 / 3, 1e15 / 7])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero_whatever_their_value(value, group_size, normalise_std, dtype):
    rewards = np.full((1, group_size), value, dtype)
    advantages, stats = group_advantages(rewards, np.ones((1, group_size), bool), normalise_std=normalise_std, eps=0.0)
    assert advantages.tolist() == [[0.0] * group_size] and stats == {"groups/flat": 1.0, "groups/std": 0.0}
