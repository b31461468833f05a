"""Builds the tiny base: `python -m imagent_jax.tiny [--out FOLDER] [--vision-steps N] [--text-steps N] [--seed 0]`.

Trains a sentencepiece tokenizer and a small Qwen2-VL on the corpus of `imagent_jax.tiny.corpus`: locating, reading,
answering, looking, calling with arbitrary arguments and guessing. No question is paired with the call that solves it.
Stage 1 trains the vision tower alone (`tiny/vision.py`), stage 2 trains the decoder on the corpus. A model already in the
folder is trained further (0 and 0 steps only evaluate it). `built.json` lists the commands that built the model and its skills
on the held-out split.
"""

import argparse
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagent_jax.chat import QWEN
from imagent_jax.images.prepare import pack_images
from imagent_jax.model import checkpoint
from imagent_jax.model.families import read_config
from imagent_jax.model.interleave import encode_parts, pad_prompts
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import at_tokens, create, encode_images, response_logprobs
from imagent_jax.tiny.skills import measure
from imagent_jax.types import Markup

BLOCK = 144
PATCH_BYTES = 3 * 14 * 14
FIRST = 0.15
"""Fraction of the text steps trained on `FIRST_FORMS`."""


class Shape(NamedTuple):
    """A compiled batch: N groups of G responses, P prompt and R response tokens, and vision blocks (doubled if they overflow)."""

    groups: int
    size: int
    prompt: int
    width: int
    blocks: int


SHAPES = {
    "crop": (Shape(64, 1, 72, 16, 22),),
    "thumbnail": (Shape(48, 3, 64, 24, 10),),
    "thumbnails": (Shape(20, 8, 104, 40, 17),),
    "crops": (Shape(16, 8, 128, 48, 20),),
    "calls": (Shape(16, 4, 104, 96, 44), Shape(12, 4, 104, 144, 44), Shape(8, 4, 104, 256, 44)),
}
"""Batch shapes by form of group, narrowest first."""
TOOL_SHAPES = {
    "crop": (Shape(64, 1, 92, 16, 22),),
    "thumbnail": (Shape(48, 3, 88, 24, 14),),
    "print": (Shape(64, 1, 88, 20, 18),),
    "page": (Shape(32, 1, 116, 24, 34),),
    "crops": (Shape(16, 8, 144, 32, 26), Shape(16, 8, 144, 40, 26)),
    "thumbnails": (Shape(20, 8, 128, 32, 22),),
    "prints": (Shape(20, 8, 120, 24, 18), Shape(20, 8, 120, 32, 18)),
    "calls": (Shape(16, 4, 132, 104, 48), Shape(14, 4, 132, 128, 48), Shape(12, 4, 132, 152, 48), Shape(8, 4, 132, 304, 48)),
    "programs": (Shape(16, 4, 120, 88, 44), Shape(14, 4, 120, 124, 44), Shape(12, 4, 120, 152, 44)),
    "pages": (Shape(12, 4, 120, 104, 64),),
    "told": (Shape(16, 8, 72, 80, 1), Shape(12, 8, 72, 128, 1)),
    "searches": (Shape(16, 4, 120, 112, 14), Shape(12, 4, 120, 168, 12), Shape(12, 4, 120, 184, 12)),
}
"""The same for the base of the tool worlds."""


def ids_of_ends(processor: Processor) -> tuple[int, int]:
    """Return the token ids of end of text and end of turn."""
    (end_of_text,), (turn_close,) = processor.encode(QWEN.end_of_text), processor.encode(QWEN.turn_close)
    return end_of_text, turn_close


def architecture(processor: Processor, vocab_size: int) -> dict:
    """Return the tiny base's `config.json`, a real Qwen2-VL configuration."""
    end_of_text, turn_close = ids_of_ends(processor)
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": processor.vision_start_id,
        "vision_end_token_id": processor.vision_end_id,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen2_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": end_of_text,
            "eos_token_id": turn_close,
            "pad_token_id": end_of_text,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": 3,
            "embed_dim": 128,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
        },
    }


# ---- data ---------------------------------------------------------------------------------------------------------


def encode_group(group, processor: Processor):
    """Encode a `PretrainGroup`: the encoded prompt and its responses, lists of (Encoded, trained)."""

    def prepare(image):
        return processor.prepare(image.pixels, min_pixels=image.min_pixels, max_pixels=image.max_pixels)

    def interleave(text: str, images):
        pieces = [Markup(piece) for piece in text.split("<image>")]
        assert len(pieces) == len(images) + 1, text
        parts = [pieces[0]]
        for image, piece in zip(images, pieces[1:], strict=True):
            parts += [prepare(image), piece]
        return parts

    prompt = encode_parts(interleave(group.prompt, group.images), processor)
    responses = []
    for segments in group.responses:
        encoded, start = [], prompt.next_position
        for segment in segments:
            one = encode_parts(interleave(segment.text, segment.images), processor, start)
            encoded.append((one, segment.trained))
            start = one.next_position
        responses.append(encoded)
    return prompt, responses


