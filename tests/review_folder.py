"""A folder of questions to review, its server in a process of its own, and a reviewer who has only a keyboard."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from imagent_jax.curation.question import Event, Evidence, Question


def make_folder(folder: Path, count: int, size: tuple[int, int] = (320, 240), grain: bool = False) -> list[Question]:
    """Writes questions about pairs of pictures; every third has options. One that a filter dropped stands among them.

    `grain` makes the files as large as those of photographs.
    """
    (folder / "pool").mkdir(parents=True)
    for n in range(count + 1):
        image = Image.new("RGB", size, (40 + 37 * n % 180, 90, 200 - 29 * n % 160))
        if grain:
            image = Image.blend(image, Image.effect_noise(size, 60).convert("RGB"), 0.3)
        pen = ImageDraw.Draw(image)
        width, height = size
        pen.rectangle([width * 0.5, height * 0.25, width * 0.75, height * 0.5], fill="white")
        pen.text((width * 0.52, height * 0.3), str(n), fill="black", font_size=height / 8)
        image.save(folder / "pool" / f"p{n}.{'jpg' if grain or n % 2 == 0 else 'tiff' if n == 1 else 'png'}")
    questions = [question(n, n % 3 == 2) for n in range(count)]
    lines = [q.to_json() for q in questions]
    lines.insert(1, question(count + 5, False).after(Event("filter:duplicate", "dropped")).to_json())
    (folder / "questions.jsonl").write_text("".join(line + "\n" for line in lines))
    return questions


def question(n: int, choice: bool) -> Question:
    return Question(
        uid=f"q/{n}", text=f"Which number is larger, that of Image 1 or of Image 2? <b>{n}</b>", images=(f"p{n}", f"p{n + 1}"),
        answer="B" if choice else str(n + 1), kind="compare", options=("Image 1", "Image 2") if choice else (),
        evidence=(Evidence(1, (500, 250, 750, 500)), Evidence(2, (500, 250, 750, 500))), group=f"g{n}",
        answer_type="choice" if choice else "exact",
        history=(Event("proposer", "proposed", {"model": "m"}), Event("filter:schema", "kept")),
    )  # fmt: skip


class Served:
    """`python -m imagent_jax.curation.review` on a folder. `urls` are what it printed, by name; `kill` is SIGKILL."""

    def __init__(self, folder: Path, *names: str, port: int = 0, options: tuple[str, ...] = ()):
        asked = [word for name in names for word in ("--reviewer", name)]
        command = [sys.executable, "-m", "imagent_jax.curation.review", str(folder), *asked, "--no-open", "--port", str(port)]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        self.head = self.process.stdout.readline()
        self.urls = dict(self.process.stdout.readline().strip().split(": ", 1) for _ in names)
        self.port = int(re.search(r":(\d+)/", next(iter(self.urls.values())))[1])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Keyboard:
    """A reviewer's page."""

    def __init__(self, browser, url: str):
        self.page = browser.new_page(viewport={"width": 1400, "height": 900})
        self.page.set_default_timeout(120_000)  # the machine may be busy
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.ready()

    def ready(self, name: str = "") -> str:
        """Waits until a question (or the one of a name) is shown; returns its uid, with ? where its claim is hidden, or done."""
        self.page.wait_for_selector(f'#page[data-ready="{name}"]' if name else "#page[data-ready]")
        return self.page.get_attribute("#page", "data-ready")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def away(self) -> bool:
        """Whether the page says that the server does not answer."""
        return self.page.is_visible("#away")
