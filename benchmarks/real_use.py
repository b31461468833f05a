"""Runs shaped like real use, killed and resumed: `python benchmarks/real_use.py [--family Qwen3-VL] [--steps 8] [--kills 3]`.

Qwen2.5-VL and Qwen3-VL of five million random parameters, with the full vocabulary, train on a mixture of four sources in four
formats: 0 to 8 photographs of 1 to 4 megapixels a task, up to 4 calls a rollout, a judge that fails at times, refill and
curriculum on, images that leave the device for host memory. What a rollout samples is the model's own, and so is where its turns
end; how such a turn reads (a call and its box, a malformed call, an answer, nothing) is drawn for its task and rollout.

Per family, one run goes through; another is killed (SIGKILL) at random moments and resumed each time. Counted: programs compiled
after the first step, in steps and between them; resident memory by step; rows used by source; groups refilled; replies that
the judge failed to give and rollouts lost to it; trajectories logged. The two runs must agree to the bit in metrics (except
times, memory and compile counts), trajectories, and all arrays of the last checkpoint and of the final model.

Writes benchmarks/results/real_use.json. Meant to take about 10 minutes on two free cores.
"""

import base64
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import common
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pyarrow
import pyarrow.parquet
import survival
import yaml
from PIL import Image

from imagent_jax import train
from imagent_jax.chat import QWEN
from imagent_jax.chat.answers import answer_markup
from imagent_jax.config import Config
from imagent_jax.model import checkpoint
from imagent_jax.model.families import read_config
from imagent_jax.model.features import Pages
from imagent_jax.model.vlm import create
from imagent_jax.rollout.episode import Episode
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.resources import CompileCounter
from imagent_jax.tiny import world
from imagent_jax.types import Markup, Task

sys.path.append(str(Path(__file__).parent.parent / "tests"))

GROUPS, GROUP_SIZE, REFILL, CALLS = 3, 4, 2, 4
"""Tasks a step, rollouts of each, spare tasks, most calls of a rollout."""
MARKERS = {"image": 151_655, "video": 151_656, "vision_start": 151_652, "vision_end": 151_653}
FAMILIES = {
    "Qwen2.5-VL": {
        "model_type": "qwen2_5_vl", "freeze_vision": True, "patch_size": 14,
        "vision_config": {"intermediate_size": 64, "window_size": 112, "fullatt_block_indexes": [1], "patch_size": 14},
    },
    "Qwen3-VL": {
        "model_type": "qwen3_vl", "freeze_vision": False, "patch_size": 16,
        "vision_config": {"intermediate_size": 64, "deepstack_visual_indexes": [0], "patch_size": 16},
    },
}  # fmt: skip
"""What a family has of its own: its tower, and whether it stays as it is."""
END = 1.15
"""How much longer the shared direction is in the embedding of `<|im_end|>`, so that a turn has about ten tokens."""


# ---- the model ------------------------------------------------------------------------------------------------------


def write_model(folder: Path, family: str, seed: int = 0) -> int:
    """Write a checkpoint of random weights with Qwen's own tokenizer; returns the number of its parameters.

    All embeddings share a direction. That of `<|im_end|>` has more of it (`END`), so that turns end.
    """
    from qwen_vocabulary import ROWS, qwen_processor

    own, width = FAMILIES[family], 32
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    config = {f"{name}_token_id": number for name, number in MARKERS.items()} | {
        "model_type": own["model_type"], "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": ROWS, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, "tie_word_embeddings": True,
        },
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": width} | own["vision_config"],
    }  # fmt: skip
    processor, rng = qwen_processor(family), np.random.default_rng(seed)
    model, params = create(read_config(config), seed)
    text, shared = params["text"], rng.choice([-2.0, 2.0], width)
    embed = rng.standard_normal((ROWS, width)) + shared
    embed[processor.encode(Markup("<|im_end|>"))] += END * shared
    text["embed"] = text["embed"].replace(jax.numpy.asarray(embed / width**0.5, "float32"))
    for name in ("o", "down"):  # layers change little of what an embedding says
        text["layers"][name] = text["layers"][name].replace(0.2 * text["layers"][name][...])
    checkpoint.save(folder, model, params)
    processor.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": own["patch_size"], "merge_size": 2}))
    return sum(x.size for x in jax.tree.leaves(params))