def collate(groups, shape: Shape, merge: int):
    """Return the arrays of a batch: prompts [N P], responses [N G R], `trained` bool [N G R], and one pack of all images."""
    n, size, width = len(groups), shape.size, shape.width
    images = [
        image
        for prompt, responses in groups
        for image in [*prompt.images, *(i for response in responses for one, _ in response for i in one.images)]
    ]
    from imagent_jax.tiny.vision import in_blocks

    blocks = in_blocks(images, BLOCK)
    count = shape.blocks * (1 if len(blocks) <= shape.blocks else 2)
    *pack, first_rows = pack_images(blocks, BLOCK, count, merge=merge, patch_bytes=PATCH_BYTES)
    first = iter([row // merge**2 for row in first_rows])
    vision, out = (
        [],
        {
            "response_ids": np.zeros((n, size, width), np.int32),
            "response_positions": np.zeros((3, n, size, width), np.int32),
            "response_vision": np.full((n, size, width), -1, np.int32),
            "trained": np.zeros((n, size, width), bool),
        },
    )
    for i, (prompt, responses) in enumerate(groups):
        vision.append(prompt.vision([next(first) for _ in prompt.images]))
        for j, response in enumerate(responses):
            at = 0
            for one, trained in response:
                end = at + len(one.ids)
                out["response_ids"][i, j, at:end] = one.ids
                out["response_positions"][:, i, j, at:end] = one.positions
                out["response_vision"][i, j, at:end] = one.vision([next(first) for _ in one.images])
                out["trained"][i, j, at:end] = trained
                at = end
    prompts = [prompt for prompt, _ in groups]
    out["prompt_ids"], out["prompt_positions"], out["prompt_vision"] = pad_prompts(prompts, vision, shape.prompt)
    out["prompt_len"] = np.asarray([len(prompt.ids) for prompt in prompts], np.int32)
    return out, tuple(pack)


def produce(folder: str, seed: int, vision_steps: int, crowded: int, text_steps: int, out) -> None:
    """Worker process: produce one item per step, packs for the tower first, then text batches. Deterministic in its arguments."""
    from imagent_jax.tiny.corpus import FIRST_FORMS, FORMS, make_group
    from imagent_jax.tiny.vision import labelled_pack

    processor, rng = Processor.from_pretrained(folder), np.random.default_rng(seed)
    for _ in range(vision_steps):
        out.put(labelled_pack(rng, processor, BLOCK, crowded))
    waiting = {shape: [] for shapes in SHAPES.values() for shape in shapes}
    done = 0
    while done < text_steps:
        forms = FIRST_FORMS if done < FIRST * text_steps else FORMS
        form = str(rng.choice(list(forms), p=list(forms.values())))
        prompt, responses = encode_group(make_group(rng, SHAPES[form][0].size, form), processor)
        longest = max(sum(len(one.ids) for one, _ in response) for response in responses)
        shape = next((s for s in SHAPES[form] if s.width >= longest and s.prompt >= len(prompt.ids)), None)
        if shape is None:
            continue
        waiting[shape].append((prompt, responses))
        if len(waiting[shape]) == shape.groups:
            out.put(collate(waiting[shape], shape, processor.merge_size))
            waiting[shape] = []
            done += 1


# ---- training -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def train_step(model, optimizer, params, text, opt_state, batch, pack):
    """Update the decoder, `text`, by next-token prediction on the trained tokens; return the mean loss (nats per token).

    The vision tower is frozen, because Adam would degrade it on gradients that are mostly noise.
    """
    features = encode_images(model, params, *pack)

    def loss(text):
        arrays = {k: v for k, v in batch.items() if k != "trained"}
        whole = nnx.State({**params, "text": text})
        prompt, response = (at_tokens(features, arrays[f"{stream}_vision"]) for stream in ("prompt", "response"))
        logprobs, _ = response_logprobs(model, whole, shown=(prompt, response), **arrays)
        return -jnp.sum(jnp.where(batch["trained"], logprobs, 0.0)) / jnp.sum(batch["trained"])

    value, gradients = jax.value_and_grad(loss)(text)
    updates, opt_state = optimizer.update(gradients, opt_state, text)
    return optax.apply_updates(text, updates), opt_state, {"loss": value}


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Return 100 steps of warm-up (fewer if `steps` is smaller), then a cosine to 2 % of `rate`."""
    steps = max(steps, 1)
    return optax.warmup_cosine_decay_schedule(0.0, rate, min(100, steps - 1), steps, 0.02 * rate)


def muon(rate: float, steps: int) -> optax.GradientTransformation:
    """Return Muon (Jordan 2024, scaled as in arXiv 2502.16982) for the layers' matrices and AdamW for all other parameters.

    Matrices are stacked [L, in, out] or single [in, out]. Muon needs about half as many updates as AdamW.
    """

    def dimensions(params):
        def one(path, value):
            names = {getattr(key, "key", None) for key in path}
            matrix = value.ndim == (3 if names & {"layers", "blocks"} else 2)
            if matrix and names & {"layers", "blocks", "merge_fc1", "merge_fc2"}:
                return optax.contrib.MuonDimensionNumbers(value.ndim - 2, value.ndim - 1)
            return None

        return jax.tree_util.tree_map_with_path(one, params)

    scaled = optax.contrib.muon(
        schedule(rate, steps),
        weight_decay=0.02,
        adam_weight_decay=0.02,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), scaled)


def start(out: Path, seed: int):
    """Return processor, model and parameters: those in `out`, or new ones with a tokenizer trained on the corpus."""
    from imagent_jax.tiny.corpus import corpus_texts
    from imagent_jax.tiny.tokenizer import build_tokenizer
    from imagent_jax.tiny.vision import labelled_pack, whitening

    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        build_tokenizer(out, corpus_texts(8000, seed))
    processor = Processor.from_pretrained(out)
    end_of_text, turn_close = ids_of_ends(processor)
    ends = {"eos_token_id": turn_close, "pad_token_id": end_of_text, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2))
    if (out / "model.safetensors").exists():
        return processor, *checkpoint.load(out, vision_block=BLOCK)
    vocab = len(processor.tokenizer)
    model, params = create(read_config(architecture(processor, vocab + -vocab % 64)), seed, vision_block=BLOCK)
    rng = np.random.default_rng(seed)
    patch_embed = whitening(model.cfg.vision, [labelled_pack(rng, processor, BLOCK) for _ in range(6)])
    held = params["vision"]
    held["patch_embed"] = held["patch_embed"].replace(jnp.asarray(patch_embed))  # ty: ignore[not-callable] - a parameter
    return processor, model, params


def build(out: Path, vision_steps: int, crowded: int, text_steps: int, seed: int, rate: float) -> None:
    """Write the tiny base to `out`: tokenizer, model, processor and generation config, and `built.json`."""
    from imagent_jax.tiny.vision import new_head, vision_step

    processor, model, params = start(out, seed)
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size:,} parameters; {vision_steps} steps of the tower and {text_steps} of the decoder, to {out}", flush=True)
    context = multiprocessing.get_context("spawn")
    items = context.Queue(4)
    built = out / "built.json"
    history = json.loads(built.read_text()) if built.exists() else {"parameters": size, "commands": []}
    arguments = (str(out), seed + 1000 * len(history["commands"]), vision_steps, crowded, text_steps, items)
    worker = context.Process(target=produce, args=arguments, daemon=True)
    worker.start()
    began, record = time.time(), []

    def note(step: int, total: int, stage: str, value: dict) -> None:
        record.append(value)
        if step % 50 == 0 or step == total:
            recent = jax.device_get(record[-50:])
            shown = {k: round(float(np.mean([r[k] for r in recent])), 3) for k in recent[0]}
            print(f"{stage} {step}/{total}  {shown}  {time.time() - began:.0f} s", flush=True)
            history[stage] = shown
        if step % 250 == 0 or step == total:
            checkpoint.save(out, model, params, dtype=jnp.bfloat16)

    optimizer = muon(rate, vision_steps)
    seeing = (jax.tree.map(jnp.copy, params["vision"]), new_head(model.cfg.text.hidden_size, seed))
    opt_state = optimizer.init(seeing)
    for step in range(1, vision_steps + 1):
        seeing, opt_state, value = vision_step(model, optimizer, params, seeing, opt_state, items.get())
        params = nnx.State({**params, "vision": seeing[0]}) if step % 250 == 0 or step == vision_steps else params
        note(step, vision_steps, "vision", value)
    optimizer, record = muon(rate, text_steps), []
    text = jax.tree.map(jnp.copy, params["text"])
    opt_state = optimizer.init(text)
    for step in range(1, text_steps + 1):
        text, opt_state, value = train_step(model, optimizer, params, text, opt_state, *items.get())
        params = nnx.State({**params, "text": text}) if step % 250 == 0 or step == text_steps else params
        note(step, text_steps, "text", value)
    flags = f"--vision-steps {vision_steps} --crowded {crowded} --text-steps {text_steps} --seed {seed} --rate {rate}"
    worker.join()
    if vision_steps + text_steps:
        history["commands"].append(f"python -m imagent_jax.tiny {flags}")
    history["skills"] = measure(out)
    built.write_text(json.dumps(history, indent=2))
    print(json.dumps(history, indent=2))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / "base")
    parser.add_argument("--vision-steps", type=int, default=3000, help="updates of the vision tower alone")
    parser.add_argument("--crowded", type=int, default=40, help="scenes of 60 whose crops give way to images full of tags")
    parser.add_argument("--text-steps", type=int, default=3000, help="updates of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    build(**vars(parser.parse_args()))
