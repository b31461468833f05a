"""Predictions in the forms of VLMEvalKit (TSV) and lmms-eval (JSON Lines), to be scored there."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from imagent_jax.evals.harness import Record
from imagent_jax.types import Task


def write_predictions(folder: Path, name: str, tasks: Sequence[Task], records: Sequence[Record]) -> None:
    """Write `<name>.vlmevalkit.tsv`, with the first sample of each row, and `<name>.lmms_eval.jsonl`, with all.

    A sample without an answer is an empty text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = max((task.letters for task in tasks), key=len, default="")
    with open(folder / f"{name}.vlmevalkit.tsv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", *letters, "answer", "category", "prediction"])
        for task, record in zip(tasks, records, strict=True):
            options = [*task.options, *[""] * (len(letters) - len(task.options))]
            reply = record["samples"][0]["reply"] or ""
            writer.writerow([task.uid, task.question, *options, task.answer, task.kind, reply])
    with open(folder / f"{name}.lmms_eval.jsonl", "w", encoding="utf-8") as file:
        for number, (task, record) in enumerate(zip(tasks, records, strict=True)):
            said = [sample["reply"] or "" for sample in record["samples"]]
            doc = {"id": task.uid, "question": task.question, "options": list(task.options), "answers": list(task.answers)}
            line = {"doc_id": number, "doc": doc, "target": task.answer, "resps": [said], "filtered_resps": said}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
