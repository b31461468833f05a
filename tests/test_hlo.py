"""Counting in compiled and traced programs: collectives, matrix products, pairs of query and key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax.model.splash import _GroupMask
from imagent_jax.planner.hlo import Collective, collectives, kernel_pairs, matrix_flops

TEXT = """HloModule step

%cond (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %constant.3), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[4,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %r = (f32[16]{0}, f32[16]{0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%start (p: f32[4]) -> f32[8] {
  %s = f32[8]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%done (p: f32[4]) -> f32[8] {
  %s2 = f32[8]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %f = f32[8] fusion(%x), kind=kCustom, calls=%start
  %f2 = f32[8] fusion(%x), kind=kCustom, calls=%done
  %c = (u32[64]{0}, u32[64]{0}) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %alone = f32[8] all-reduce(%x), channel_id=5, replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_exchanges_are_counted_as_often_as_their_loop_runs_and_once_a_channel():
    assert collectives(TEXT) == [
        Collective("all-gather", 4, 28, 28 * 4 * 128 * 2),
        Collective("all-reduce", 2, 28, 28 * 2 * 16 * 4),
        Collective("collective-permute", 2, 1, 64 * 4),
        Collective("reduce-scatter", 4, 1, 4 * 8 * 4),
    ]
    assert [Collective(kind, 4, 1, 100).wire for kind in ("all-gather", "all-reduce", "collective-permute")] == [
        75,
        150,
        100,
    ]


def test_products_are_counted_in_loops_and_branches_and_once_in_loops_of_unknown_length():
    def program(x, w, n):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        x = jax.lax.cond(n > 3, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x)
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w[2]), (0, x))[1]

    jaxpr = jax.jit(program).trace(jnp.zeros((2, 8)), jnp.zeros((5, 8, 8)), 4).jaxpr.jaxpr
    assert matrix_flops(jaxpr, kernel_pairs(1, False)) == (5 + 2 + 1) * 2 * 2 * 8 * 8


def test_pairs_of_query_and_key_in_a_kernel():
    s, p, g = 6, 4, 3
    assert kernel_pairs(g, False)(g * s, p + g * s) == _GroupMask(p, g, s)[slice(0, g * s), slice(0, p + g * s)].sum()
    assert kernel_pairs(g, False)(s, s) == np.tril(np.ones((s, s))).sum() and kernel_pairs(g, True)(s, s) == s * s


@pytest.mark.parametrize(("p", "g", "s"), [(0, 1, 8), (8, 3, 8), (16, 2, 24), (5, 3, 7), (8, 4, 4)])
def test_blocks_of_the_group_mask_are_those_of_the_whole_mask(p, g, s):
    q, k = np.arange(g * s)[:, None], np.arange(p + g * s)[None, :] - p
    whole, mask = (k < 0) | ((q // s == k // s) & (q >= k)), _GroupMask(p, g, s)
    for block in (1, 3, 4, 8):
        for i in range(0, g * s, block):
            for j in range(0, p + g * s, block):
                index = slice(i, i + block), slice(j, j + block)
                assert (mask[index] == whole[index]).all(), index
