"""HTML of about ten informative trajectories of a run: fixed by training, broken by training, and failed tool calls."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagent_jax.images.decode import data_uri
from imagent_jax.runs.reader import RunLog, step_of

Record = dict[str, Any]
Case = tuple[str, list[tuple[str, Record]]]
LARGEST_FILE, LARGEST_SIDE = 150_000, 768  # larger files (bytes) are embedded downscaled to this side (pixels)


def instructive(run: RunLog) -> list[Case]:
    """Return about ten cases: a title with one or two labelled trajectories each."""
    held_out = [stem for stem in run.trajectories if step_of(stem)[0] != "train"]
    cases: list[Case] = []
    if len(held_out) > 1:
        first, last = ({r["task"]: r for r in run.trajectories[stem]} for stem in (held_out[0], held_out[-1]))
        names = [step_of(stem)[0] for stem in (held_out[0], held_out[-1])]
        pairs = [(first[task], last[task]) for task in first if task in last]
        for title, was, now, most in (("Wrong before, right now", False, True, 4), ("Right before, wrong now", True, False, 2)):
            found = [pair for pair in pairs if pair[0]["right"] is was and pair[1]["right"] is now]
            found.sort(key=lambda pair: -len(_calls(pair[1], "EXECUTED")))
            cases += [(title, list(zip(names, pair, strict=True))) for pair in found[:most]]
    return cases + _misuse(run) + _spread(run)


def _calls(record: Record, status: str) -> list[dict[str, Any]]:
    return [turn["call"] for turn in record["turns"] if turn["call"] and turn["call"]["status"] == status]


def _misuse(run: RunLog) -> list[Case]:
    """Return cases of invalid calls, environment errors and dropped ends, newest first, each kind once."""
    wanted = {"An environment error": 1, "An invalid call": 2, "repeated": 1, "over turns": 1, "truncated": 1}
    cases, seen = [], set()
    for stem in reversed(run.trajectories):
        for record in run.trajectories[stem]:
            invalid, title = _calls(record, "INVALID"), record["end"].lower().replace("_", " ")
            if record["end"] == "FAULT":
                title, sort = "An environment error", "fault"
            elif invalid:
                title, sort = "An invalid call", invalid[0]["said"][0][:40]
            else:
                sort = title
            if sort not in seen and wanted.get(title, 0):
                seen.add(sort)
                wanted[title] -= 1
                (name, step), rollout = step_of(stem), record["rollout"]
                label = f"step {step}, rollout {rollout}" if name == "train" else name
                cases.append((title if title[0].isupper() else f"Ended: {title}", [(label, record)]))
    return sorted(cases, key=lambda case: case[0])[:4]


def _spread(run: RunLog) -> list[Case]:
    """Return the best and the worst rollout of the newest training group that has both right and wrong rollouts."""
    for stem in reversed(run.trajectories):
        if step_of(stem)[0] == "train":
            groups: dict[str, list[Record]] = {}
            for record in run.trajectories[stem]:
                groups.setdefault(record["task"], []).append(record)
            for group in groups.values():
                if len({r["right"] for r in group}) == 2:
                    pair = (max(group, key=_reward), min(group, key=_reward))
                    labels = [f"rollout {r['rollout']}, advantage {r['advantage']:+.2f}" for r in pair]
                    title = f"One group, step {step_of(stem)[1]}: the best and the worst rollout"
                    return [(title, list(zip(labels, pair, strict=True)))]
    return []


def _reward(record: Record) -> float:
    return record["rewards"].get("total", 0.0)


def source(images: list[Record], n: int) -> tuple[str, list[int]]:
    """Return the file from which image `n` is drawn, and the image's box in it (left, top, right, bottom; pixels)."""
    image = images[n - 1]
    if "file" in image:
        return image["file"], [0, 0, *image["size"]]
    file, up = source(images, image["parent"])
    return file, _shift(image["box"], up) if "box" in image else up


def within(images: list[Record], m: int, n: int) -> list[int] | None:
    """Return the box of image `m` in pixels of image `n`, its ancestor; None if there is none."""
    image = images[m - 1]
    whole = [0, 0, *image["size"]]
    if m == n:
        return whole
    if "parent" not in image or (up := within(images, image["parent"], n)) is None:
        return None
    if "box" not in image and image["size"] != images[image["parent"] - 1]["size"]:
        return None
    return _shift(image.get("box", whole), up)


def _shift(box: list[int], by: list[int]) -> list[int]:
    return [box[0] + by[0], box[1] + by[1], box[2] + by[0], box[3] + by[1]]


def names_image(line: str, call: dict[str, Any]) -> bool:
    """Return whether a line of a call's result names one of the images that the call shows."""
    return any(line == f"Image {n}" or line.startswith(f"Image {n}:") for n in call["images"])


