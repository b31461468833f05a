"""The log of trajectories: every token, every image once, read back from a run of a scripted policy."""

import io

import numpy as np
from PIL import Image
from scripted_run import new_log, records

from imagent_jax.data.tiny_world import task_at
from imagent_jax.model.processor import Processor
from imagent_jax.rl.mask import mask_tables, two_level_mask
from imagent_jax.rl.trajectory import TokenKind
from imagent_jax.tiny_base import base_folder
from imagent_jax.tools import ImageRegistry


def test_the_log_has_every_token_with_its_kind_mask_and_logprob(made):
    cfg, path, logged = made
    processor, (groups, advantages) = Processor.from_pretrained(base_folder()), logged[2]
    flat, width = [t for group in groups for t in group], max(len(t.ids) for group in groups for t in group)
    kind = np.stack([np.pad(t.kind, (0, width - len(t.kind)), constant_values=TokenKind.PAD) for t in flat])
    end = np.asarray([t.end for t in flat])
    action, trajectory, _ = mask_tables(cfg.mask)
    trains = np.asarray(two_level_mask(kind[None], end[None], advantages.reshape(1, -1), action, trajectory))[0]
    assert len(flat) == 16 and len({t.end for t in flat}) == 4
    for t, mask, record in zip(flat, trains, records(path, "train-000002"), strict=True):
        tokens = record["tokens"]
        counts = [tokens["repeat"].get(str(i), 1) for i in range(len(tokens["ids"]))]
        assert np.array_equal(np.repeat(tokens["ids"], counts), t.ids) and record["length"] == len(t.ids)
        assert np.array_equal(np.repeat([int(k) for k in tokens["kind"]], counts), t.kind)
        assert np.array_equal(np.repeat([k == "1" for k in tokens["kept"]], counts), mask[: len(t.ids)])
        assert np.allclose(np.repeat(tokens["logprob"], counts), t.logprobs, atol=6e-5)
        assert "".join(tokens["text"]) == processor.decode(tokens["ids"]) and "\ufffd" not in "".join(tokens["text"])
    tokens = [record["tokens"] for record in records(path, "train-000002")]
    assert any("日" in text for columns in tokens for text in columns["text"])
    told = [token for part in tokens for token in zip(part["ids"], part["kind"], part["kept"], strict=True)]
    shown = {token[1:] for token in told if token[0] == processor.image_token_id}
    assert shown == {(str(int(TokenKind.OBSERVATION)), "0")}


def test_an_evaluation_logs_no_mask_and_whole_groups_are_logged(made):
    _, path, _ = made
    assert all("kept" not in record["tokens"] and not record["dropped"] for record in records(path, "base-000000"))
    train = records(path, "train-000001")
    assert [record["rollout"] for record in train] == list(range(8)) * 2
    assert len({record["task"] for record in train}) == 2


def test_an_image_is_stored_once_and_what_can_be_cut_from_it_never(made):
    _, path, logged = made
    given = {data for groups, _ in logged.values() for group in groups for data in group[0].task.images}
    given |= {data for i in range(6) for data in task_at(3, "test", i).images}
    stored = [file.read_bytes() for file in (path / "trajectories" / "images").iterdir()]
    assert sorted(stored) == sorted(given)
    images = records(path, "train-000002")[0]["images"]
    assert [image.get("parent") for image in images][-2:] == [2, len(images) - 1]
    assert all(("file" in image) == ("parent" not in image) for image in images)


def test_an_image_is_stored_as_the_tools_have_it_where_a_browser_would_show_another(tmp_path):
    log = new_log(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by the viewer
    turned = io.BytesIO()
    picture.save(turned, "JPEG", exif=exif)
    registry = ImageRegistry()
    registry.add(Image.open(io.BytesIO(turned.getvalue())), shown=(28, 28))
    registry.add(picture.crop((0, 0, 20, 20)).rotate(90), shown=(28, 28), parent=1, box=(0, 0, 20, 20))
    first, second = log._images((turned.getvalue(),), registry)
    assert first["size"] == [60, 40] and Image.open(log.images / first["file"]).format == "PNG"
    for entry, stored in zip(registry, (first, second), strict=True):
        assert Image.open(log.images / stored["file"]).tobytes() == entry.image.tobytes()
