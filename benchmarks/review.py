"""Reviewing by keyboard: `python benchmarks/review.py [--questions 50] [--kills 5]`.

Two reviewers in headless Chromium decide every question by keyboard alone, at the same time, on pictures as large as photographs.
The server is killed (SIGKILL) at moments spread over the work, while both press a key, and started again. Every decision has to
be there, once. A page's time is from the key to the next question with its pictures decoded; those of a kill stand apart. Writes
benchmarks/results/review.json.
"""

import random
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from common import parser, report, show

sys.path.append(str(Path(__file__).parent.parent / "tests"))
KEYS = {"accept": ["a"], "unsure": ["u"], "reject": ["r", "1"], "mend": ["m", "Tab", "Tab", "Control+a", "A", "Control+Enter"]}


def review(folder: Path, questions: int, kills: int) -> dict:
    """Reviews all questions; returns what was found and how long pages took."""
    from review_folder import Keyboard, Served, make_folder
    from scripted_run import chromium
    from sklearn.metrics import cohen_kappa_score

    made = make_folder(folder, questions, size=(2000, 1500), grain=True)
    size = sum(path.stat().st_size for path in (folder / "pool").iterdir()) / (questions + 1)
    rng, times, across, names = random.Random(0), [], [], ("anna", "ben")
    killed = {questions * (k + 1) // (kills + 1) for k in range(kills)}
    plan = [rng.choices([*KEYS], [6, 1, 2, 2], k=2) for _ in range(questions)]
    server = Served(folder, *names)
    with chromium() as browser:
        readers = [Keyboard(browser, server.urls[name]) for name in names]
        for n, verdicts in enumerate(plan):
            following = made[n + 1].uid if n + 1 < questions else "done"
            if n in killed:
                server.kill()
            began = []
            for reader, verdict in zip(readers, verdicts, strict=True):
                *before, last = KEYS[verdict]
                reader.press(*before)
                began.append(time.perf_counter())
                reader.press(last)
            if n in killed:
                for reader in readers:
                    reader.page.wait_for_selector("#away", state="visible")
                server = Served(folder, *names, port=server.port)
            for reader, start in zip(readers, began, strict=True):
                reader.ready(following)
                (across if n in killed else times).append(time.perf_counter() - start)
            print(f"\r{n + 1} of {questions}", end="", flush=True)
        print()
        for reader in readers:
            reader.page.close()
        version, errors = browser.version, sum(len(reader.errors) for reader in readers)
    server.kill()
    rows = sqlite3.connect(folder / "review.sqlite").execute("SELECT question, reviewer, verdict FROM log").fetchall()
    wanted = [
        (q.uid, name, verdict) for q, each in zip(made, plan, strict=True) for name, verdict in zip(names, each, strict=True)
    ]
    from imagent_jax.curation.decisions import Decisions

    [pair] = Decisions(folder).agreement()
    times.sort()
    return {
        "questions": questions, "reviewers": 2, "kills": kills, "decisions": len(rows), "wanted": len(wanted),
        "all_there_once": sorted(rows) == sorted(wanted), "kappa": round(pair["kappa"], 6),
        "kappa_sklearn": round(float(cohen_kappa_score(*zip(*plan, strict=True))), 6),
        "script_errors": errors, "chromium": version,
        "picture_kb": round(size / 1e3), "page_median_s": round(times[len(times) // 2], 4),
        "page_90_percent_s": round(times[9 * len(times) // 10], 4), "page_longest_s": round(times[-1], 4),
        "across_a_kill_longest_s": round(max(across, default=0.0), 4),
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=50)
    options.add_argument("--kills", type=int, default=5)
    args = options.parse_args()
    questions, kills = (6, 1) if args.quick else (args.questions, args.kills)
    with tempfile.TemporaryDirectory() as folder:
        print(f"Two reviewers decide {questions} questions; the server is killed {kills} times. Files: {folder}, until the end.")
        found = review(Path(folder) / "made", questions, kills)
    show("Reviewing by keyboard", ["what", "value"], [[name.replace("_", " "), value] for name, value in found.items()])
    report("review", args, found)


if __name__ == "__main__":
    main()