def programs(call: Record | None) -> list[str]:
    """Return the arguments of a call that are programs or have several lines: in the turn's text, their line ends are "\\n"."""
    arguments = (call and call.get("arguments")) or {}
    return [v for name, v in arguments.items() if isinstance(v, str) and (name == "code" or "\n" in v)]


class Pictures:
    """Renders cases as HTML; every image file is embedded once. `path`: the folder of the run."""

    def __init__(self, path: Path):
        self.folder, self.sizes = path / "trajectories" / "images", {}

    def definitions(self) -> str:
        """Return the embedded image files, to which `svg` refers. Call it last."""
        return "".join(self._embed(name, *size) for name, size in self.sizes.items())

    def _embed(self, name: str, width: int, height: int) -> str:
        path, place = self.folder / name, f'id="{html.escape(name)}" width="{width}" height="{height}"'
        if not path.is_file():
            return f'<rect {place} fill="#8884" />'
        uri = data_uri(path.read_bytes(), LARGEST_SIDE, LARGEST_FILE)
        return f'<image {place} preserveAspectRatio="none" href="{uri}" />'

    def svg(self, images: list[Record], n: int, side: int, boxes: Sequence[tuple[list[int], str, bool]] = ()) -> str:
        """Return image `n` as SVG with labelled boxes.

        Args:
            side: longer side in CSS pixels.
            boxes: (box in pixels of the image, label, whether the rollout was right).
        """
        name, (left, top, right, bottom) = source(images, n)
        root = next(i for i in images if i.get("file") == name)
        self.sizes[name] = root["size"]
        w, h = right - left, bottom - top
        scale = side / max(w, h)
        drawn = "".join(
            f"<g class={'good' if well else 'bad'}><rect x={l + left} y={t + top} width={r - l} height={b - t} />"
            f"<text x={l + left} y={t + top - 4 / scale:.1f} font-size={11 / scale:.1f}>{html.escape(label)}</text></g>"
            for (l, t, r, b), label, well in boxes
        )
        return (
            f'<svg class=picture viewBox="{left} {top} {w} {h}" width={w * scale:.0f} height={h * scale:.0f}>'
            f'<use href="#{html.escape(name)}" />{drawn}</svg>'
        )

    def case(self, title: str, records: list[tuple[str, Record]]) -> str:
        """Return a case: question and given images, then the trajectories' text, calls and observations side by side."""
        e, (_, first) = html.escape, records[0]
        given = [n for n, image in enumerate(first["images"], 1) if not {"parent", "origin"} & image.keys()]
        gallery = ""
        for n in given:
            boxes = [
                (box, str(m), record["right"])
                for _, record in records
                for m, image in enumerate(record["images"], 1)
                if "box" in image and (box := within(record["images"], m, n))
            ]
            gallery += f"<figure>{self.svg(first['images'], n, 190, boxes)}<figcaption>Image {n}</figcaption></figure>"
        columns = "".join(f"<div class={'good' if r['right'] else 'bad'}>{self._column(label, r)}</div>" for label, r in records)
        asked = f"<p class=kind>{e(title)}</p><h3>{e(first['question'])}</h3><p>truth <b>{e(first['truth'])}</b></p>"
        shown = f"<div class=gallery>{gallery}</div><div class=columns>{columns}</div>"
        return f"<section class=case>{asked}{shown}</section>"

    def _column(self, label: str, record: Record) -> str:
        e, answer = html.escape, "no answer" if record["answer"] is None else record["answer"]
        parts = [f"<h4>{e(label)} <span>{'✓' if record['right'] else '✗'} {e(answer)}</span></h4>"]
        for turn in record["turns"]:
            parts.append(f"<pre>{e(turn['text'])}</pre>")
            call = turn["call"]
            parts += [f"<pre class=code>{e(program)}</pre>" for program in programs(call)]
            if call and call["status"] == "INVALID":
                parts.append(f"<p class=error>{e(' '.join(call['said']))}</p>")
            elif call and call["status"] == "EXECUTED":
                parts += [f"<pre class=said>{e(line)}</pre>" for line in call["said"] if not names_image(line, call)]
            for n in call["images"] if call else ():
                image = record["images"][n - 1]
                made = f": {e(image.get('origin') or 'made')}" if {"parent", "origin"} & image.keys() else ""
                made += f" of Image {image['parent']}" if "parent" in image else ""
                parts.append(f"<figure>{self.svg(record['images'], n, 96)}<figcaption>Image {n}{made}</figcaption></figure>")
        if record["end"] != "ANSWERED":
            why = (record["error"] or "").strip().splitlines()[-1:]  # the last line of a traceback
            parts.append(f"<p class=error>ended: {e(': '.join([record['end'].lower().replace('_', ' '), *why]))}</p>")
        return "".join(parts)