# ---- the tasks ------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, rng: np.random.Generator) -> list[Path]:
    """Write parts of the tiny world's photographs, enlarged to 1 to 4 megapixels, as JPEG."""
    sources = sorted((Path(world.__file__).parent / "assets/world/photos").glob("*.jpg"))
    made = []
    for i in range(count):
        with Image.open(sources[i % len(sources)]) as source:
            pixels, ratio = rng.uniform(1e6, 4e6), rng.uniform(0.5, 2.0)
            width, height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
            left, top = rng.uniform(0, 0.4, 2) * source.size
            box = (left, top, left + 0.6 * source.width, top + 0.6 * source.height)
            made.append(folder / f"photo-{i:02d}.jpg")
            source.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box).save(made[-1], quality=85)
    return made


def write_sources(folder: Path, rows: int, rng: np.random.Generator) -> tuple[dict, Counter]:
    """Write `rows` training tasks and 2 held-out ones of each source. Returns `data.mixture`, and training tasks by images."""
    photos, images = photographs(folder, 32, rng), Counter()
    writers = {"charts": verl_parquet, "maps": trl_lines, "quiz": vlmevalkit_tsv, "words": own_lines}
    for name, write in writers.items():
        (folder / name).mkdir()
        for split, count in (("train", rows), ("test", 2)):
            least = 0 if name == "words" else 1
            shown = [[photos[j] for j in rng.choice(len(photos), rng.integers(least, 9), replace=False)] for _ in range(count)]
            write(folder / name / split, [(f"{split} {i}", paths) for i, paths in enumerate(shown)])
            images.update(len(paths) for paths in shown if split == "train")
    judged = {"answer": 0.0, "judge": 1.0}
    return {
        "charts": {"path": str(folder / "charts"), "weight": 2.0},
        "maps": {"path": str(folder / "maps"), "reward": judged},
        "quiz": {"path": str(folder / "quiz"), "tools": ["visual_confirmation"]},
        "words": {"path": str(folder / "words"), "weight": 2.0, "reward": judged},
    }, images  # fmt: skip


def verl_parquet(path: Path, rows: list) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([
        {"prompt": [{"role": "user", "content": f"{'<image>' * len(paths)}How many bars has chart {name}?"}],
         "images": [{"bytes": p.read_bytes()} for p in paths], "data_source": "bars",
         "reward_model": {"style": "rule", "ground_truth": str(zlib.crc32(name.encode()) % 90)}}
        for name, paths in rows
    ]), path.with_suffix(".parquet"))  # fmt: skip


def trl_lines(path: Path, rows: list) -> None:
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps(
        {"prompt": [{"role": "user", "content": [*[{"type": "image"}] * len(paths),
                                                 {"type": "text", "text": f"Which place does map {name} show?"}]}],
         "images": [str(p) for p in paths], "solution": f"<answer>place {name}</answer>"})
        for name, paths in rows))  # fmt: skip


def vlmevalkit_tsv(path: Path, rows: list) -> None:
    with open(path.with_suffix(".tsv"), "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "answer", "category"])
        for name, paths in rows:
            coded = [base64.b64encode(p.read_bytes()).decode() for p in paths]
            table.writerow([name, str(coded), f"What is in quiz {name}?", "a cat", "a rocket", "a wall", "B", "things"])


def own_lines(path: Path, rows: list) -> None:
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps(
        {"uid": name, "question": f"Name the word of {name}.", "images": [str(p) for p in paths],
         "answer": [f"word {name}", f"the word {name}"], "tools": None if paths else []})
        for name, paths in rows))  # fmt: skip


# ---- what rollouts say ----------------------------------------------------------------------------------------------


