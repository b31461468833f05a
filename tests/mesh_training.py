"""Run by test_mesh_training.py on eight simulated devices: `python mesh_training.py FOLDER`, one JSON object on standard output.

One update of a random model on several meshes: how far loss, gradients and parameters are from one device's, what every
device holds, what the compiled gradient exchanges, what a checkpoint restores elsewhere; then the main job on four devices.
"""

import contextlib
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config
from flax import nnx

from imagent_jax import train as job
from imagent_jax.config import Config
from imagent_jax.distributed.mesh import make_mesh
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model import attention as seam
from imagent_jax.model import lora
from imagent_jax.model.attention import Causal, Shared, attention
from imagent_jax.model.families import read_config
from imagent_jax.model.features import EncodedImages, FeatureStore, Pages
from imagent_jax.model.sharding import LOGICAL_TO_MESH, shardings
from imagent_jax.model.vlm import abstract
from imagent_jax.rl.batch import GroupBatch, place_groups, take_groups
from imagent_jax.rl.learner import Learner, LossSettings, accumulate, group_normalisers, shown_in
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.runs.folder import RunFolder
from imagent_jax.types import TokenKind

MESHES = [(1, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
N, G, P, R, V = 16, 2, 16, 16, 1024
RATE = 1e-3
LARGE = 64 * 1024  # bytes: no parameter above this is whole on every device of `fsdp`
HF = {
    "model_type": "qwen2_vl", "image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3,
    "text_config": {
        "vocab_size": V, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 8, "rope_parameters": {"mrope_section": [2, 1, 1], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 8, "mlp_ratio": 2, "patch_size": 4},
}  # fmt: skip
JOB = [
    "--run.compile_cache=", "--run.steps=2", "--rollout.groups=4", "--rollout.group_size=2", "--rollout.response_tokens=96",
    "--grpo.micro_groups=4", "--grpo.minibatches=1", "--grpo.length_buckets=2", "--images.pack_blocks=4", "--images.pages=2",
    "--eval.tasks=4", "--eval.groups=4", "--eval.every=0", "--data.train_size=64", "--data.test_size=32",
]  # fmt: skip
IMAGES, PATCHES = 8, 16  # one image a block of 16 patches, 4 features each


def settings(folder: str, everything: bool = False, rank: int = 0) -> Config:
    """Two micro-batches an update; with `everything` the tower learns too, and a reference holds the policy back; with a
    `rank`, adapters learn and nothing else."""
    return tiny_config({
        "run": {"dir": folder, "name": "mesh", "compile_cache": ""},
        "model": {"freeze_vision": not everything, "logprob_chunk": 12},
        "lora": {"rank": rank, "merger": False},
        "rollout": {"groups": N, "group_size": G, "prompt_tokens": P, "response_tokens": R},
        "grpo": {"micro_groups": N // 2, "minibatches": 1, "length_buckets": 2, "kl": 0.1 * everything},
        "optim": {"warmup_steps": 0, "schedule": "constant", "learning_rate": RATE, "weight_decay": 0.1},
    })  # fmt: skip


def random_batch() -> GroupBatch:
    """N groups of different lengths; prompts begin with an image of four features, some responses show one."""
    rng = np.random.default_rng(0)
    prompt_len, length = rng.integers(8, P + 1, N).astype(np.int32), rng.integers(1, R + 1, (N, G)).astype(np.int32)
    length[:, 0] = R
    prompt_vision, response_vision = np.full((N, P), -1, np.int32), np.full((N, G, R), -1, np.int32)
    prompt_vision[:, 1:5] = np.arange(4) + 4 * rng.integers(0, IMAGES, (N, 1))
    response_vision[::2, 0, 6:10] = np.arange(4) + 4 * rng.integers(0, IMAGES, (N // 2, 1))
    kind = rng.choice([TokenKind.TEXT, TokenKind.TOOL_CALL, TokenKind.OBSERVATION], (N, G, R)).astype(np.uint8)
    kind[np.arange(R) >= length[..., None]] = TokenKind.PAD
    rewards = rng.normal(size=(N, G)).astype(np.float32)
    return GroupBatch(
        prompt_ids=rng.integers(4, V, (N, P)).astype(np.int32),
        prompt_positions=np.broadcast_to(np.arange(P, dtype=np.int32), (3, N, P)).copy(),
        prompt_len=prompt_len,
        prompt_vision=prompt_vision,
        response_ids=rng.integers(4, V, (N, G, R)).astype(np.int32),
        response_positions=np.broadcast_to(prompt_len[:, None, None] + np.arange(R, dtype=np.int32), (3, N, G, R)).copy(),
        response_len=length,
        response_vision=response_vision,
        kind=kind,
        logprobs=rng.normal(-np.log(V), 0.1, (N, G, R)).astype(np.float32),
        end=np.zeros((N, G), np.uint8),
        rewards=rewards,
        advantages=rewards - rewards.mean(1, keepdims=True),
    )


class Case:
    """Model, learner and batch on a mesh (None: no mesh at all)."""

    def __init__(self, cfg: Config, sizes: tuple[int, int, int] | None):
        self.mesh = None if sizes is None else make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        self.cfg, self.batch = cfg, random_batch()
        self.model, shapes = abstract(read_config(HF), vision_block=PATCHES, logprob_chunk=cfg.model.logprob_chunk)
        rng = np.random.default_rng(2)
        params = jax.tree.map(lambda x: rng.normal(0.1, x.shape[-1] ** -0.5, x.shape).astype(x.dtype), shapes)
        params = jax.tree.map(jnp.asarray, params)
        if rank := cfg.lora.rank:
            self.model, params = lora.attach(self.model, params, replace(cfg.lora, alpha=float(rank)))
            adapters, base = nnx.split_state(params, nnx.LoRAParam, ...)  # fresh, half of their gradients are zero
            params = nnx.merge_state(jax.tree.map(lambda x: x + 0.1, adapters), base)
        self.params = jax.device_put(params, None if self.mesh is None else shardings(params, self.mesh))
        tables = mask_tables(cfg.mask)
        reference = self.params if cfg.grpo.kl else None
        self.learner = Learner(self.model, cfg, make_optimizer(cfg.optim, 10), tables, reference)
        self.learner.shapes, self.learner.warm = [(R, N // 2)], True  # one shape to compile
        with self:
            self.opt_state = self.learner.init(self.params)

    def __enter__(self) -> None:
        self._current = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        self._current.__enter__()

    def __exit__(self, *error) -> None:
        self._current.__exit__(*error)

    def store(self) -> EncodedImages:
        """Encoded images, two on a page; for a tower that does not learn, any features will do."""
        rng = np.random.default_rng(1)
        if self.cfg.model.freeze_vision:
            features = rng.normal(size=(IMAGES // 2, 8, 64)).astype(np.float32)
            return EncodedImages(self.model, Pages(IMAGES, lambda page: jnp.asarray(features[page])), 8)
        store = FeatureStore(self.model, self.params, 2, pages=1)
        patches = rng.integers(0, 256, (IMAGES, PATCHES, self.model.cfg.vision.patch_bytes), np.uint8)
        store.add([PreparedImage(p, (4, 4), (16, 16)) for p in patches])
        return store

    def update(self) -> dict[str, float]:
        self.params, self.opt_state, metrics = self.learner.update(self.params, self.opt_state, self.batch, self.store())
        return metrics

    def gradient(self):
        """Of the whole batch; as `Learner.update` computes it, with no update."""
        parts = [take_groups(self.batch, index, R) for index in np.arange(N).reshape(2, -1)]
        weight = np.sum(group_normalisers(self.cfg.grpo, self.batch, self.learner.tables))
        kl = self.learner._score(self.params, parts[0], self.store()) if self.cfg.grpo.kl else None
        parts = [(part, kl, None) for part in parts]
        return host(self.learner._gradient(self.params, parts, self.store(), weight, fresh=True)[0])

    def exchanged(self) -> dict[str, list[int]]:
        """Elements of every collective's result in the compiled gradient of a micro-batch, by kind."""
        learner = self.learner
        trained, frozen = learner.split(self.params)
        part = take_groups(self.batch, np.arange(N // 2), R)
        total, shown = jax.tree.map(jnp.zeros_like, trained), shown_in(self.store(), part)
        text = accumulate.lower(
            self.model, LossSettings.of(self.cfg), False, trained, frozen, total, shown, place_groups(part), learner.tables,
            np.float32(1), None, None,
        ).compile().as_text()  # fmt: skip
        found: dict[str, list[int]] = {}
        kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
        for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):  # a result is an array or a tuple of arrays
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
            found.setdefault(kind, []).extend(sizes)
        return found


def host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def moved_apart(a: "Case", b: "Case", gradient) -> float:
    """Largest difference of two models' parameters, where the gradient is large enough for Adam's first steps to be sure of its
    sign: near zero, rounding turns the sign, and a step is the sign times the rate."""
    (trained, frozen), (others, fixed) = (case.learner.split(case.params) for case in (a, b))
    assert all(map(np.array_equal, host(frozen), host(fixed)))
    sure = [np.abs(g) > 1e-4 * np.abs(g).max() for g in gradient]
    assert np.mean([s.mean() for s in sure]) > 0.5
    return max(float(np.abs(x - y)[s].max()) for x, y, s in zip(host(trained), host(others), sure, strict=True))


def furthest(a, b) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def whole_over_fsdp(case: Case) -> list[str]:
    """Parameters and moments above LARGE of which a device holds more than its part."""
    found = []
    tree = {"params": case.params, "moments": case.opt_state}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "get_metadata")):
        if not hasattr(leaf, "get_metadata"):
            continue
        value, axes = leaf.get_value(), [LOGICAL_TO_MESH[axis] for axis in leaf.get_metadata()["logical_axes"]]
        parts = math.prod(case.mesh.shape[axis] for axis in axes if axis)
        held = max(shard.data.size for shard in value.addressable_shards)
        if value.nbytes > LARGE and ("fsdp" not in axes or held * parts != value.size):
            found.append(jax.tree_util.keystr(path))
    return found


def updates(cfg: Config, meshes) -> dict:
    """Every mesh beside no mesh at all. A mesh of one device is a mesh, and gives the same bits."""
    plain = Case(cfg, None)
    gradient = plain.gradient()
    metrics, report = plain.update(), []
    for sizes in meshes:
        case = Case(cfg, sizes)
        with case:
            found = {"mesh": sizes, "gradient": furthest(case.gradient(), gradient)}
            ours = case.update()
            found |= {
                "loss": abs(ours["loss"] - metrics["loss"]),
                "norm": abs(ours["grad_norm"] / metrics["grad_norm"] - 1),
                "params": moved_apart(case, plain, gradient),
                "whole": whole_over_fsdp(case),
            }
            if cfg.model.freeze_vision and not cfg.lora.rank and sizes in ((1, 8, 1), (2, 2, 2)):
                found["exchanged"] = case.exchanged()
        report.append(found)
    sizes = [leaf.size for leaf in jax.tree.leaves(plain.learner.split(plain.params)[0])]
    return {"largest": max(float(np.abs(g).max()) for g in gradient), "elements": sum(sizes), "meshes": report}


def resumes(cfg: Config) -> list[dict]:
    """A checkpoint of eight devices continued on eight, four and one, beside the run that never stopped."""
    whole, folder = Case(cfg, (1, 8, 1)), RunFolder(cfg)
    with whole:
        gradient = whole.gradient()
        whole.update()
        folder.save(1, whole.learner.split(whole.params)[0], whole.opt_state, {"step": 1})
        saved = host((whole.learner.split(whole.params)[0], whole.opt_state))
        whole.update()
    report = []
    for devices in (8, 4, 1):
        case = Case(cfg, (1, devices, 1))
        with case:
            trained, frozen = case.learner.split(case.params)
            like = trained, case.opt_state
            restored = folder.restore(*like)[:2]
            moved = [a.sharding != b.sharding for a, b in zip(*map(jax.tree.leaves, (like, restored)), strict=True)]
            found = {"devices": devices, "restored": furthest(host(restored), saved), "moved": sum(moved)}
            case.params, case.opt_state = nnx.merge_state(restored[0], frozen), restored[1]
            case.update()
            report.append(found | {"continued": moved_apart(case, whole, gradient)})
    folder.close()
    return report


def kernels() -> dict[str, float]:
    """Kernels on (2, 2, 2), groups and heads apart, beside the oracle on one device: output and gradients."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(4, 2, 8, 4, 16), *[(4, 2, 8, 2, 16)] * 2, *[(4, 12, 2, 16)] * 2]
    inputs = [np.asarray(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes, strict=True)]
    length, prompt_len = np.arange(8).reshape(4, 2) + 1, np.asarray([12, 4, 7, 1])

    def run(backend):
        def value(q, k, v, pk, pv):
            out = attention(q, k, v, Causal(length), Shared(pk, pv, prompt_len), backend)
            return jnp.sum(jnp.sin(out)), out

        return host(jax.jit(jax.grad(value, range(5), has_aux=True))(*inputs))

    seam._BACKENDS["cudnn"] = partial(seam._cudnn, implementation="xla")
    oracle = run("xla")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        return {backend: furthest(run(backend), oracle) for backend in ("xla", "cudnn", "splash_interpret")}


def main(folder: str) -> dict:
    cfg = settings(folder)
    report = {"devices": jax.device_count(), "kernels": kernels()}
    report["frozen"] = updates(cfg, MESHES)
    report["everything"] = updates(settings(folder, everything=True), [(2, 2, 2)])
    report["adapters"] = updates(settings(folder, rank=4), [(1, 4, 2)])
    report["resumes"] = resumes(cfg)
    report["job"] = job.main([*JOB, f"--run.dir={folder}", "--run.name=four", "--mesh.fsdp=2", "--mesh.tensor=2"])
    return report


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        report = main(sys.argv[1])
    print(json.dumps(report))
