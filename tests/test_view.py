"""The trajectory viewer, the report and the log they read, in a real browser on trajectories of a scripted policy."""

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from playwright.sync_api import sync_playwright

from imagent_jax.data.task import Task
from imagent_jax.data.tiny_world import task_at
from imagent_jax.evaluate import summarise
from imagent_jax.model.processor import Processor
from imagent_jax.report import chart, write_report
from imagent_jax.rl.mask import mask_tables, two_level_mask
from imagent_jax.rl.rewards import score_trajectory
from imagent_jax.rl.rollout import RolloutEngine, Row, _trajectory
from imagent_jax.rl.trajectory import TokenKind, Trajectory
from imagent_jax.run_log import read_run
from imagent_jax.runs import RunFolder
from imagent_jax.tiny_base import base_folder
from imagent_jax.tools import ImageRegistry, ToolSet, format_call, tool
from imagent_jax.tools.visual import VISUAL_TOOLS
from imagent_jax.trajectory_log import TrajectoryLog
from imagent_jax.view import KINDS, main, write_view

EVIL = "Is </script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> 日本語 in Image 1?"
ANSWER = "<answer>{}</answer><|im_end|>"


@tool
def broken(context) -> str:
    """Fails."""
    raise OSError("the disk is full")


def crop(image: int, *box: int) -> str:
    return format_call("visual_confirmation", {"image": image, "label": "red", "bbox_2d": list(box)})


def play(engine: RolloutEngine, task: Task, rollout: int, texts: list[str]) -> Trajectory:
    """The trajectory of a policy that says `texts`, through the engine's own books; log-probabilities are drawn."""
    prompt, registry = engine.open_task(task)
    row, ids = Row(task, rollout, registry, position=prompt.next_position), []
    for text in texts:
        said = np.asarray(engine.processor.encode(text), np.int32)
        ids += said.tolist()
        if (call := engine.end_turn(row, said)) is None:
            break
        if (shown := engine.respond(row, engine.tools.execute(call, row.registry, engine.settings))) is None:
            break
        ids += shown.ids.tolist()
        row.kinds.append(np.full(len(shown.ids), TokenKind.OBSERVATION, np.uint8))
        row.positions.append(shown.positions)
        row.vision.append(shown.vision([0] * len(shown.images)))
        row.seen, row.position = row.seen + len(shown.ids), shown.next_position
    logprobs = -np.random.default_rng(len(ids) + rollout).exponential(0.4, len(ids))
    return _trajectory(row, np.asarray(ids, np.int32), logprobs)


def scripts(task: Task) -> list[list[str]]:
    """What the eight rollouts of a group say."""
    right, wrong, new = ANSWER.format(task.answer), ANSWER.format("none of them"), len(task.images) + 1
    again = crop(1, 100, 100, 400, 400)
    return [
        ["Look closer.\n" + crop(2, 250, 300, 650, 800), crop(new, 0, 500, 500, 1000), "So.\n" + right],
        [crop(1, 500, 500, 900, 900), "Ünï 日本 " + wrong],
        [crop(1, 900, 100, 200, 300), crop(1, 200, 100, 900, 300), right],
        [again, again, again, right],
        [format_call("visual_reflection", {"images": [1, 2], "resolution": "high"}), crop(new, 300, 300, 700, 700), right],
        [wrong],
        ["I do not know.<|im_end|>"],
        [format_call("broken", {}), right],
    ]


def metrics_of(step: int, rng) -> dict[str, float]:
    """A step's metrics of a run that learns."""
    right = 0.2 + 0.5 * (1 - math.exp(-step / 12)) + rng.normal() * 0.03
    times = {f"time/{name}": abs(rng.normal(x, x / 9)) for name, x in (("decode", 0.9), ("vision", 0.4), ("train", 2.7))}
    return {
        "step": step, "reward/answer": right, "reward/format": 0.9, "reward/tool_gain": right * 0.8, "reward/total": 1.2 * right,
        "accuracy": right, "tools/calls": 1 + right, "tools/invalid": 0.2 / step, "mask/dropped_tokens": 0.2 / step,
        "mask/dropped_trajectories": 0.1 / step, "entropy": 0.3 / (1 + step / 9), "kl/sampler": 1e-3 * abs(rng.normal()),
        "grad_norm": abs(rng.normal(0.3, 0.1)), "groups/flat": 0.1, "length": 60 + step, "end/fault": 0.125, **times,
        "time/step": sum(times.values()) + 0.1, "time/total": 30 + 4.2 * step,
    }  # fmt: skip