def said(task, rollout: int, turn: int) -> str:
    """How a turn of a rollout reads. All rollouts of every third task answer right at once, so that their group is flat."""
    rng = np.random.default_rng(zlib.crc32(f"{task.uid}/{rollout}".encode()))
    calls, last = rng.integers(0, CALLS + 1), rng.random()
    if zlib.crc32(task.uid.encode()) % 3 == 0:
        calls, last = 0, 0.0
    if turn >= calls:
        right = f"It is {task.answer}" if "judge" in task.reward and rollout % 2 else task.answer
        return "I cannot tell.<|im_end|>" if last > 0.9 else answer_markup(right if last < 0.5 else "none") + "<|im_end|>"
    rng = np.random.default_rng([zlib.crc32(f"{task.uid}/{rollout}".encode()), turn])
    image, (left, top), kind = int(rng.integers(1, len(task.images) + 2)), rng.integers(0, 600, 2).tolist(), rng.random()
    if kind < 0.1:
        return "<tool_call>{not JSON}</tool_call>"
    if kind < 0.3:
        return QWEN.render_call("visual_reflection", {"images": [image], "resolution": "low"})
    box = [left, top, int(rng.integers(left + 100, 1001)), int(rng.integers(top + 100, 1001))]
    return QWEN.render_call("visual_confirmation", {"image": image, "bbox_2d": box, "label": "it"})


class Reading:
    """A processor to which a turn of `count` tokens reads as `text`, spread over them evenly."""

    def __init__(self, processor, text: str, count: int):
        self.processor, self.text, self.count = processor, text, count

    def decode(self, ids) -> str:
        return self.text[: len(self.text) * len(ids) // self.count]

    def __getattr__(self, name: str):
        return getattr(self.processor, name)


def speak(said: Callable[[Task, int, int], str]) -> None:
    """From now on, turns of this process's rollouts read as `said(task, rollout, turn)`, whatever tokens were sampled."""
    end = Episode.end_turn

    def end_turn(episode, ids):
        rules, text = episode.rules, said(episode.task, episode.rollout, len(episode.turns))
        full = episode.length + len(ids) >= rules.response_tokens
        closed = ids[-1:].tolist() == rules.processor.encode(rules.chat.turn_close)
        text = text if closed or not full else text[: len(text) // 2]  # cut off where the response is full
        episode.rules = rules._replace(processor=Reading(rules.processor, text, len(ids)))
        action = end(episode, ids)
        episode.rules = rules
        return action

    Episode.end_turn = end_turn


def job(flags: list[str]) -> int:
    """The main job, in which turns read as `said` does. A record of metrics holds two more, since the start: `compile/all`,
    programs, and `memory/pages_left`, pages of encoded images that left the device."""
    log, put = RunFolder.log, Pages.__setitem__
    compiled, left = CompileCounter(), Counter()

    def set_page(pages, number, array):
        before = len(pages.host)
        put(pages, number, array)
        left["pages"] += len(pages.host) > before

    def log_more(folder, record):
        log(folder, record | {"compile/all": compiled.count, "memory/pages_left": left["pages"]})

    Pages.__setitem__, RunFolder.log = set_page, log_more
    speak(said)
    return train.main(flags)


# ---- the judge ------------------------------------------------------------------------------------------------------


class Judge(ThreadingHTTPServer):
    """A judge that finds an answer right where it holds the reference. By the hash of a prompt, one in five is never answered,
    and one in five the first time only that a run asks.

    Attributes:
        replies: requests by run (the name of the model) and what came of them.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.replies, self.asked, self.lock = Counter(), Counter(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def outcome(self, run: str, prompt: str) -> str:
        """Return "scored", or how a request fails."""
        with self.lock:
            self.asked[run, prompt] += 1
            kind, again = zlib.crc32(prompt.encode()) % 5, self.asked[run, prompt] > 1
            fails = "What is 2 + 3?" not in prompt and (kind == 0 or (kind == 1 and not again))
            found = ("unavailable", "no score")[len(prompt) % 2] if fails else "scored"
            self.replies[run, found] += 1
            self.replies[run, "again"] += again
        return found


class JudgeHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        lines = dict(line.split(": ", 1) for line in prompt.splitlines() if ": " in line)
        right = any(reference in json.loads(lines["Answer"]) for reference in json.loads(lines["Reference answers"]))
        outcome = self.server.outcome(body["model"], prompt)
        said = json.dumps({"reason": "compared", "score": float(right)}) if outcome == "scored" else "Who can say."
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()
        self.send_response(503 if outcome == "unavailable" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


# ---- the runs -------------------------------------------------------------------------------------------------------


def settings(folder: Path, family: str, mixture: dict, url: str, steps: int) -> dict:
    """The configuration of a run; its name and what belongs to it are flags."""
    return {
        "run": {"dir": str(folder), "steps": steps, "checkpoint_every": 1, "log_trajectories": 1000,
                "compile_cache": str(folder / "programs")},
        "model": {"path": str(folder / "model"), "freeze_vision": FAMILIES[family]["freeze_vision"]},
        "images": {"max_pixels": 50_176, "vision_block": 256, "pack_blocks": 2, "pages": 2},
        "data": {"name": "files", "mixture": mixture, "curriculum": "pass_rate", "cache_dir": str(folder / "verdicts")},
        "tools": {"max_turns": 3, "max_images": 10, "low_pixels": 12_544, "high_pixels": 50_176, "confirm_min_pixels": 12_544,
                  "confirm_max_pixels": 25_088, "timeout_s": 600.0, "patience_s": 600.0},
        "rollout": {"groups": GROUPS, "group_size": GROUP_SIZE, "refill": REFILL, "prompt_tokens": 1280, "response_tokens": 320,
                    "observation_tokens": 96, "decode_chunk": 16},
        "judge": {"base_url": url, "retries": 1},
        "grpo": {"minibatches": 1, "length_buckets": 2},
        "optim": {"learning_rate": 1e-4, "warmup_steps": 0},
        "eval": {"every": 3, "tasks": 4, "during": 2, "groups": 2},
    }  # fmt: skip


def start(folder: Path, name: str, *flags: str) -> subprocess.Popen:
    """The job of `folder`/settings.yaml in a process of its own, which resumes where there is something to resume."""
    resume = ["--run.resume=true"] if (folder / name / "config.yaml").is_file() else []
    command = [sys.executable, __file__, "--job", f"--config={folder}/settings.yaml", f"--run.name={name}", *resume]
    command += [f"--judge.model={name}", f"--judge.cache_dir={folder}/judge/{name}", *flags]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def survive(folder: Path, kills: int, seed: int, startup: float, span: float, *flags: str) -> list[dict]:
    """The run "struck", killed `kills` times, each within `span` seconds after its first step, or while it starts."""
    rng, log, strikes = random.Random(seed), folder / "struck.log", []
    for _ in range(kills):
        strikes.append(survival.strike(start(folder, "struck", *flags), log, signal.SIGKILL, rng, startup, span / 1.5))
        print(f"killed: {strikes[-1]}", flush=True)
    survival.finish(start(folder, "struck", *flags), log)
    return strikes


def records(run: Path) -> list[dict]:
    """The metrics of all steps of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "reward/total" in line]


def differences(a: Path, b: Path) -> list[str]:
    """In what two runs differ: `survival.differences`, and files of trajectories and their images."""
    digests = [
        {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / "trajectories").rglob("*.*")}
        for run in (a, b)
    ]
    changed = sorted({path for path, _ in digests[0].items() ^ digests[1].items()})
    return survival.differences(a, b) + changed


