"""Looking at a run: `python benchmarks/view.py [--repeats 5]`.

A scripted policy's run: 65 steps of 16 trajectories and two evaluations of 6. Times logging 16 trajectories with every
image written anew, and opening the page of all trajectories in headless Chromium until they are listed and the first is
shown. Beside wall times stands what this process (`cpu_s`) or the page's thread (`page_s`) computed, whatever else the
machine did. Writes benchmarks/results/view.json.

`--picture RUN --trajectory NAME --to FILE` takes a picture of a trajectory, docs/trajectory.png, and times nothing.
"""

import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, median, parser, report, seconds, show

sys.path.append(str(Path(__file__).parent.parent / "tests"))


def logging(path: Path, logged: dict, repeats: int) -> dict:
    """Logs the 16 trajectories of a step."""
    from scripted_run import new_log

    log, (groups, advantages), own = new_log(path), logged[1], []
    rewards = [[{"total": 1.0} for _ in group] for group in groups]

    def write() -> None:
        log.files.clear()  # every image is written anew
        began = time.process_time()
        log.write(1, groups, rewards, advantages)
        own.append(time.process_time() - began)

    times = seconds(write, repeats)
    return {"trajectories": sum(map(len, groups)), "cpu_s": median(own[1:])["median_s"]} | median(times)


def opening(path: Path, repeats: int) -> dict:
    """Opens the page of a run, each time in a new tab."""
    from scripted_run import chromium, look

    from imagent_jax.runs.view import write_view

    began = time.perf_counter()
    _, run = write_view(path)
    wrote, own = time.perf_counter() - began, []
    with chromium() as browser:

        def open_page() -> None:
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            meter = page.context.new_cdp_session(page)
            meter.send("Performance.enable", {"timeDomain": "threadTicks"})
            look(page, path)
            own.append({m["name"]: m["value"] for m in meter.send("Performance.getMetrics")["metrics"]}["TaskDuration"])
            page.close()

        times = seconds(open_page, repeats)
        version = browser.version
    return {
        "trajectories": sum(map(len, run.trajectories.values())), "chromium": version, "write_s": round(wrote, 3),
        "index_kb": round((path / "view" / "data" / "index.js").stat().st_size / 1e3, 1),
        "page_s": median(own[1:])["median_s"],
    } | median(times)  # fmt: skip


def picture(path: Path, trajectory: str, out: Path) -> None:
    """The page of a run, opened at a trajectory."""
    from scripted_run import chromium, look

    from imagent_jax.runs.view import write_view

    write_view(path)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        look(page, path, trajectory)
        page.screenshot(path=out)
    print(f"Written to {out}.")


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--picture", type=Path, metavar="RUN", help="folder of a run")
    options.add_argument("--trajectory", default="trained-000240/3", help="as in the page's address")
    options.add_argument("--to", type=Path, default=RESULTS.parent.parent / "docs" / "trajectory.png", help="file of the picture")
    args = options.parse_args()
    if args.picture:
        picture(args.picture.resolve(), args.trajectory, args.to)
        return
    from scripted_run import make_run, many_trajectories

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, path, logged = make_run(folder)
        logs = logging(folder, logged, args.repeats)
        opened = opening(path if args.quick else many_trajectories(path, folder / "many"), args.repeats)
    show("Looking at a run, medians", ["what", "trajectories", "time", "its own"], [
        ["logged", logs["trajectories"], f"{1000 * logs['median_s']:.1f} ms", f"{1000 * logs['cpu_s']:.1f} ms"],
        ["page written", opened["trajectories"], f"{opened['write_s']:.2f} s", ""],
        ["page opened", opened["trajectories"], f"{opened['median_s']:.2f} s", f"{opened['page_s']:.2f} s"],
    ])  # fmt: skip
    report("view", args, {"logging": logs, "opening": opened})


if __name__ == "__main__":
    main()