def make_run(folder: Path, steps: int = 3):
    """A run's folder as the main job leaves it: three held-out evaluations, `steps` steps of two groups of eight."""
    cfg = small_config(
        run={"dir": str(folder), "name": "demo", "steps": steps}, rollout={"prompt_tokens": 512, "response_tokens": 512},
        tools={"max_turns": 3},
    )  # fmt: skip
    processor, run = Processor.from_pretrained(base_folder()), RunFolder(cfg)
    engine = RolloutEngine(None, processor, ToolSet([*VISUAL_TOOLS.values(), broken]), cfg)
    log, rng = TrajectoryLog(run, processor, cfg), np.random.default_rng(0)
    tasks = [task_at(3, "train", i) for i in range(2 * steps)]
    tasks[0] = dataclasses.replace(tasks[0], question=EVIL)
    held_out = [task_at(3, "test", i) for i in range(6)]

    def evaluation(step: int, name: str, lines: list[int]) -> list[Trajectory]:
        done = [play(engine, task, 0, scripts(task)[line]) for task, line in zip(held_out, lines, strict=True)]
        log.write(step, [[t] for t in done], name=name)
        return done

    base = evaluation(0, "base", [1, 1, 5, 6, 0, 2])
    run.log({"step": 0, "time/evaluation": 9.0} | {f"base/{k}": v for k, v in summarise(base).items()})
    logged = {}
    for step in range(1, steps + 1):
        groups = [[play(engine, t, g, texts) for g, texts in enumerate(scripts(t))] for t in tasks[2 * step - 2 : 2 * step]]
        rewards = [[score_trajectory(t, cfg.reward) for t in group] for group in groups]
        totals = np.asarray([[r["total"] for r in group] for group in rewards])
        advantages = (totals - totals.mean(1, keepdims=True)) / totals.std(1, keepdims=True)
        log.write(step, groups, rewards, advantages)
        run.log(metrics_of(step, rng))
        logged[step] = (groups, advantages)
    trained = evaluation(steps, "trained", [0, 4, 0, 2, 1, 0])
    run.log({"step": steps, "time/total": 40 + 4.2 * steps} | {f"final/{k}": v for k, v in summarise(trained).items()})
    run.log_faults(["train.jsonl, line 7: images: a.png does not decode"])
    run.close()
    return cfg, run.path, logged


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Config, folder and trajectories by step of a made run whose page and report are written."""
    cfg, path, logged = make_run(tmp_path_factory.mktemp("runs"))
    write_view(path)
    return cfg, path, logged


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, or else the one that playwright fetches."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if system is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=system, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def page(made, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)  # the machine may be busy
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    yield page
    page.close()
    assert errors == []


def look(page, path: Path, name: str = "") -> None:
    """Opens the page of a run at a trajectory, or goes there."""
    page.goto(f"{(path / 'view' / 'index.html').as_uri()}#{name}")
    page.wait_for_selector(f'#page[data-ready="{name}"]' if name else "#page[data-ready]")
    page.wait_for_function("[...document.querySelectorAll('canvas')].every((c) => c.dataset.drawn)")


def records(path: Path, stem: str) -> list[dict]:
    return [json.loads(line) for line in (path / "trajectories" / f"{stem}.jsonl").read_text().splitlines()]


def listed(page) -> int:
    return int(page.locator("#count").text_content().split()[0].replace(",", ""))


def new_log(folder: Path) -> TrajectoryLog:
    cfg = small_config(run={"dir": str(folder), "name": "new"})
    run = RunFolder(cfg)
    run.close()
    return TrajectoryLog(run, Processor.from_pretrained(base_folder()), cfg)


# ---- the log --------------------------------------------------------------------------------------------------------


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
    assert any("日" in text for record in records(path, "train-000002") for text in record["tokens"]["text"])


def test_an_evaluation_logs_no_mask_and_whole_groups_are_logged(made):
    _, path, _ = made
    assert all("kept" not in record["tokens"] and not record["dropped"] for record in records(path, "base-000000"))
    train = records(path, "train-000001")
    assert [record["rollout"] for record in train] == list(range(8)) * 2 and len({record["task"] for record in train}) == 2


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


def test_logging_sixteen_trajectories_takes_less_than_50_ms(made, tmp_path):
    _, _, logged = made
    log = new_log(tmp_path)
    (groups, advantages), spent = logged[1], []
    rewards = [[{"total": 1.0} for _ in group] for group in groups]
    for _ in range(5):
        log.files.clear()  # every image is written anew
        began = time.process_time()
        log.write(1, groups, rewards, advantages)
        spent.append(time.process_time() - began)
    assert min(spent) < 0.05, spent


# ---- the page -------------------------------------------------------------------------------------------------------


def test_boxes_lie_where_the_tool_cut_and_crops_show_what_it_showed(made, page):
    _, path, logged = made
    (groups, _), compared = logged[2], 0
    for line, t in [(0, groups[0][0]), (4, groups[0][4]), (8, groups[1][0])]:
        look(page, path, f"train-000002/{line}")
        for entry in t.registry:
            if entry.box is None:
                continue
            root, box = entry.parent, np.asarray(entry.box)
            drawn = [(root, box)]  # on the image that was cut, and on the given one behind it
            while (up := t.registry[root]).parent is not None:
                root, box = up.parent, box + np.tile(up.box[:2] if up.box else (0, 0), 2)
                drawn.append((root, box))
            for number, pixels in drawn:
                size = np.asarray([t.registry[number].image.width, t.registry[number].image.height])
                frames = page.locator(f'.picture[data-image="{number}"]:has(> [data-box="{entry.number}"])')
                assert frames.count() >= 1
                for frame in frames.all():
                    whole, part = (place.bounding_box() for place in (frame, frame.locator(f'> [data-box="{entry.number}"]')))
                    scale = np.asarray([whole["width"], whole["height"]]) / size
                    wanted = np.concatenate([pixels[:2] * scale, (pixels[2:] - pixels[:2]) * scale])
                    got = [part["x"] - whole["x"], part["y"] - whole["y"], part["width"], part["height"]]
                    assert np.abs(got - wanted).max() < 0.6, (entry, got, wanted)
        page.add_style_tag(content=".box { visibility: hidden }")
        for entry in t.registry:
            for frame in page.locator(f'.picture[data-image="{entry.number}"]').all():
                seen = Image.open(io.BytesIO(frame.screenshot())).convert("RGB")
                seen, true = (np.asarray(image.resize((24, 24), Image.Resampling.BOX), float) for image in (seen, entry.image))
                assert np.abs(seen - true).mean() < 9, entry
                compared += 1
    assert compared >= 15
    assert page.locator("figcaption").all_text_contents()[-1].startswith(f"Image {len(t.registry)}: crop of Image {entry.parent}")


def test_every_token_has_the_class_of_its_kind_and_of_the_mask(made, page):
    _, path, logged = made
    look(page, path, "group/train-000002/3")
    columns = page.evaluate("""[...document.querySelectorAll('.column')].map((column) =>
        [...column.querySelectorAll('.tok')].map((tok) => [Number(tok.dataset.i), tok.className, tok.textContent]))""")
    told = set()
    for tokens, record in zip(columns, records(path, "train-000002")[:8], strict=True):
        kind, kept, text = (record["tokens"][key] for key in ("kind", "kept", "text"))
        assert [i for i, _, _ in tokens] == list(range(len(kind)))
        for i, classes, shown in tokens:
            assert {f"k{kind[i]}", "kept" if kept[i] == "1" else "dropped"} <= set(classes.split())
            assert len(set(classes.split()) & {"kept", "dropped", "k0", "k1", "k2", "k3", "k4"}) == 2
            assert shown.startswith(text[i])
            told.add((int(kind[i]), kept[i]))
    assert told >= {(0, "1"), (1, "1"), (1, "0"), (2, "0"), (3, "1"), (4, "0")}
    assert tuple(kind.name for kind in TokenKind) == KINDS


def test_a_token_tells_its_logprob_and_advantage(made, page):
    _, path, _ = made
    for line, words in ((0, "trains"), (2, "invalid call dropped"), (3, "trajectory dropped: repeated")):
        record = records(path, "train-000002")[line]
        look(page, path, f"train-000002/{line}")
        page.hover('.tok[data-i="1"]')
        tip = page.inner_text("#tip").replace("−", "-")
        assert words in tip and f"log-prob {record['tokens']['logprob'][1]:.4f}" in tip
        assert f"advantage {record['advantage']:.3f}" in tip and f"id {record['tokens']['ids'][1]}" in tip
    look(page, path, "base-000000/0")
    page.hover('.tok[data-i="1"]')
    assert "nothing trains" in page.inner_text("#tip") and "advantage" not in page.inner_text("#tip")


def test_a_token_tells_its_ratio_where_that_was_logged(made, page, tmp_path):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "run", ignore=shutil.ignore_patterns("view", "checkpoints"))
    first = records(path, "train-000001")[5]
    first["tokens"]["ratio"] = [1.25] * len(first["tokens"]["ids"])
    (tmp_path / "run" / "trajectories" / "train-000001.jsonl").write_text(json.dumps(first))
    write_view(tmp_path / "run")
    look(page, tmp_path / "run", "train-000001/0")
    page.hover('.tok[data-i="1"]')
    assert "ratio 1.2500" in page.inner_text("#tip")


def test_a_group_stands_side_by_side_and_a_held_out_task_before_and_after(made, page):
    _, path, logged = made
    look(page, path, "group/train-000001/9")
    assert page.locator(".column").count() == 8 and page.locator(".column.here").count() == 1
    assert page.locator(".column.good").count() == sum(record["right"] for record in records(path, "train-000001")[8:])
    look(page, path, "group/base-000000/0")
    assert page.locator(".column h3 a").all_text_contents() == ["base", "trained"]


def test_filters_keep_what_they_name(made, page):
    _, path, _ = made
    stems = ("base-000000", "train-000001", "train-000002", "train-000003", "trained-000003")
    everything = {stem: records(path, stem) for stem in stems}
    flat = [record for stem in everything.values() for record in stem]

    def calls(record, status):
        return [turn["call"]["name"] for turn in record["turns"] if turn["call"] and turn["call"]["status"] == status]

    look(page, path)
    assert listed(page) == len(flat) == page.locator("#list .row").count()
    for field, value, test in [
        ("outcome", "right", lambda r: r["right"]),
        ("outcome", "wrong", lambda r: not r["right"]),
        ("tool", "?none", lambda r: not any(turn["call"] for turn in r["turns"])),
        ("tool", "?invalid", lambda r: calls(r, "INVALID")),
        ("tool", "?fault", lambda r: calls(r, "FAULT")),
        ("tool", "visual_reflection", lambda r: "visual_reflection" in calls(r, "EXECUTED")),
        ("end", "REPEATED", lambda r: r["end"] == "REPEATED"),
        ("kind", flat[-1]["kind"], lambda r: r["kind"] == flat[-1]["kind"]),
        ("where", "train-000002", lambda r: r in everything["train-000002"]),
        ("where", "held-out", lambda r: not r["rewards"]),
    ]:
        page.select_option(f"#{field}", value)
        wanted = sum(bool(test(record)) for record in flat)
        assert 0 < wanted < len(flat) and listed(page) == wanted == page.locator("#list .row").count(), (field, value)
        page.select_option(f"#{field}", "")
    page.fill("#low", "0.05")
    page.fill("#high", "1.25")
    assert listed(page) == sum(0.05 <= record["rewards"].get("total", -1) <= 1.25 for record in flat)
    page.click("button[type=reset]")
    page.wait_for_function(f"document.querySelector('#count').value.startsWith('{len(flat)} ')")


def test_search_looks_into_questions_and_after_enter_into_what_was_said(made, page):
    _, path, _ = made
    look(page, path)
    page.keyboard.press("/")
    page.keyboard.type("日本語 HACKED")
    assert listed(page) == 8
    page.fill("#search", "must be [x1, y1, x2, y2]")
    assert listed(page) == 0 and "Nothing matches" in page.inner_text("#list")
    page.keyboard.press("Enter")
    page.wait_for_function("!document.querySelector('#count').value.startsWith('0 ')")
    assert listed(page) == 6 + 2


def test_keys_move_about(made, page):
    _, path, _ = made
    look(page, path, "train-000001/0")
    for key, name in [("j", "train-000001/1"), ("k", "train-000001/0"), ("J", "train-000001/8"), ("j", "train-000001/9"),
                      ("g", "group/train-000001/9"), ("j", "group/train-000002/0"), ("K", "group/train-000001/8"),
                      ("g", "train-000001/8"), ("K", "train-000001/0")]:  # fmt: skip
        page.keyboard.press(key)
        page.wait_for_selector(f'#page[data-ready="{name}"]')
        assert page.locator(".row.here").get_attribute("href") == f"#{name.removeprefix('group/')}"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("v")
    page.wait_for_selector(".picture.seen canvas[data-drawn]")
    shown = records(path, "train-000001")[0]["images"][0]["shown"]
    assert page.evaluate("[...['width', 'height']].map((side) => document.querySelector('.gallery canvas')[side])") == shown


def test_text_is_never_taken_for_a_page(made, page):
    _, path, _ = made
    look(page, path, "train-000001/0")
    assert page.inner_text(".question") == EVIL and EVIL in page.inner_text("#list")
    assert page.evaluate("window.hacked") is None
    page.goto((path / "report.html").as_uri())
    assert page.evaluate("window.hacked") is None and page.evaluate("document.images.length") == 0


def test_a_run_without_trajectories_says_how_to_have_some(made, page, tmp_path):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "bare", ignore=shutil.ignore_patterns("view", "checkpoints", "trajectories"))
    page.goto(write_view(tmp_path / "bare")[0].as_uri())
    assert "set run.log_trajectories above 0" in page.inner_text("#list") and page.inner_text("#page") == ""


def test_a_thousand_trajectories_open_in_two_seconds(made, page, tmp_path):
    _, path, _ = made
    many = tmp_path / "many"
    shutil.copytree(path, many, ignore=shutil.ignore_patterns("view", "checkpoints"))
    lines = records(path, "train-000002")
    for step in range(4, 66):
        named = [json.dumps(record | {"task": f"{record['task']}/{step}"}) for record in lines]
        (many / "trajectories" / f"train-{step:06d}.jsonl").write_text("\n".join(named))
    _, run = write_view(many)
    assert sum(len(r) for r in run.trajectories.values()) >= 1000
    assert (many / "view" / "data" / "index.js").stat().st_size < 150_000
    meter = page.context.new_cdp_session(page)
    meter.send("Performance.enable", {"timeDomain": "threadTicks"})  # the page's own time, whatever else the machine does
    look(page, many)
    spent = {metric["name"]: metric["value"] for metric in meter.send("Performance.getMetrics")["metrics"]}
    assert 0 < spent["TaskDuration"] < 2 and page.locator("#list .row").count() >= 1000


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_shows_curves_tables_cases_and_faults(made, page):
    _, path, _ = made
    run, text = read_run(path), (path / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and "@import" not in text and "<!--" not in text
    page.goto((path / "report.html").as_uri())
    headline = page.inner_text(".headline")
    assert headline.startswith("33.3 % → 83.3 %")
    titles = page.locator(".chart figcaption > b").all_text_contents()
    assert {"reward", "accuracy", "share dropped by the mask", "KL", "gradient norm", "seconds a step"} <= set(titles)
    kinds = page.locator(".case .kind").all_text_contents()
    assert kinds.count("Wrong before, right now") == 4 and kinds.count("Right before, wrong now") == 1 and 8 <= len(kinds) <= 12
    assert {"A fault of the world", "An invalid call", "Ended: repeated"} <= set(kinds)
    body = page.inner_text("main")
    assert "the disk is full" in body and "1 row(s) of data were left out" in body and "line 7: images: a.png" in body
    times = page.locator("h2:has-text('Where the time went') + table td:nth-child(3)").all_text_contents()
    spent = [float(text.split()[0]) for text in times]
    assert spent[-1] == pytest.approx(sum(spent[:-1]), abs=0.5)
    assert spent[-1] == pytest.approx(run.metrics[-1]["time/total"], abs=0.1)
    assert page.evaluate("[...document.querySelectorAll('.picture use')].every((use) => use.getBoundingClientRect().width > 10)")


def test_the_pointer_reads_all_charts_at_a_step(made, page):
    _, path, _ = made
    page.goto((path / "report.html").as_uri())
    chart = page.locator(".chart svg").first
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    second = read_run(path).steps[1]
    told = page.locator(".chart").filter(has_text="gradient norm").locator("span b").text_content()
    assert float(told) == pytest.approx(second["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("ys", [[0.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [-0.2, 5e6], [0.30000000000000004] * 20, [7.0]])
def test_a_chart_holds_any_figures(ys):
    text = chart("figures", {"a": list(enumerate(ys, 1)), "b": [(1, 0.5 * ys[0])]})
    height = float(re.search(r'viewBox="0 0 [0-9]+ ([0-9]+)"', text)[1])
    points = re.findall(r"([0-9.-]+),([0-9.-]+)", " ".join(re.findall(r'points="([^"]*)"', text)))
    assert len(points) >= len(ys) and all(0 <= float(y) <= height for _, y in points)
    assert 2 <= text.count("class=grid") <= 6


def test_a_run_that_was_stopped_or_has_only_its_base_has_a_report(made, tmp_path):
    _, path, _ = made
    for kept in (1, 2):
        shutil.copytree(path, tmp_path / str(kept), ignore=shutil.ignore_patterns("view", "checkpoints", "report.html"))
        log = tmp_path / str(kept) / "metrics.jsonl"
        log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:kept]) + '{"step": 2, "rew')
        text = write_report(tmp_path / str(kept)).read_text()
        assert "the run has not ended" in text and "1 log line(s) were not whole" in text
        assert ("No training step has been logged yet" in text) == (kept == 1)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_opens_the_page_or_says_where_it_is(made, capsys, monkeypatch):
    _, path, _ = made
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) or len(opened) < 2)
    assert main([str(path)]) == 0 and opened == [(path / "view" / "index.html").as_uri()]
    assert "in a browser" not in capsys.readouterr().out
    assert main([str(path)]) == 0 and f"Open {path / 'view' / 'index.html'} in a browser" in capsys.readouterr().out
    assert main([str(path), "--no-open"]) == 0 and len(opened) == 2


def test_trajectories_of_an_earlier_version_and_torn_lines_are_left_out_and_counted(made, tmp_path, capsys):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "old", ignore=shutil.ignore_patterns("view", "checkpoints"))
    with open(tmp_path / "old" / "trajectories" / "train-000002.jsonl", "a") as file:
        file.write('{"task": "t", "turns": [], "tokens": 12}\n{"task": "t", "tur')
    assert main([str(tmp_path / "old"), "--no-open"]) == 0
    assert "Wrote 60 trajectories of 5 logs" in (out := capsys.readouterr().out) and "2 log line(s)" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "There is no run"), ("empty", "is not a run"), ("fresh", "has no metrics yet"), ("blank", "has no metrics yet")],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, name, words):
    for folder, files in {"empty": [], "fresh": ["config.yaml"], "blank": ["config.yaml", "metrics.jsonl"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    assert main([str(tmp_path / name), "--no-open"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1 and error.endswith(".")
    assert "; " in error or ", " in error  # the remedy
