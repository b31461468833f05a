"""Scores of predictions: the published rule of MAT with its faults, and the strict rule without them."""

import json

import pytest

from imagent_jax.evals import score as job
from imagent_jax.evals.benchmarks.mat import CODING, TEXT, exact_match, f1
from imagent_jax.types import Task


def both(metrics, reply, *answers):
    """(published, strict) of F1 and of exact match."""
    task = Task("", "", (), answers[0], other_answers=answers[1:])
    return {name: (round(metric.published(task, reply), 4), metric.strict(task, reply)) for name, metric in metrics.items()}


@pytest.mark.parametrize(
    ("metrics", "reply", "answers", "published", "strict"),
    [
        (CODING, "the", ["A"], 1, 0),  # an article as a reference: any answer without words is right
        (CODING, ".", ["A"], 1, 0),
        (TEXT, "3.5", ["35"], 1, 0),  # decimal points and signs vanish
        (TEXT, "-5", ["5"], 1, 0),
        (TEXT, "1,000", ["1000"], 1, 1),
        (TEXT, "A", ["A"], 1, 1),
        (TEXT, "The Beatles", ["Beatles"], 1, 1),
        (TEXT, "13–3", ["13-3"], 0, 1),  # a typographic dash is a word to the text rule
        (CODING, "软件，工程", ["软件工程"], 1, 1),  # Chinese punctuation
        (CODING, "软件 工程", ["软件工程"], 1, 1),
        (TEXT, "软件 工程", ["软件工程"], 0, 1),
        (TEXT, "March 14, 2017", ["14 March", "March 14 2017"], 1, 1),  # the best of several references
        (TEXT, "May 1999-2000", ["May 1999-2000"], 1, 1),
    ],
)  # fmt: skip
def test_exact_match_by_both_rules(metrics, reply, answers, published, strict):
    assert both(metrics, reply, *answers)["EM"] == (published, strict)


def test_published_f1_counts_a_repeated_word_against_an_answer():
    assert both(TEXT, "New York, New York", "New York City")["F1"] == (pytest.approx(2 * 2 / 7, abs=1e-4), 2 * 2 / 7)
    assert both(TEXT, "New York, New York", "New York, New York City")["F1"] == (pytest.approx(2 * 2 / 9, abs=1e-4), 8 / 9)
    assert both(TEXT, "rose is rose", "rose is rose")["F1"] == (1, 1)  # equal texts are right whatever they repeat


def test_published_f1_is_by_character_where_one_text_is_chinese():
    assert f1("软件", "软件工程", chinese=True) == pytest.approx(2 * 2 / 6)
    assert f1("软件", "软件工程") == 0
    assert f1("ab c", "工c", chinese=True) == pytest.approx(2 * 1 / 6)  # a b, a space and c: Latin texts keep their spaces
    assert exact_match("ab c", "abc", chinese=True) == 0
    assert both(CODING, "vip 软件", "VIP\n软件")["F1"] == (pytest.approx(2 * 5 / 11, abs=1e-4), 1)  # and a line break is a token


def test_a_line_of_json_lines_may_hold_a_line_separator(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"gt": "a\u2028b", "pred_answer": "a\u2028b"}\n\n{"gt": "c", "pred_answer": null}\n')
    assert [row["pred_answer"] for row in job.read_predictions(path)] == ["a\u2028b", None]


def predictions(path, rows):
    path.write_text(json.dumps(rows))
    return path


def coding_rows():
    """All of MAT-Coding, answered right where the id is even."""
    return [{"id": i, "gt": [f"word{i}"], "pred_answer": f"word{i}" if i % 2 == 0 else None} for i in range(1, 201)]


def result_of(rows, benchmark, tmp_path, *flags):
    out = tmp_path / "result.json"
    path = predictions(tmp_path / "p.json", rows)
    assert job.main([str(path), "--benchmark", benchmark, "--out", str(out), *flags]) == 0
    return json.loads(out.read_text())


