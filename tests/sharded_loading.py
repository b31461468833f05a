"""Run by test_sharding.py on simulated devices: `python sharded_loading.py CHECKPOINT`, one JSON object on standard output.

Loads the checkpoint whole and over several meshes; reports the largest share of a parameter that any device holds, and the
largest difference of the logits after a prompt with two images.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from imagent_jax.model import checkpoint
from imagent_jax.model.qwen2_vl import Qwen2VL, encode_images, prefill
from imagent_jax.model.sharding import LOGICAL_TO_MESH, make_mesh

MESHES = [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": -1}]


def logits(model, params):
    """Logits of 3 prompts of 40 ids that begin with two images of 16 and 36 patches."""
    rng = np.random.default_rng(0)
    sizes = [(4, 4), (6, 6)]
    image = np.full(100, -1)
    image[:52] = np.repeat([0, 1], [h * w for h, w in sizes])
    coords = np.zeros((100, 2), int)
    coords[:52] = np.concatenate([np.indices(size).reshape(2, -1).T for size in sizes])
    patches = rng.integers(0, 256, (100, model.cfg.vision.patch_bytes), np.uint8)
    ids, shown = rng.integers(0, 100, (3, 40)), np.full((3, 40), -1)
    shown[:, :13] = np.arange(13)
    positions = np.broadcast_to(np.arange(40), (3, 3, 40))

    @jax.jit
    def forward(params):
        features = encode_images(model, params, patches, coords, image)
        return prefill(model, params, ids, positions, shown, jnp.array([40, 30, 20]), features)[0]

    return np.asarray(forward(params))


def main(folder: str) -> None:
    whole = logits(*checkpoint.load(folder, vision_block=100))
    report = []
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        policy = Qwen2VL.from_pretrained(folder, mesh=mesh, dtype="float32", progress=False)
        model, params = policy.split(vision_block=100)
        shares = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "get_metadata")):
            value, axes = leaf.get_value(), [LOGICAL_TO_MESH[axis] for axis in leaf.get_metadata()["logical_axes"]]
            assert {shard.device for shard in value.addressable_shards} == set(mesh.devices.flat)
            held = max(shard.data.size for shard in value.addressable_shards) / value.size
            split = np.prod([mesh.shape[axis] for axis in axes if axis])
            shares[jax.tree_util.keystr(path)] = [value.ndim - ("layers" in leaf.get_metadata()["logical_axes"]), held, split]
        difference = float(np.abs(logits(model, params) - whole).max())
        policy.save_pretrained(f"{folder}-{len(report)}")
        report.append({"mesh": dict(mesh.shape), "difference": difference, "shares": shares})
    print(json.dumps({"devices": jax.device_count(), "spread": float(whole.std()), "meshes": report}, default=float))


if __name__ == "__main__":
    main(sys.argv[1])
