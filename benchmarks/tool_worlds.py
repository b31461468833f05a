"""What can be read in the tool worlds, and what their search finds: `python benchmarks/tool_worlds.py`.

Prints and pages are read by scikit-learn's nearest template (`tests/print_reader.py`): as they are, after their own repair and
after every other. Writes benchmarks/results/tool_worlds.json.
"""

import sys
import tempfile
from pathlib import Path

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import print_reader  # noqa: E402

from imagent_jax.tiny import encyclopaedia  # noqa: E402
from imagent_jax.tiny.prints import LOSSES, TURNS, repair  # noqa: E402
from imagent_jax.tools.search import Index  # noqa: E402


def prints(count: int) -> dict:
    reader = print_reader.reader()
    faults = {}
    for problem in (*TURNS, *LOSSES):
        others = {
            name: print_reader.accuracy(reader, (problem,), steps, count)
            for name, steps in print_reader.other_repairs(problem).items()
        }
        best = max(others, key=others.__getitem__)
        faults[problem] = {
            "as it is": print_reader.accuracy(reader, (problem,), [], count),
            "repaired": print_reader.accuracy(reader, (problem,), repair((problem,)), count),
            "best other": others[best], "repair of": best,
        }  # fmt: skip
        print(problem, faults[problem], flush=True)
    views = {
        str(view): {problem or "clean": print_reader.accuracy(reader, (problem,) if problem else (), [], count, view)
                    for problem in ("", "rotation180", "dark", "overexposure", "crop")}
        for view in (56, 112, 168)
    }  # fmt: skip
    return {"clean": print_reader.accuracy(reader, (), [], count), "faults": faults, "views": views}


def articles(count: int) -> dict:
    """The share of articles among the passages found by their title, their name alone, their whole mark and half of it."""
    with tempfile.TemporaryDirectory() as folder:
        backend, found = Index(encyclopaedia.index_folder(folder)), list(encyclopaedia.articles().values())
        some = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
        marked = [article for article in some if article.mark][:count]

        def rate(query, among, passages):
            return float(np.mean([a.text in [hit.text for hit in backend.search(query(a), passages)] for a in among]))

        return {
            "title, first": rate(lambda a: a.title, some, 1),
            "name alone, among two": rate(lambda a: a.name, some[:count], 2),
            "mark, first": rate(lambda a: f"{a.kind} {encyclopaedia.mark_words(a.mark)}", marked, 1),
            "half a mark, among two": rate(lambda a: f"{a.kind} {encyclopaedia.mark_words(a.mark[:1])}", marked, 2),
        }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--count", type=int, default=120, help="held-out prints of a figure")
    args = parser.parse_args()
    pages = {name: print_reader.page_accuracy(view, 1500, 300) for name, view in (("as given", 84), ("large view", 168))}
    common.report("tool_worlds", args, {"prints": prints(args.count), "pages": pages, "articles": articles(500)})


if __name__ == "__main__":
    main()
