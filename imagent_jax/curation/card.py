"""The card of a release: where it comes from, how it was made, what is known to be wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagent_jax.curation.pool import Pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.settings import ReleaseSettings


def card(cfg: ReleaseSettings, splits: Mapping[str, Sequence[Question]], pool: Pool, funnel: Mapping[str, Any]) -> str:
    """Return the text of README.md."""
    questions = [question for own in splits.values() for question in own]
    pictures = sorted({image for question in questions for image in question.images})
    lines = [
        f"# {cfg.title} {cfg.version}",
        "",
        f"{len(questions)} questions about groups of images ({', '.join(f'{len(own)} {name}' for name, own in splits.items())}), "
        f"with {len(pictures)} pictures. No picture is in both splits. Agents wrote the questions; filters and attacks by other "
        "agents dropped the faulty ones. Made by `imagent curate` of imagent-jax.",
        "",
        "Read it with `data.name: files` and `data.path: arrayrecord`, `parquet` or `jsonl`. Each row says in `history` how its "
        "question came to be, and in `evidence` on which places it rests (boxes in thousandths of the image).",
        "",
        *_table("Kinds", "kind", Counter(question.kind for question in questions)),
        *_table("Images of a question", "images", Counter(str(len(question.images)) for question in questions)),
        *_table("Licences", "licence", Counter(pool.pictures[image].licence for image in pictures), "pictures"),
        *_funnel(funnel),
        *_agreement(questions),
        *_difficulty(questions),
        *_review(questions),
        *_faults(questions, splits),
        "## Sources",
        "",
        "The origin of each picture:",
        "",
        *(f"- `{image}`: {pool.pictures[image].origin} ({pool.pictures[image].licence})" for image in pictures),
        "",
    ]
    return "\n".join(lines)


def _table(title: str, head: str, counts: Mapping[str, int], unit: str = "questions") -> list[str]:
    rows = [f"| {name} | {count} |" for name, count in sorted(counts.items())]
    return [f"## {title}", "", f"| {head} | {unit} |", "|---|---|", *rows, ""]


def _funnel(funnel: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {one['drops where']} | {one['found']} | {one['dropped']} |" for name, one in funnel["filters"].items()]
    return [
        "## Funnel",
        "",
        f"{funnel['proposed']} proposals, {funnel['kept']} kept, {funnel['kept after repair']} of them after a "
        'repair. "Found" counts questions in which a filter found a fault, also those that were repaired.',
        "",
        "| filter | drops a question where | found | dropped |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _agreement(questions: Iterable[Question]) -> list[str]:
    answers = [event for question in questions for event in question.said("answered")]
    lines = ["## Agreement of blind answerers", ""]
    for tools, words in ((True, "with crops"), (False, "at a glance")):
        if own := [event for event in answers if event.facts["tools"] is tools]:
            share = sum(event.facts["right"] for event in own) / len(own)
            lines.append(f"- {words}: {100 * share:.1f} % of {len(own)} answers are the claimed one")
    return [*lines, ""]


def _difficulty(questions: Sequence[Question]) -> list[str]:
    rates = [event.facts for question in questions for event in question.said("measured")[-1:]]
    if not rates:
        return ["## Difficulty", "", "Not measured.", ""]
    lines = ["## Difficulty", "", "Pass rates of the policy:", "", "| right | with tools | without tools |", "|---|---|---|"]
    places = [min(4, int(5 * rate["with tools"])) for rate in rates], [min(4, int(5 * rate["without"])) for rate in rates]
    for step in range(5):
        lines.append(f"| {20 * step} to {20 * step + 20} % | {places[0].count(step)} | {places[1].count(step)} |")
    return [*lines, ""]


def _review(questions: Sequence[Question]) -> list[str]:
    seen = sum(any(event.by.startswith("review:") for event in question.history) for question in questions)
    return ["## Review by people", "", f"{seen} of {len(questions)} questions were seen by a person.", ""]


def _faults(questions: Sequence[Question], splits: Mapping[str, Sequence[Question]]) -> list[str]:
    """What is known to be wrong."""
    lines = []
    unsure = [q for q in questions if (own := q.said("answered")) and not all(event.facts["right"] for event in own)]
    if unsure:
        lines.append(f"- In {len(unsure)} questions not every blind answerer gave the claimed answer.")
    guessed = [q for q in questions if any(e.facts.get("with") == "text" and e.facts["right"] for e in q.said("attacked"))]
    if guessed:
        lines.append(f"- In {len(guessed)} questions a guess from the text alone was right, though not sure.")
    single = sum(not question.several for question in questions)
    lines.append(f"- {single} questions say that one image is enough, once it is found.")
    if not splits["test"]:
        lines.append("- There is no test split: no set of questions that shares no picture with others fits its share.")
    return ["## Known faults", "", *lines, ""]
