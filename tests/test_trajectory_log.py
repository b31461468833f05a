"""The log of trajectories: every token, every image once, read back from a run of a scripted policy."""

import dataclasses
import datetime
import io
import json

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from scripted_run import new_log, records

from imagent_jax.config import Config
from imagent_jax.images.decode import read_image
from imagent_jax.model.processor import Processor
from imagent_jax.rl.mask import mask_tables, two_level_mask
from imagent_jax.runs import trajectory_log
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.trajectory_log import TrajectoryLog
from imagent_jax.tiny.base import base_folder
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ImageRegistry
from imagent_jax.types import TokenKind


def test_the_log_has_every_token_with_its_kind_mask_and_logprob(made):
    cfg, path, logged = made
    processor, (groups, advantages) = Processor.from_pretrained(base_folder()), logged[2]
    flat, width = [t for group in groups for t in group], max(len(t.ids) for group in groups for t in group)
    kind = np.stack([np.pad(t.kind, (0, width - len(t.kind)), constant_values=TokenKind.PAD) for t in flat])
    end = np.asarray([t.end for t in flat], np.uint8)
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


def test_facts_that_an_environment_spoilt_are_logged_as_text(made, tmp_path):
    """They are whatever the user's code put there; a run does not end for them."""
    _, _, logged = made
    t = dataclasses.replace(logged[1][0][0][0])
    t.task = dataclasses.replace(t.task, meta={"when": datetime.date(2026, 1, 2), (1, 2): "gone", "deep": [b"x", {"a": 1}]})
    record = new_log(tmp_path).record(t, {"total": 0.0})
    assert json.loads(json.dumps(record))["facts"] == {"when": "2026-01-02", "deep": ["b'x'", {"a": 1}]}
    t.task = dataclasses.replace(t.task, meta={})
    assert "facts" not in new_log(tmp_path).record(t, {"total": 0.0})


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
    first, second = log._images((turned.getvalue(),), tuple(registry))
    assert first["size"] == [60, 40] and Image.open(log.images / first["file"]).format == "PNG"
    for entry, stored in zip(registry, (first, second), strict=True):
        assert Image.open(log.images / stored["file"]).tobytes() == entry.image.tobytes()


def test_animations_transparency_and_damaged_facts_are_stored_as_pixels(tmp_path):
    log, frames = new_log(tmp_path), [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    files = {name: io.BytesIO() for name in ("animation", "transparency", "damaged")}
    frames[0].save(files["animation"], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(files["transparency"], "PNG", transparency=(255, 0, 0))
    frames[0].save(files["damaged"], "WEBP", exif=b"Exif\0\0no facts", lossless=True)
    for name, file in files.items():
        data = file.getvalue()
        pixels = read_image(data)
        stored = Image.open(log.images / log._save(data, pixels))
        assert stored.format == "PNG" and stored.tobytes() == pixels.tobytes(), name
        assert getattr(stored, "n_frames", 1) == 1


def test_a_record_has_what_was_asked_answered_called_and_paid(made):
    cfg, path, logged = made
    groups, advantages = logged[2]
    trajectory, errors = mask_tables(cfg.mask)[1], 0
    flat = [
        (t, float(advantage))
        for group, row in zip(groups, advantages, strict=True)
        for t, advantage in zip(group, row, strict=True)
    ]
    for (t, advantage), record in zip(flat, records(path, "train-000002"), strict=True):
        plain = {"task": t.task.uid, "kind": t.task.kind, "question": t.task.question, "truth": t.task.answer,
                 "rollout": t.rollout,
                 "answer": t.answer, "right": t.answer == t.task.answer, "end": t.end.name, "error": t.error,
                 "dropped": not trajectory[t.end], "advantage": pytest.approx(advantage), "length": len(t.ids)}  # fmt: skip
        assert {key: record[key] for key in plain} == plain
        assert record["rewards"]["answer"] == float(record["right"]) and record["rewards"]["total"] >= record["rewards"]["answer"]
        assert [turn["text"] for turn in record["turns"]] == [turn.text for turn in t.turns]
        for turn, told in zip(t.turns, record["turns"], strict=True):
            call = turn.call
            assert told["call"] == (call and {
                "status": call.status.name, "name": call.name, "arguments": json.loads(json.dumps(call.arguments)),
                "images": call.images, "said": [part for part in call.parts if isinstance(part, str)], "error": call.error,
            })  # fmt: skip
            errors += bool(call and call.error)
        for entry, image in zip(t.images, record["images"], strict=True):
            assert image["size"] == [*entry.image.size] and image["shown"] == [entry.shown[1], entry.shown[0]]
            assert (image.get("parent"), image.get("box")) == (entry.parent, entry.box and list(entry.box))
            assert image.get("origin") == (entry.origin if entry.parent else entry.origin or None)
    assert errors and {record["right"] for record in records(path, "train-000002")} == {True, False}
    assert any(image["size"][0] != image["size"][1] for record in records(path, "train-000002") for image in record["images"])


@pytest.mark.parametrize(("limit", "lines"), [(0, 0), (1, 8), (8, 8), (15, 8), (16, 16), (100, 16)])
def test_as_many_whole_groups_are_logged_as_fit_the_limit(made, tmp_path, limit, lines):
    _, _, logged = made
    cfg = tiny_config({"run": {"dir": str(tmp_path), "log_trajectories": limit}})
    folder = RunFolder(cfg)
    groups, advantages = logged[1]
    TrajectoryLog(folder, Processor.from_pretrained(base_folder()), cfg).write(
        3, groups, [[{"total": 0.5 * t.rollout + i} for t in group] for i, group in enumerate(groups)], advantages,
        name="some")  # fmt: skip
    folder.close()
    assert [path.name for path in (folder.path / "trajectories").glob("*.jsonl")] == ["some-000003.jsonl"] * (lines > 0)
    found = records(folder.path, "some-000003") if lines else []
    assert [r["rewards"]["total"] for r in found] == [0.5 * g + i for i in range(2) for g in range(8)][:lines]
    assert [r["advantage"] for r in found] == pytest.approx(advantages.reshape(-1)[:lines])


def test_only_the_writer_logs(made, tmp_path, monkeypatch):
    log = new_log(tmp_path)
    monkeypatch.setattr(trajectory_log.processes, "is_writer", lambda: False)
    log.write(1, made[2][1][0])
    assert not list(log.folder.path.rglob("*.jsonl"))


def test_a_stored_image_is_found_again_under_its_contents(tmp_path):
    """Also by another log of the same run; what a browser shows stays in its own format."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "png")):
        file = io.BytesIO()
        picture.save(file, kind)
        log = new_log(tmp_path / kind)
        name = log._save(file.getvalue(), picture)
        stored = log.images / name
        assert stored.suffix == f".{suffix}" and (stored.read_bytes() == file.getvalue()) == (kind != "TIFF")
        stored.write_bytes(b"kept")
        (log.images / "half.part").write_bytes(b"")
        again = TrajectoryLog(log.folder, log.processor, Config())
        assert again._save(file.getvalue(), picture) == name and stored.read_bytes() == b"kept" and "half" not in again.files
