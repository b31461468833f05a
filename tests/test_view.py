"""The trajectory viewer in a real browser, on the run of a scripted policy."""

import io
import json
import os
import shutil
import webbrowser

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from scripted_run import ANSWER, EVIL, look, many_trajectories, play, records, without_weights

from imagent_jax.chat import QWEN
from imagent_jax.config import SandboxConfig
from imagent_jax.rollout.collect import Collector
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.reader import read_run
from imagent_jax.runs.trajectory_log import TrajectoryLog
from imagent_jax.runs.view import FIELDS, KINDS, index, main, write_view
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ToolSet, python_tool
from imagent_jax.tools.sandbox import Sandbox
from imagent_jax.types import TokenKind

pytestmark = pytest.mark.slow(1)


def listed(page) -> int:
    return int(page.locator("#count").text_content().split()[0].replace(",", ""))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_boxes_lie_where_the_tool_cut_and_crops_show_what_it_showed(made, page):
    _, path, logged = made
    (groups, _), compared = logged[2], 0
    for line, t in [(0, groups[0][0]), (4, groups[0][4]), (8, groups[1][0])]:
        look(page, path, f"train-000002/{line}")
        for entry in t.images:
            if entry.box is None:
                continue
            root, box = entry.parent, np.asarray(entry.box)
            drawn = [(root, box)]  # on the image that was cut, and on the given one behind it
            while (up := t.images[root - 1]).parent is not None:
                root, box = up.parent, box + np.tile(up.box[:2] if up.box else (0, 0), 2)
                drawn.append((root, box))
            for number, pixels in drawn:
                size = np.asarray([t.images[number - 1].image.width, t.images[number - 1].image.height])
                frames = page.locator(f'.picture[data-image="{number}"]:has(> [data-box="{entry.number}"])')
                assert frames.count() >= 1
                for frame in frames.all():
                    part = frame.locator(f'> [data-box="{entry.number}"]').bounding_box()
                    whole = frame.bounding_box()
                    scale = np.asarray([whole["width"], whole["height"]]) / size
                    wanted = np.concatenate([pixels[:2] * scale, (pixels[2:] - pixels[:2]) * scale])
                    got = [part["x"] - whole["x"], part["y"] - whole["y"], part["width"], part["height"]]
                    assert np.abs(got - wanted).max() < 0.6, (entry, got, wanted)
        page.add_style_tag(content=".box { visibility: hidden }")
        for entry in t.images:
            for frame in page.locator(f'.picture[data-image="{entry.number}"]').all():
                seen = Image.open(io.BytesIO(frame.screenshot())).convert("RGB")
                small = [image.resize((24, 24), Image.Resampling.BOX) for image in (seen, entry.image)]
                assert np.abs(np.subtract(*(np.asarray(image, float) for image in small))).mean() < 9, entry
                compared += 1
    assert compared >= 15
    last = page.locator("figcaption").all_text_contents()[-1]
    assert last.startswith(f"Image {len(t.images)}: crop of Image {entry.parent}")


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


def test_a_search_is_shown_with_its_hits_and_a_crop_without_the_line_that_names_it(made, page, tmp_path):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "run", ignore=shutil.ignore_patterns("view", "checkpoints"))
    first = records(path, "train-000001")[0]
    crop = first["turns"][0]["call"]
    hits = ["Doc 1(Title: <b>Mole</b>) An animal.", f"Image {crop['images'][0]}: no image, but a hit"]
    first["turns"][1]["call"] |= {"name": "search", "arguments": {"query": "mole"}, "images": [], "said": hits}
    (tmp_path / "run" / "trajectories" / "train-000001.jsonl").write_text(json.dumps(first))
    write_view(tmp_path / "run")
    look(page, tmp_path / "run", "train-000001/0")
    tools = page.locator(".turn:has(.status)").all()
    assert [tool.locator("pre").all_text_contents() for tool in tools] == [[], hits]
    assert tools[1].locator(".status").text_content() == "search ran"


