"""Curation of the tiny world with planted faults: precision and recall of each filter, and sound questions lost.

Proposals are spoilt on their way to the pipeline, 5 % by each fault; neither filters nor agents know which. Pictures of the test
split are put among those of the pool, half of them compressed again. The agents that answer and attack know the scenes of the
pictures and misread now and then (`tiny.curators`), so the table measures the filters and the pipeline, not a model's eyes.
Unspoilt proposals are sound by construction: the proposer makes no slips here.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from imagent_jax.curation.groups import Group, make_groups
from imagent_jax.curation.pipeline import curate, is_kept
from imagent_jax.curation.pool import Pool, build_pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.settings import Curation
from imagent_jax.tiny.curators import TinyCurators, TinyCuratorsSettings, make_pictures
from imagent_jax.tiny.curators_answers import around, solve
from imagent_jax.tiny.world import COLOURS, Tag

CAUGHT_BY = {
    "wrong answer": "agreement", "answer in the question": "answer_in_question", "one image suffices": "needs_several",
    "text suffices": "needs_images", "two right answers": "other_answer", "wrong box": "box", "duplicate": "duplicate",
    "image of the test split": "benchmark",
}  # fmt: skip
"""The filter that is meant to catch each fault."""
SHARE = 0.05
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RIDDLES = {
    2: ["as many as a bicycle has wheels"], 3: ["as many as a triangle has sides", "as many as an octopus has hearts"],
    4: ["as many as a car has wheels", "as many as there were Beatles"], 5: ["as many as a hand has fingers"],
    6: ["as many as an insect has legs"], 7: ["as many as a week has days", "as many as the world has wonders"],
    8: ["as many as a spider has legs"], 9: ["as many as there are muses"],
}  # fmt: skip
"""Clauses that give a number away. The embedded agents do not know all of them."""


class Counted:
    """A backend that counts its calls."""

    def __init__(self, inner):
        self.inner, self.calls, self.lock = inner, Counter(), threading.Lock()

    def complete(self, messages, schema):
        with self.lock:
            self.calls[schema["title"]] += 1
        return self.inner.complete(messages, schema)


class Planter:
    """A proposer whose proposals are spoilt by a plan: fault by number of the proposal."""

    def __init__(self, inner, plan: Mapping[int, str], groups: Sequence[Group], scenes: Mapping[str, Sequence[Tag]]):
        self.inner, self.plan, self.groups, self.scenes = inner, plan, groups, scenes

    def complete(self, messages, schema):
        text = messages[1]["content"][-1]["text"]
        number = int(re.search(r"Proposal (\d+)", text)[1])
        fault = self.plan.get(number)
        if fault is None:
            return self.inner.complete(messages, schema)
        luck = np.random.default_rng((7, number))
        earlier, place = divmod(number, len(self.groups))
        seen = {n: self.scenes[image] for n, image in enumerate(self.groups[place].images, 1)}

        def proposal(count: int) -> dict[str, Any]:
            content = [
                *messages[1]["content"][:-1],
                {"type": "text", "text": re.sub(r"There are \d+", f"There are {count}", text)},
            ]
            return self.inner.complete([messages[0], {"role": "user", "content": content}], schema)

        if fault == "duplicate":
            return duplicate(proposal(earlier - 1), luck)
        for count in [earlier, *range(20, 60)]:  # the first that can be spoilt so; later ones are asked of nobody else
            if made := SPOILERS[fault](proposal(count), seen, luck):
                return made
        raise ValueError(f"no proposal about {place} can be spoilt by {fault!r}")


def wrong_answer(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict:
    answer = made["answer"]
    if made["answer_type"] == "number":
        most = 9 if made["kind"] == "read" else max(18 if made["kind"] == "sum" else len(seen), int(answer) + 1)
        others = [str(n) for n in range(most + 1) if str(n) != answer]
    elif re.fullmatch(r"Image \d+", answer):
        named = [f"Image {n}" for n in re.findall(r"Image (\d+)", made["question"])] or [f"Image {n}" for n in seen]
        others = [name for name in named if name != answer]
    elif answer in ("yes", "no"):
        others = ["no" if answer == "yes" else "yes"]
    elif answer in COLOURS:
        others = [colour for colour in COLOURS if colour != answer]
    else:
        names = answer.split(", ")
        others = [", ".join([*names[1:], names[0]])]
    return made | {"answer": str(luck.choice(others))}


def answer_in_question(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict:
    words, end, answer = made["question"][:-1], made["question"][-1], made["answer"]
    forms = f"{words} (it is {answer}){end}", f"The tags say {answer}. {words}{end}", f"{words}, {answer} or not{end}"
    return made | {"question": str(luck.choice(forms))}


def one_image(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict | None:
    if made["kind"] not in ("read", "locate") or made["several"]:
        return None
    used = {place["image"] for place in made["evidence"]}
    others = [(n, tag) for n, tags in seen.items() if n not in used for tag in tags]
    if not others:
        return None
    number, tag = others[luck.integers(len(others))]
    place = {
        "image": number, "box": around(tag), "asks": f"What digit is on the {tag.colour} tag?", "shows": str(tag.digit),
    }  # fmt: skip
    return made | {"several": True, "evidence": [*made["evidence"], place]}


def text_suffices(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict | None:
    if made["answer_type"] != "number" or not 2 <= (n := int(made["answer"])) <= 9:
        return None
    a = int(luck.integers(1, n))
    sums = f"{NUMBERS[a]} plus {NUMBERS[n - a]}", f"half of {2 * n}", f"one more than {NUMBERS[n - 1]}", f"{n + 3} minus 3"
    return made | {"question": f"{made['question'][:-1]}, which is {luck.choice([*sums, *RIDDLES[n]])}?"}


def two_right(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict | None:
    common_to = [c for c in COLOURS if sum(any(tag.colour == c for tag in tags) for tags in seen.values()) > 1]
    if common_to and luck.random() < 0.5:
        colour = str(luck.choice(common_to))
        number, tag = next((n, tag) for n, tags in seen.items() for tag in tags if tag.colour == colour)
        article = "an" if colour == "orange" else "a"
        words, answer, kind, form = f"Which image has {article} {colour} tag?", f"Image {number}", "choice", "locate"
    else:
        number = int(luck.choice([*seen]))
        tag = seen[number][0]
        words, answer, kind, form = f"What digit is on the tag in Image {number}?", str(tag.digit), "number", "read"
        if len({tag.digit for tag in seen[number]}) == 1:
            return None
    place = {
        "image": number, "box": around(tag), "asks": f"What digit is on the {tag.colour} tag?", "shows": str(tag.digit),
    }  # fmt: skip
    return {"question": words, "answer": answer, "answer_type": kind, "kind": form, "several": False, "evidence": [place]}


def wrong_box(made: dict, seen: Mapping[int, Sequence[Tag]], luck: np.random.Generator) -> dict:
    """Move a box, far or so that it cuts the tag."""
    places = [dict(place) for place in made["evidence"]]
    place = places[luck.integers(len(places))]
    left, top, right, bottom = place["box"]
    by = 120 if luck.random() < 0.5 else int(luck.integers(250, 400))
    by = by if (left + right) / 2 < 500 else -by
    place["box"] = [max(0, left + by), top, min(1000, right + by), bottom]
    return made | {"evidence": places}


def duplicate(made: dict, luck: np.random.Generator) -> dict:
    words, (first, rest) = made["question"], (made["question"][0].lower(), made["question"][1:])
    forms = f"Look closely. {words}", f"Tell me: {first}{rest}", f"{words[:-1]}, please{words[-1]}"
    places = [place | {"box": [max(0, min(1000, edge + int(luck.integers(-8, 9)))) for edge in place["box"]]}
              for place in made["evidence"]]  # fmt: skip
    return made | {"question": str(luck.choice(forms)), "evidence": places}


SPOILERS = {
    "wrong answer": wrong_answer, "answer in the question": answer_in_question, "one image suffices": one_image,
    "text suffices": text_suffices, "two right answers": two_right, "wrong box": wrong_box,
}  # fmt: skip


# ---- the run ------------------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int, planted: int, seed: int = 0) -> None:
    """Write pictures of both splits, and `planted` of the test split among those for training."""
    make_pictures(folder, count, seed)
    test = folder.with_name(f"{folder.name}_test")
    scenes, known = (json.loads((place / "scenes.json").read_text()) for place in (folder, test))
    for number, file in enumerate(sorted(test.glob("*.jpg"))[:planted]):
        data = file.read_bytes()
        tags = known[hashlib.sha256(data).hexdigest()]
        if number % 2:
            Image.open(io.BytesIO(data)).save(out := io.BytesIO(), "JPEG", quality=70)
            data = out.getvalue()
        (folder / f"planted-{number:05d}.jpg").write_bytes(data)
        scenes[hashlib.sha256(data).hexdigest()] = tags
    (folder / "scenes.json").write_text(json.dumps(scenes))


def settings(folder: Path, proposals: int, name: str, **filters: Any) -> Curation:
    repairs = filters.pop("repairs", 0)
    return Curation.from_dict({
        "run": {"out": str(folder / name), "proposals": proposals, "parallel": 2},
        "pool": {"path": str(folder / "pictures")},
        "agents": {"repairs": repairs},
        "filters": {"benchmarks": [str(folder / "pictures_test")], "crop_side": 1, **filters},
    })  # fmt: skip


def plan_of(proposals: int, groups: Sequence[Group], tainted: set[str]) -> dict[int, str]:
    """Return the fault by number of the proposal. Groups with a picture of the test split have no other fault."""
    each, rng, plan = round(SHARE * proposals), np.random.default_rng(11), {}
    clean = [n for n in rng.permutation(proposals).tolist() if not set(groups[n % len(groups)].images) & tainted]
    for number in [n for n in clean if n >= len(groups)]:
        if len(plan) < each and number - len(groups) not in plan:
            plan[number] = "duplicate"
    held = {number - len(groups) for number in plan}
    left = iter([n for n in clean if n not in plan and n not in held])
    for fault in SPOILERS:
        plan |= {next(left): fault for _ in range(each)}
    return plan


def scenes_of(folder: Path, pool: Pool) -> dict[str, tuple[Tag, ...]]:
    known = json.loads((folder / "pictures" / "scenes.json").read_text())
    return {name: tuple(Tag(**tag) for tag in known[hashlib.sha256(pool.data(name)).hexdigest()]) for name in pool.pictures}


def run(cfg: Curation, plan_for: Planter | None, agents: Counted) -> tuple[dict[int, Question], dict]:
    backends = dict.fromkeys(("answerer", "attacker", "repairer", "distractors"), agents) | {"proposer": plan_for or agents}
    funnel = curate(cfg, backends, progress=lambda words: print(f"  {words}", flush=True))
    lines = (Path(cfg.run.out) / "questions.jsonl").read_text().splitlines()
    return {int(q.uid[1:]): q for q in map(Question.from_json, lines)}, funnel


def flagged_by(question: Question) -> set[str]:
    return {e.by.removeprefix("filter:") for e in question.history if e.by.startswith("filter:")}


def measure(proposals: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="curation-"))
    try:
        pictures(folder / "pictures", round(0.8 * proposals), round(0.016 * proposals))
        cfg = settings(folder, proposals, "all", stop_early=False)
        pool = build_pool(cfg.pool, 0, Path(cfg.run.out))
        groups, scenes = make_groups(cfg.groups, pool, 0), scenes_of(folder, pool)
        tainted = {name for name, picture in pool.pictures.items() if "planted" in picture.origin}
        plan = plan_of(proposals, groups, tainted)
        own = TinyCuratorsSettings(folders=(str(folder / "pictures"), str(folder / "pictures_test")), slip=0.0)
        faults = plan | {n: "image of the test split" for n in range(proposals) if set(groups[n % len(groups)].images) & tainted}
        result = {
            "proposals": proposals,
            "pictures": len(pool.pictures),
            "groups": len(groups),
            "agents": {name: value for name, value in dataclasses.asdict(own).items() if name != "folders"},
        }
        for name, options in (("all filters", {"stop_early": False}), ("as shipped", {"repairs": 1})):
            print(f"{name}:", flush=True)
            agents, began = Counted(TinyCurators(own)), time.perf_counter()
            made = settings(folder, proposals, "all" if name == "all filters" else "shipped", **options)
            if name == "as shipped":
                shutil.copytree(folder / "all" / "pool", folder / "shipped" / "pool")
                for file in ("pool.jsonl", "pool_dropped.json"):
                    shutil.copy(folder / "all" / file, folder / "shipped" / file)
            questions, funnel = run(made, Planter(agents, plan, groups, scenes), agents)
            result[name] = tables(questions, faults, scenes) | {
                "funnel": {filter: one["dropped"] for filter, one in funnel["filters"].items()},
                "seconds": round(time.perf_counter() - began, 1), "calls": dict(sorted(agents.calls.items())),
                "calls a kept question": round(agents.calls.total() / funnel["kept"], 2),
            }  # fmt: skip
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tables(questions: Mapping[int, Question], faults: Mapping[int, str], scenes: Mapping[str, Sequence[Tag]]) -> dict[str, Any]:
    """Return precision and recall of each filter, what escaped, and sound questions lost."""
    filters, escaped = {}, []
    for fault, name in CAUGHT_BY.items():
        planted = [n for n, one in faults.items() if one == fault]
        flagged = [n for n, question in questions.items() if name in flagged_by(question)]
        filters[fault] = {
            "filter": name, "planted": len(planted), "recall": share(sum(n in flagged for n in planted), len(planted)),
            "caught by any": share(sum(bool(flagged_by(questions[n])) for n in planted), len(planted)), "flagged": len(flagged),
            "precision": share(sum(faults.get(n) == fault for n in flagged), len(flagged)),
            "precision, any fault": share(sum(n in faults for n in flagged), len(flagged)),
        }  # fmt: skip
    for n, fault in faults.items():
        if is_kept(questions[n]) and not is_sound(questions[n], scenes):
            escaped.append(
                {"uid": questions[n].uid, "fault": fault, "question": questions[n].text, "answer": questions[n].answer}
            )
    sound = [question for n, question in questions.items() if n not in faults]
    lost = [question for question in sound if not is_kept(question)]
    repaired = [q for n, q in questions.items() if n in faults and is_kept(q) and is_sound(q, scenes)]
    return {
        "filters": filters, "planted": len(faults), "escaped": escaped, "repaired": len(repaired),
        "caught_share": round(1 - len(escaped) / len(faults), 4), "sound": len(sound), "lost": len(lost),
        "lost_share": round(len(lost) / len(sound), 4), "lost_by": dict(Counter(q.history[-1].by for q in lost)),
    }  # fmt: skip


def is_sound(question: Question, scenes: Mapping[str, Sequence[Tag]]) -> bool:
    """Return whether a planted question was repaired: rewritten, and right by the scenes."""
    seen = {n: tuple(scenes[image]) for n, image in enumerate(question.images, 1)}
    return any(e.what == "repaired" for e in question.history) and solve(question.text, seen) == [question.answer]


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proposals", type=int, default=1000)
    args = parser.parse_args()
    print(f"{args.proposals} proposals, {8 * SHARE:.0%} of them spoilt; writes benchmarks/results/curation.json.", flush=True)
    result = measure(args.proposals) | {"machine": common.machine()}
    path = common.RESULTS / "curation.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name in ("all filters", "as shipped"):
        one = result[name]
        print(f"\n{name}: {one['caught_share']:.1%} of {one['planted']} faults caught, {one['lost_share']:.1%} of {one['sound']} "
              f"sound questions lost")  # fmt: skip
        for fault, row in one["filters"].items():
            print(f"  {fault:26} {row}")
        print("  escaped", one["escaped"][:8], "lost by", one["lost_by"])


if __name__ == "__main__":
    main()
