"""The shipped tiny base: small, built as it says, loaded by Hugging Face itself with the same greedy text."""

import json

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration

from imagent_jax.data.tiny_world import task_at
from imagent_jax.model.vision import normalise
from imagent_jax.tiny_base import base_folder

torch.set_num_threads(1)


def test_it_is_at_most_twelve_megabytes_and_says_how_it_was_made():
    folder = base_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12 * 2**20
    built = json.loads((folder / "built.json").read_text())
    assert built["parameters"] > 10**6
    assert all(command.startswith("python -m imagent_jax.tiny") for command in built["commands"])


def test_hugging_face_loads_it_and_writes_the_same_greedy_text(parts):
    reference = Qwen2VLForConditionalGeneration.from_pretrained(base_folder(), dtype=torch.float32).eval()
    tasks = [task_at(5, "test", i) for i in range(4)]
    ours = parts.engine.rollout(parts.params, tasks, group_size=1, seed=0, greedy=True)
    stops = {parts.processor.im_end_id, *parts.processor.encode("</tool_call>")}
    for task, [trajectory] in zip(tasks, ours.trajectories, strict=True):
        prompt, _ = parts.engine.open_task(task)
        ids = [int(i) for i in prompt.ids]
        first = trajectory.turns[0]
        for expected in trajectory.ids[: first.stop]:
            row, pixels = torch.tensor([ids]), np.concatenate([image.patches for image in prompt.images])
            with torch.no_grad():
                reference.model.rope_deltas = None
                logits = reference(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    pixel_values=torch.tensor(np.asarray(normalise(parts.model.cfg.vision, pixels))),
                    image_grid_thw=torch.tensor([[1, *image.grid] for image in prompt.images]),
                    mm_token_type_ids=(row == parts.processor.image_token_id).int(),
                    use_cache=False,
                ).logits[0, -1]
            assert int(logits.argmax()) == int(expected), (task.question, parts.processor.decode(ids[-20:]))
            ids.append(int(expected))
        assert ids[-1] in stops or len(ids) == len(prompt.ids) + parts.cfg.rollout.response_tokens
