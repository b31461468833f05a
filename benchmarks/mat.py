"""Scores of the predictions that Visual-ARFT released, by two rules: `python benchmarks/mat.py FOLDER`.

FOLDER holds the files of `evaluation_results/` in Liuziyu77/Visual-RFT (commit 94866331), which are not part of this repository.
Writes benchmarks/results/mat.json. Fails where a published figure is not reached to the second decimal.
"""

import json
from pathlib import Path

import common

from imagent_jax.evals.score import FORMS, read_predictions, score_predictions

FILES = {
    "{size}_mat_coding_grpo_step1400.json": "mat-coding", "{size}_mat_coding_grpo_step1400_v2.json": "mat-coding",
    "{size}_step200_mat_search_web_n4.json": "mat-search", "{size}_step200_2wiki_web_n4.json": "2wiki",
    "{size}_step200_hotpotqa_web_n4.json": "hotpotqa", "{size}_step200_musique_web_n4.json": "musique",
    "{size}_step200_bamboogle_web_n4.json": "bamboogle",
}  # fmt: skip
PUBLISHED = {
    "7b_mat_coding_grpo_step1400_v2.json": {"all": (50.87, 35.00), "simple": (61.52, 52.86), "hard": (45.13, 25.38)},
    "7b_step200_mat_search_web_n4.json": {"all": (63.77, 55.33)}, "7b_step200_2wiki_web_n4.json": {"all": (63.09, 51.99)},
    "7b_step200_hotpotqa_web_n4.json": {"all": (48.01, 36.48)},
}  # fmt: skip
"""F1 and exact match as published (Visual-ARFT, arXiv 2505.14246)."""


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    args, found = parser.parse_args(), {}
    folder = args.folder
    for name, benchmark in [(name.format(size=size), benchmark) for size in ("3b", "7b") for name, benchmark in FILES.items()]:
        if not (folder / name).is_file():
            continue
        result = score_predictions(read_predictions(folder / name), FORMS[benchmark], folder / name)
        for group, figures in PUBLISHED.get(name, {}).items():
            ours = tuple(round(x, 2) for x in result["scores"]["published"][group].values())
            assert ours == figures, (name, group, ours, figures)
        differ = len(result.pop("differ"))
        found[name] = {"benchmark": benchmark} | result | {"rows that differ": differ, "published": PUBLISHED.get(name)}
        print(name, json.dumps(found[name]["scores"]))
    common.report("mat", args, {"files": found})


if __name__ == "__main__":
    main()