def test_a_whole_file_has_groups_by_position_and_by_id_alike(tmp_path):
    found = result_of(coding_rows(), "mat-coding", tmp_path)
    half = {"F1": 50.0, "EM": 50.0}
    assert found["scores"] == {rule: dict.fromkeys(("all", "simple", "hard"), half) for rule in ("published", "strict")}
    assert (found["rows"], found["missing"], found["unanswered"], found["differ"]) == (200, 0, 100, [])
    shuffled = coding_rows()[::-1]
    by = result_of(shuffled, "mat-coding", tmp_path)["scores"]
    assert by["strict"] == found["scores"]["strict"]


def test_a_missing_row_moves_later_ones_to_another_group_by_the_published_rule_only(tmp_path):
    rows = [row | {"pred_answer": row["gt"][0] if row["id"] > 70 else "none"} for row in coding_rows() if row["id"] != 3]
    found = result_of(rows, "mat-coding", tmp_path)["scores"]
    assert found["published"]["simple"]["EM"] == pytest.approx(100 / 70, abs=1e-4)  # row 71 has moved there
    assert found["published"]["hard"]["EM"] == pytest.approx(100 * 129 / 130, abs=1e-4)
    assert found["published"]["all"]["EM"] == 65.0  # of 200, though there are 199 rows
    assert found["strict"] == {"all": {"F1": 65.0, "EM": 65.0}, "simple": {"F1": 0, "EM": 0}, "hard": {"F1": 100, "EM": 100}}


def test_missing_questions_of_a_text_benchmark_are_wrong_by_the_strict_rule(tmp_path, capsys):
    rows = [{"pred_answer": "yes", "gt": ["yes"]}] * 100
    found = result_of(rows, "bamboogle", tmp_path)
    assert found["scores"] == {"published": {"all": {"F1": 100, "EM": 100}}, "strict": {"all": {"F1": 80, "EM": 80}}}
    assert found["missing"] == 25 and "25 questions have no row" in " ".join(capsys.readouterr().out.split())
    found = result_of(rows, "bamboogle", tmp_path, "--subset")
    assert found["scores"]["strict"]["all"]["EM"] == 100 and found["missing"] == 0


def test_groups_without_ids_are_unknown_where_rows_are_missing(tmp_path, capsys):
    found = result_of([{"pred_answer": "yes", "gt": "yes"}] * 149, "mat-search", tmp_path)["scores"]
    assert found["published"]["hard"]["EM"] == pytest.approx(100 * 74 / 75, abs=1e-4) and [*found["strict"]] == ["all"]
    assert "Without ids, their groups are unknown." in " ".join(capsys.readouterr().out.split())


def test_rows_on_which_the_rules_differ_are_listed(tmp_path, capsys):
    rows = coding_rows()
    rows[4] |= {"gt": ["A"], "pred_answer": "the"}
    found = result_of(rows, "mat-coding", tmp_path)["differ"]
    scores = {"F1": {"published": 1.0, "strict": 0.0}, "EM": {"published": 1.0, "strict": 0.0}}
    assert found == [{"row": 5, "id": 5, "prediction": "the", "gt": ["A"]} | scores]
    assert "row 5: \"the\" for ['A']: F1 1.00 / 0.00, EM 1.00 / 0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": 1, "pred_answer": "x"}], "row 1: there is no reference"),
        ([{"id": 1, "gt": []}], "row 1: there is no reference"),
        ([{"id": 1, "gt": "x"}], "row 1: there is no prediction"),
        ([{"id": 1, "gt": "x", "pred_answer": 3}], "write 'pred_answer' as text, or null"),
        (["x"], "row 1: there is no reference"),
        ([], "has no predictions"),
        ([{"id": 7, "gt": "x", "pred_answer": "x"}] * 2, "has the id 7 more than once"),
        ([{"gt": "x", "pred_answer": "x"}] * 201, "has 201 rows and the benchmark 200"),
        (None, "cannot be read"),
    ],
)
def test_bad_predictions_are_told_in_one_sentence(rows, words, tmp_path, capsys):
    path = tmp_path / "p.json"
    if rows is not None:
        predictions(path, rows)
    assert job.main([str(path), "--benchmark", "mat-coding"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_json_lines_are_read_too(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in coding_rows()))
    assert len(job.read_predictions(tmp_path / "p.jsonl")) == 200
