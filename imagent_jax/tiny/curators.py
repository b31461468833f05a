"""The embedded agents of curation: they know the scenes of the tiny world's pictures, and are right most of the time.

No model runs here. A picture is found by its file, a tag in a crop by its exact pixels, so that an agent sees what the images of
its conversation show and nothing else: in a crop the tags that are whole in it, without images no tag. What an agent does with
that, `curators_answers` says.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagent_jax.config.settings import setting
from imagent_jax.tiny.curators_answers import Seen, around, known_from_text, proposals, solve
from imagent_jax.tiny.world import TAG_BORDER, TAG_SIDE, Tag, encode_image, make_scene

SCENES = "scenes.json"
"""File beside the pictures: tags by SHA-256 of the picture's file."""
_WORDS = {"question": re.compile(r"Question: (.*)"), "answer": re.compile(r"^Answer: (.*)", re.M)}


def make_pictures(folder: Path, count: int, seed: int) -> None:
    """Write pictures of the tiny world: `count` of the training split to `folder`, a quarter as many of the test split beside it.

    The folder of the test split is `<folder>_test`. Each has `scenes.json`, which `TinyCurators` reads, and `licences.csv`.
    """
    for code, (split, place, number) in enumerate(
        (("train", folder, count), ("test", folder.with_name(f"{folder.name}_test"), max(1, count // 4)))
    ):
        place.mkdir(parents=True, exist_ok=True)
        scenes, rows = {}, ["file,licence,origin,photo"]
        for index in range(number):
            scene = make_scene(np.random.default_rng((seed, code, index)), split)
            data, name = encode_image(scene.pixels), f"{split}-{index:05d}.jpg"
            (place / name).write_bytes(data)
            scenes[hashlib.sha256(data).hexdigest()] = [dataclasses.asdict(tag) for tag in scene.tags]
            rows.append(f"{name},see tiny/assets/world/README.md,tiny world {split} {index},{scene.photo}")
        (place / "licences.csv").write_text("\n".join(rows) + "\n")
        (place / SCENES).write_text(json.dumps(scenes))  # last: with it the folder is whole


@dataclass(frozen=True)
class TinyCuratorsSettings:
    """The embedded agents."""

    folders: tuple[str, ...] = setting((), "folders of pictures that `make_pictures` wrote")
    misread: float = setting(0.02, "chance that an answerer or attacker misreads a digit", least=0, most=1)
    glance: float = setting(0.15, "chance that an answerer misreads a digit which it sees without a crop", least=0, most=1)
    slip: float = setting(0.02, "chance that the proposer misreads a digit of its own question", least=0, most=1)
    seed: int = setting(0, "seed of all mistakes")


class TinyCurators:
    """A `curation.agents.Backend`. Its answers are a function of the conversation and the settings.

    Raises:
        ValueError: a folder has no scenes.
    """

    Settings = TinyCuratorsSettings

    def __init__(self, settings: TinyCuratorsSettings):
        self.settings = settings
        self.scenes: dict[str, tuple[Tag, ...]] = {}
        if not settings.folders:
            raise ValueError("agents.settings.folders is empty; name the folders of pictures that the agents shall know.")
        for folder in settings.folders:
            path = Path(folder).expanduser() / SCENES
            if not path.is_file():
                raise ValueError(f"{path} does not exist; make the pictures with pool.make (docs/mifg_qa.md).")
            self.scenes |= {key: tuple(Tag(**tag) for tag in tags) for key, tags in json.loads(path.read_text()).items()}

    def complete(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """See `Backend.complete`."""
        parts = [part for message in messages[1:] if isinstance(message["content"], list) for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        seed = hashlib.sha256(json.dumps([self.settings.seed, schema["title"], *messages[1:]]).encode()).digest()
        luck = np.random.default_rng(np.frombuffer(seed, np.uint32))
        task = getattr(self, f"_{schema['title']}", None)
        if task is None:
            raise ValueError(f"The embedded agents have no role {schema['title']!r}.")
        return task(self._images(parts), "\n".join(texts), luck)

    # ---- seeing -------------------------------------------------------------------------------------------------------

    def _images(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Tag, ...]]:
        """Return the tags of each image of a conversation by the line that stands above it; "" where there is none."""
        found, above = {}, ""
        for part in parts:
            if part["type"] == "text":
                above = part["text"]
            else:
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                key = hashlib.sha256(data).hexdigest()
                found[above.removesuffix(":")] = self.scenes[key] if key in self.scenes else self._in_crop(data)
                above = ""
        return found

    @functools.cached_property
    def _tiles(self) -> dict[bytes, Tag]:
        """The tags of all pictures by the pixels of their middle."""
        tiles = {}
        for folder in self.settings.folders:
            for file in sorted(Path(folder).expanduser().glob("*.jpg")):
                data = file.read_bytes()
                if tags := self.scenes.get(hashlib.sha256(data).hexdigest()):
                    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    for tag in tags:
                        side = TAG_SIDE + 2 * TAG_BORDER
                        left = round(tag.x * pixels.shape[1] - side / 2) + TAG_BORDER
                        top = round(tag.y * pixels.shape[0] - side / 2) + TAG_BORDER
                        tiles[pixels[top : top + TAG_SIDE, left : left + TAG_SIDE].tobytes()] = tag
        return tiles

    def _in_crop(self, data: bytes) -> tuple[Tag, ...]:
        """Return the tags that are whole in a crop of a picture: places of strong colour that are a tag's, pixel for pixel."""
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        strong = np.ptp(pixels.astype(np.int16), axis=2) > 60
        found: dict[int, Tag] = {}
        side = TAG_SIDE
        if min(pixels.shape[:2]) < side:
            return ()
        sums = np.pad(strong.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        for top, left in np.argwhere(inside > 0.5 * side * side):
            tile = pixels[top : top + side, left : left + side].tobytes()
            if (tag := self._tiles.get(tile)) is not None:
                x, y = (left + side / 2) / pixels.shape[1], (top + side / 2) / pixels.shape[0]
                found[id(tag)] = dataclasses.replace(tag, x=x, y=y)
        return tuple(found.values())

    def _seen(self, images: Mapping[str, tuple[Tag, ...]], chance: float, luck: np.random.Generator) -> Seen:
        """Return what an agent reads of numbered images: tags by image, digits misread with some chance."""
        return {
            int(name.removeprefix("Image ")): tuple(_read(tag, chance, luck) for tag in tags)
            for name, tags in images.items()
            if re.fullmatch(r"Image \d+", name)
        }

    # ---- roles, by title of the schema --------------------------------------------------------------------------------

    def _proposal(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Propose one of all sound questions about the images: another one for each of the earlier ones."""
        truth = self._seen(images, 0.0, luck)
        every = proposals(truth)
        if not every:  # what is no question is dropped as such
            return {"question": "", "answer": "", "answer_type": "exact", "kind": "read", "several": False, "evidence": []}
        key = hashlib.sha256(json.dumps([self.settings.seed, sorted(images)]).encode() + repr(truth).encode()).digest()
        earlier = re.search(r"There are (\d+) earlier", text)
        order = _mixed(every, np.random.default_rng(np.frombuffer(key, np.uint32)))
        made = order[(int(earlier[1]) if earlier else 0) % len(every)]
        answers = solve(made["question"], self._seen(images, self.settings.slip, luck))
        return made | {"answer": answers[0] if answers else made["answer"]}

    def _answer(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Answer. Digits that a crop shows are read better than those of the whole images."""
        seen = self._seen(images, self.settings.glance, luck)
        for name, tags in images.items():
            if part := re.search(r"Part \[.*\] of Image (\d+)", name):
                number, close = int(part[1]), {tag.colour: _read(tag, self.settings.misread, luck) for tag in tags}
                seen[number] = tuple(close.get(tag.colour, tag) for tag in seen[number])
        return _answered(_among(text, solve(_question(text), seen)))

    def _answer_or_look(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Ask for a crop of the first tag that the question needs and that no crop has shown yet; else answer."""
        known = self._seen(images, 0.0, luck)
        shown = {
            (int(part[1]), tag.colour)
            for name, tags in images.items()
            if (part := re.search(r"Part \[.*\] of Image (\d+)", name))
            for tag in tags
        }
        for number, tag in _needed(_question(text), known):
            if (number, tag.colour) not in shown:
                return {"look": {"image": number, "box": around(tag)}, "answer": "", "sure": False}
        return {"look": None, **self._answer(images, text, luck)}

    def _text_attack(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Answer from the words alone."""
        found = known_from_text(_question(text))
        return _answered(_among(text, [found])) if found else {"answer": str(luck.integers(10)), "sure": False}

    def _image_attack(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Answer from one image, if the question needs no other."""
        return _answered(_among(text, solve(_question(text), self._seen(images, self.settings.misread, luck))))

    def _other_attack(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Name another answer to the same words. Nothing is misread with twice the chance of others: it looks at all twice."""
        answers = _among(text, solve(_question(text), self._seen(images, self.settings.misread**2, luck)))
        claim = _WORDS["answer"].search(text)
        others = [answer for answer in answers if claim and answer != claim[1]]
        several = len(answers) > 1
        return {"other": others[0] if several and others else "", "vague": not answers, "why": f"It fits {len(answers)} answers."}

    def _crop(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Read a crop: its one tag's colour or digit."""
        tags = [tag for shown in images.values() for tag in shown]
        wanted = re.search(r"on the (\w+) tag", _question(text))
        fitting = [tag for tag in tags if not wanted or tag.colour == wanted[1]]
        if len(fitting) != 1:
            return {"answer": "cannot tell"}
        tag = _read(fitting[0], self.settings.misread**2, luck)
        return {"answer": str(tag.digit) if wanted else tag.colour}

    def _repair(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Write one of the sound questions in place of the faulty one: the nearest in kind, with the same words where it can."""
        claim = json.loads(text.partition("The question:\n")[2].partition("\n\nFound:")[0])
        every = proposals(self._seen(images, self.settings.misread**2, luck))
        nearest = [q for q in every if q["question"] == claim["question"]] or [q for q in every if q["kind"] == claim["kind"]]
        return [*nearest, *every, claim][0]

    def _distractors(self, images: Mapping[str, tuple[Tag, ...]], text: str, luck: np.random.Generator) -> dict[str, Any]:
        """Write options of the answer's own sort."""
        claim = _WORDS["answer"].search(text)
        answer = claim[1] if claim else ""
        if answer.isdigit():
            near = [n for n in range(max(0, int(answer) - 6), int(answer) + 7) if n != int(answer)]
            return {"options": [str(n) for n in luck.permutation(near)]}
        if answer.startswith("Image "):
            return {"options": [name for name in sorted(images) if name != answer] + ["none of them", "all of them"]}
        words = ["yes", "no", "it cannot be seen"] if answer in ("yes", "no") else ["red", "green", "blue", "yellow", "purple"]
        return {"options": [word for word in words if word != answer]}


def _mixed(every: Sequence[dict[str, Any]], luck: np.random.Generator) -> list[dict[str, Any]]:
    """Return proposals in a random order in which kinds take turns."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for i in luck.permutation(len(every)):
        kinds.setdefault(every[i]["kind"], []).append(every[i])
    return [one for row in itertools.zip_longest(*kinds.values()) for one in row if one]


def _question(text: str) -> str:
    found = _WORDS["question"].search(text)
    return found[1] if found else ""


def _among(text: str, answers: Sequence[str]) -> list[str]:
    """Return answers as they are, or of a question with options the letters of those that stand there."""
    options = {option: letter for letter, option in re.findall(r"^([A-Z])\. (.*)$", text, re.M)}
    return [options[answer] for answer in answers if answer in options] if options else [*answers]


def _read(tag: Tag, chance: float, luck: np.random.Generator) -> Tag:
    wrong = luck.random() < chance
    other = int(luck.integers(1, 10))
    return dataclasses.replace(tag, digit=(tag.digit + other) % 10) if wrong else tag


def _answered(answers: Sequence[str]) -> dict[str, Any]:
    """An answer, sure where there is exactly one."""
    return {"answer": answers[0] if answers else "cannot tell", "sure": len(answers) == 1}


def _needed(question: str, seen: Seen) -> list[tuple[int, Tag]]:
    """Return the tags whose digits a question names by colour, by image."""
    colours = set(re.findall(r"\b(red|green|blue|yellow|purple|orange) tag", question))
    named = {int(n) for n in re.findall(r"Image (\d+)", question)} or set(seen)
    if not re.search(r"digit|sum|[Aa]dd|[Rr]ead", question):
        return []
    return [(n, tag) for n in sorted(named & set(seen)) for tag in seen[n] if tag.colour in colours]
