"""The splash backend compiles for TPU v5e and v5p, forward and backward, at realistic widths; no TPU is needed.

PyPI's `libtpu` compiles ahead of time on any x86 Linux machine; where it is not installed, these tests skip.
"""

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from imagent_jax.model.attention import Causal, Packed, Shared, attention

pytestmark = [
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'imagent-jax[test]'"),
    pytest.mark.slow(3),
]
INT = jnp.int32


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1"])
def device(request):
    """A TPU that is only described."""
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles here: no device to lock
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for a TPU cannot be read back without one
    yield topologies.get_topology_desc(request.param, "tpu").devices[0]
    jax.config.update("jax_enable_compilation_cache", True)


def responses(q, k, v, prompt_k, prompt_v, prompt_len, length):
    return attention(q, k, v, Causal(length), Shared(prompt_k, prompt_v, prompt_len), "splash")


def prompts(q, k, v, length):
    return attention(q, k, v, Causal(length), backend="splash")


def vision(q, k, v, ids):
    return attention(q, k, v, Packed(ids), backend="splash")


CASES = {  # function, differentiated arguments, shapes; Qwen2-VL's head widths: 128 in the decoder, 80 in the tower
    "responses": (responses, 5, [(1, 4, 512, 4, 128), *[(1, 4, 512, 2, 128)] * 2, *[(1, 640, 2, 128)] * 2], [(1,), (1, 4)]),
    "prompts": (prompts, 3, [(2, 1024, 4, 128), *[(2, 1024, 2, 128)] * 2], [(2,)]),
    "vision": (vision, 3, [(2, 1200, 4, 80)] * 3, [(2, 1200)]),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_compiles_forward_and_backward(device, name):
    function, n, floats, ints = CASES[name]

    def with_gradient(*args):
        out, pull = jax.vjp(lambda *x: function(*x, *args[n:]), *args[:n])
        return out, pull(jnp.ones_like(out))

    shapes = [(s, jnp.bfloat16) for s in floats] + [(s, INT) for s in ints]
    args = [jax.ShapeDtypeStruct(s, d, sharding=SingleDeviceSharding(device)) for s, d in shapes]
    compiled = jax.jit(with_gradient).lower(*args).compile()
    kernels = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(kernels) == 3, "one kernel forward, two backward (dq; dk and dv)"
