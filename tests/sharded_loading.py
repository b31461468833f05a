"""Run by test_sharding.py on simulated devices: `python sharded_loading.py CHECKPOINT`, one JSON object on standard output.

Loads the checkpoint whole and over several meshes; saves the logits after the prompts of CHECKPOINT/prompts.npz beside it, and
reports the largest share of a parameter that any device holds, and how often a slice of one is read.
"""

import json
import sys
from collections import Counter

import jax
import numpy as np

from imagent_jax.distributed.mesh import make_mesh
from imagent_jax.model import checkpoint
from imagent_jax.model.sharding import LOGICAL_TO_MESH
from imagent_jax.model.vlm import at_tokens, encode_images, prefill

MESHES = [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": -1}]


def logits(model, params, prompts):
    """Logits after the last token of every prompt."""

    @jax.jit
    def forward(params):
        features = encode_images(model, params, prompts["patches"], prompts["coords"], prompts["image_id"])
        shown = at_tokens(features, prompts["vision"])
        return prefill(model, params, *(prompts[name] for name in ("ids", "positions", "vision", "length")), shown)[0]

    return np.asarray(forward(params))


def main(folder: str) -> None:
    prompts = dict(np.load(f"{folder}/prompts.npz"))
    block = int(prompts.pop("block"))
    found = [logits(*checkpoint.load(folder, vision_block=block), prompts)]
    report, reads, read = [], Counter(), checkpoint._read
    checkpoint._ROWS = 16  # so that a slice takes several copies

    def counted(key, *args):
        reads[key] += 1
        return read(key, *args)

    checkpoint._read = counted
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        reads.clear()
        policy = checkpoint.from_pretrained(folder, mesh=mesh, dtype="float32", progress=False)
        model, params = policy.split(vision_block=block)
        shares = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "get_metadata")):
            value, axes = leaf.get_value(), [LOGICAL_TO_MESH[axis] for axis in leaf.get_metadata()["logical_axes"]]
            assert {shard.device for shard in value.addressable_shards} == set(mesh.devices.flat)
            held = max(shard.data.size for shard in value.addressable_shards) / value.size
            split = np.prod([mesh.shape[axis] for axis in axes if axis])
            shares[".".join(str(part.key) for part in path)] = [
                value.ndim - ("layers" in leaf.get_metadata()["logical_axes"]), held, split,
            ]  # fmt: skip
        found.append(logits(model, params, prompts))
        checkpoint.save_pretrained(policy, f"{folder}-{len(report)}")
        report.append({"mesh": dict(mesh.shape), "shares": shares, "reads": dict(reads)})
    np.save(f"{folder}/logits.npy", found)
    meshes = [dict(make_mesh(**sizes).shape) for sizes in ({"data": -1, "tensor": 2}, {"data": 2, "tensor": -1}, {"tensor": 2})]
    print(json.dumps({"devices": jax.device_count(), "meshes": report, "shapes": meshes}, default=float))


if __name__ == "__main__":
    main(sys.argv[1])
