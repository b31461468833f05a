"""Files of a killed process: whatever is left of the last line, the values before it stay and the next ones follow."""

import os
import re

import pytest

from imagent_jax.curation.difficulty import RateFile
from imagent_jax.runs.whole import Lines, write_whole

VALUES = [{"a": 1}, "zwölf\r\n", [None, 2.5]]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_takes_new_ones(tmp_path):
    path = tmp_path / "lines.jsonl"
    Lines(path).add(*VALUES)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    assert len(ends) == 3 and Lines(path).values == VALUES
    for size in range(len(data)):
        path.write_bytes(data[:size])
        lines = Lines(path)
        whole = VALUES[: sum(end <= size for end in ends)]
        assert lines.values == whole and path.read_bytes() == data[: max([0, *(e for e in ends if e <= size)])]
        lines.add("next")
        assert Lines(path).values == lines.values == [*whole, "next"]


def test_pass_rates_of_a_killed_run_are_read_back(tmp_path):
    path = tmp_path / "difficulty.jsonl"
    RateFile(path).add({"a": {"with tools": 1.0, "without": 0.0}})
    with path.open("a") as file:
        file.write('{"key": "b", "ra')
    RateFile(path).add({"c": {"with tools": 0.5, "without": 0.5}})
    assert [*RateFile(path).rates] == ["a", "c"]


def test_a_damaged_line_is_a_sentence(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('1\n{"a"\n3\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2 is damaged (") + ".*; delete the line, and start again"):
        Lines(path)


def test_a_text_takes_the_place_of_another_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, "new")
    assert path.read_text() == "old"