def drawn(run: Path, step: int) -> dict[str, int]:
    """Rows used by source, as the last checkpoint has them: those drawn, less those left out and those given back."""
    with ocp.training.Checkpointer((run / "checkpoints").absolute()) as manager:
        state = manager.metadata(step).custom_metadata["iterator"]["sources"]
    return {name: own["next"] - own["skipped"] - len(own["returned"]) for name, own in state.items()}


def counted(run: Path, steps: int) -> dict:
    """What a run did, from the files that it left.

    Raises:
        ValueError: something is lost: a step, a row that was drawn, a trajectory, an image.
    """
    found, logged, shape = records(run), [], Config.from_yaml((run / "config.yaml").read_text()).rollout
    for step in range(1, steps + 1):
        lines = (run / "trajectories" / f"train-{step:06d}.jsonl").read_text().splitlines()
        logged.append([json.loads(line) for line in lines])
    flat = [record for step in logged for record in step]
    used, refilled = drawn(run, steps), int(sum(r["groups/refilled"] for r in found))
    named = {image["file"] for record in flat for image in record["images"] if "file" in image}
    for what, here, wanted in (
        ("steps", [r["step"] for r in found], [*range(1, steps + 1)]),
        ("rows", sum(used.values()), steps * shape.groups + refilled),
        ("trajectories by step", [len(step) for step in logged], [shape.groups * shape.group_size] * steps),
        ("images that trajectories name", len([f for f in named if (run / "trajectories/images" / f).is_file()]), len(named)),
        ("faults of the data", (run / "data_faults.txt").exists(), False),
    ):  # fmt: skip
        if here != wanted:
            raise ValueError(f"{what}: {here}, not {wanted}")
    compiled = [r["compile/all"] for r in found]
    calls = Counter(turn["call"]["status"] for record in flat for turn in record["turns"] if turn["call"])
    return {
        "rows_used": used, "groups_refilled": refilled, "trajectories": len(flat), "ends": dict(Counter(r["end"] for r in flat)),
        "calls": dict(calls), "rollouts_by_images": dict(sorted(Counter(len(r["images"]) for r in flat).items())),
        "images_logged": len(named), "pages_left_device": found[-1]["memory/pages_left"],
        "compiled_until_first_step": compiled[0], "compiled_after_it": compiled[-1] - compiled[0],
        "compiled_in_steps": [int(r["compile/count"]) for r in found],
        "resident_gb": [round(r["memory/resident_gb"], 3) for r in found],
        "step_s": [round(r["time/step"], 2) for r in found],
    }  # fmt: skip