def test_the_history_of_a_question_is_shown_with_what_else_is_known_of_it(made, page, tmp_path):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "run", ignore=shutil.ignore_patterns("view", "checkpoints"))
    rows = records(path, "train-000001")
    assert rows[0]["facts"]["targets"]  # the tiny world's
    events = [{"by": "proposer", "what": "proposed", "facts": {}},
              {"by": "answerer", "what": "answered", "facts": {"answer": "<b>7</b>", "right": True}},
              {"by": "review:anna", "what": "accepted", "facts": {}}]  # fmt: skip
    rows[0]["facts"] = {"history": events, "several": True, "pass_rate": 0.5}
    del rows[1]["facts"]
    (tmp_path / "run" / "trajectories" / "train-000001.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_view(tmp_path / "run")
    for name in ("train-000001/0", "group/train-000001/0"):
        look(page, tmp_path / "run", name)
        page.click(".known summary")
        assert [" ".join(line.split()) for line in page.locator(".known li").all_inner_texts()] == [
            "proposer proposed", "answerer answered answer <b>7</b> · right true ·", "review:anna accepted",
        ]  # fmt: skip
        assert json.loads(page.locator(".known pre").text_content()) == {"several": True, "pass_rate": 0.5}
    look(page, tmp_path / "run", "train-000001/1")
    assert page.locator(".known").count() == 0
    look(page, tmp_path / "run", "train-000001/2")
    assert page.locator(".known li").count() == 0 and page.locator(".known summary").text_content() == "facts of the task"


def test_code_is_shown_with_its_lines_its_output_and_its_images(page, tmp_path):
    """A run of the tool python itself: a program that shows two images, one made of none, and one that fails."""
    cfg = tiny_config({"run": {"dir": str(tmp_path), "name": "run"}, "rollout": {"prompt_tokens": 1024, "response_tokens": 1024}})
    sandbox = Sandbox(SandboxConfig(wall_s=30.0))
    collector = Collector(*without_weights(), ToolSet([python_tool(sandbox)]), cfg)
    good = "import numpy as np\nprint('<b>wide</b>')\nshow(images[1].rotate(90))\nshow(np.full((40, 60, 3), 200, np.uint8))"
    texts = [QWEN.render_call("python", {"code": code}) for code in (good, "x = (")]
    t = play(collector, task_at(3, "train", 0), 0, [*texts, ANSWER.format("7")])
    sandbox.close()
    run, count = RunFolder(cfg), len(t.task.images)
    TrajectoryLog(run, collector.processor, cfg).write(1, [[t]], [[{"total": 0.0}]], np.zeros((1, 1)))
    run.log({"step": 1, "reward/total": 0.0, "time/step": 1.0, "time/total": 1.0})
    run.close()
    write_view(run.path)
    look(page, run.path, "train-000001/0")
    assert page.locator("pre.code").all_text_contents() == [good, "x = ("]
    first, second = page.locator(".turn:has(.status)").all()
    assert first.locator("pre:not(.code)").all_text_contents() == ["<b>wide</b>"]
    assert [text.split(" · ")[0] for text in first.locator("figcaption").all_text_contents()] == [
        f"Image {count + 1}: python of Image 1", f"Image {count + 2}: python",
    ]  # fmt: skip
    assert "SyntaxError: '(' was never closed" in second.locator(".status").text_content()
    assert page.locator(".gallery figure").count() == count  # what a program made is not given
    page.goto((run.path / "report.html").as_uri())
    assert page.locator("pre.code").all_text_contents() == [good, "x = ("]
    assert "<b>wide</b>" in page.locator("pre.said").all_text_contents()
    assert f"Image {count + 2}: python" in page.locator(".case figcaption").all_text_contents()


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
    for key, name in [
        ("j", "train-000001/1"), ("k", "train-000001/0"), ("J", "train-000001/8"), ("j", "train-000001/9"),
        ("g", "group/train-000001/9"), ("j", "group/train-000002/0"), ("K", "group/train-000001/8"),
        ("g", "train-000001/8"), ("K", "train-000001/0"),
    ]:  # fmt: skip
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
    drawn = page.locator(".gallery canvas").first
    assert drawn.evaluate("(canvas) => [canvas.width, canvas.height]") == shown


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


def test_a_thousand_trajectories_are_listed_at_once_and_told_of_on_demand(made, page, tmp_path):
    _, path, _ = made
    many = many_trajectories(path, tmp_path / "many")
    _, run = write_view(many)
    assert (count := sum(len(r) for r in run.trajectories.values())) >= 1000
    assert (many / "view" / "data" / "index.js").stat().st_size < 150_000
    loaded = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    look(page, many)
    assert listed(page) == page.locator("#list .row").count() == count
    assert [name for name in loaded if name.startswith("train")] == []
    look(page, many, "train-000040/3")
    assert {name for name in loaded if name.startswith("train")} == {"train-000040.js"}


# ---- what the page is made of -----------------------------------------------------------------------------------------


def test_the_list_has_a_row_for_every_trajectory(made):
    _, path, _ = made
    run = read_run(path)
    listed = index(run)
    assert (listed["name"], listed["about"]) == ("demo", "tiny on tiny_world, 3 of 3 steps")
    assert [(c["name"], c["label"], c["split"]) for c in listed["chunks"]] == [
        (stem, {"base-000000": "base", "trained-000003": "trained"}.get(stem, f"step {int(stem[-6:])}"),
         "train" if stem.startswith("train-") else "held-out") for stem in run.trajectories]  # fmt: skip
    rows = iter(listed["rows"])
    assert len({task[0] for task in listed["tasks"]}) == len(listed["tasks"]) and listed["fields"] == FIELDS
    for c, (stem, trajectories) in enumerate(run.trajectories.items()):
        for line, record in enumerate(trajectories):
            row = dict(zip(FIELDS, next(rows), strict=True))
            calls = [turn["call"] for turn in record["turns"] if turn["call"]]
            done = {
                status: [call["name"] for call in calls if call["status"] == status]
                for status in ("EXECUTED", "INVALID", "FAULT")
            }
            assert (row["chunk"], row["line"], row["rollout"], row["right"]) == (c, line, record["rollout"], int(record["right"]))
            assert listed["tasks"][row["task"]] == [record["task"], record["kind"], record["question"], record["truth"]]
            assert (row["end"], row["answer"]) == (record["end"], record["answer"])
            assert [row["executed"], row["invalid"], row["faulted"]] == [len(names) for names in done.values()], stem
            assert {listed["tools"][i] for i in row["tools"]} == set(done["EXECUTED"])
            paid = record["rewards"].get("total"), record["advantage"]
            assert (row["reward"], row["advantage"]) == tuple(x if x is None else pytest.approx(x, abs=6e-5) for x in paid)
    assert next(rows, None) is None and len(set(listed["tools"])) == len(listed["tools"]) == 2


def test_the_folder_of_the_page_is_whole_and_an_earlier_one_goes(made, tmp_path, monkeypatch):
    _, path, _ = made
    shutil.copytree(path, tmp_path / "run", ignore=shutil.ignore_patterns("view", "checkpoints"))
    (tmp_path / "run" / "view").mkdir()
    (tmp_path / "run" / "view" / "old").touch()
    monkeypatch.setattr(os, "link", lambda source, target: os.stat(tmp_path / "nowhere"))  # fails as on another file system
    page, run = write_view(tmp_path / "run")
    view = tmp_path / "run" / "view"
    assert page == view / "index.html" and not (view / "old").exists()
    images = {file.name: file.read_bytes() for file in (view / "images").iterdir()}
    assert images == {file.name: file.read_bytes() for file in (tmp_path / "run" / "trajectories" / "images").iterdir()}
    assert (view / "report.html").read_text() == (tmp_path / "run" / "report.html").read_text()
    chunks = {file.stem: file.read_text() for file in (view / "data").iterdir()}
    assert json.loads(chunks.pop("index").removeprefix("const RUN=").removesuffix(";\n")) == json.loads(json.dumps(index(run)))
    for stem, text in chunks.items():
        name, trajectories = json.loads(f"[{text.removeprefix('CHUNK(').removesuffix(');' + chr(10))}]")
        assert name == stem and trajectories == run.trajectories[stem]
    assert chunks.keys() == run.trajectories.keys()


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
    [
        ("none", "There is no run"),
        ("empty", "is not a run"),
        ("fresh", "has no metrics yet"),
        ("blank", "has no metrics yet"),
    ],
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