def measure(folder: Path, family: str, steps: int, kills: int, seed: int = 0, *flags: str) -> dict:
    """Both runs of a family, in `folder`. `flags`: of the main job."""
    rng, began, judge = np.random.default_rng(seed), time.perf_counter(), Judge()
    parameters = write_model(folder / "model", family)
    mixture, images = write_sources(folder, steps, rng)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings(folder, family, mixture, judge.url, steps)))
    print(f"{family}: {parameters / 1e6:.1f} M parameters, {4 * steps} tasks written. The whole run begins.", flush=True)
    started = time.perf_counter()
    survival.finish(start(folder, "whole", *flags), folder / "whole.log")
    record = {"parameters": parameters, "tasks_by_images": dict(sorted(images.items()))} | counted(folder / "whole", steps)
    step = float(np.median(record["step_s"]))
    startup = time.perf_counter() - started - steps * step
    print(f"{family}: {steps} steps of {step:.1f} s; {startup:.0f} s besides. The other run begins.", flush=True)
    strikes = survive(folder, kills, seed, startup / 2, step * steps / (kills + 1) / 2, *flags)
    lost = counted(folder / "struck", steps)
    judge.shutdown()
    replies = {run: {what: n for (of, what), n in sorted(judge.replies.items()) if of == run} for run in ("whole", "struck")}
    return record | {
        "judge": replies, "kills": strikes, "compiled_after_first_step_of_last_start": lost["compiled_after_it"],
        "differences": differences(folder / "whole", folder / "struck"), "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--family", choices=FAMILIES, action="append", help="of these only (default: both)")
    options.add_argument("--steps", type=int, default=8, help="training steps")
    options.add_argument("--kills", type=int, default=3, help="times a run is killed")
    args = options.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.quick:
        args.steps, args.kills = 3, 1
    found = {}
    for family in args.family or FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            found[family] = measure(Path(scratch), family, args.steps, args.kills)
    common.report("real_use", args, {"steps": args.steps, "families": found})
    rows = [
        (family, r["compiled_until_first_step"], r["compiled_after_it"], max(r["resident_gb"]), sum(r["rows_used"].values()),
         r["groups_refilled"], r["trajectories"], r["ends"].get("FAULT", 0), len(r["kills"]), len(r["differences"]))
        for family, r in found.items()
    ]  # fmt: skip
    columns = ("", "compiled", "later", "GB", "rows", "refilled", "trajectories", "faults", "killed", "differences")
    common.show("Runs shaped like real use", columns, rows)
    for family, r in found.items():
        print("\n".join([f"{family}: {what}" for what in r["differences"]]) or f"{family}: identical to the bit.")
    sys.exit(any(r["differences"] or r["compiled_after_it"] for r in found.values()))


if __name__ == "__main__":
    sys.exit(job(sys.argv[2:])) if sys.argv[1:2] == ["--job"] else main()
