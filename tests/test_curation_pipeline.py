"""The pipeline from pictures to a released data set: faults, stops, kills, repairs, settings."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from curation_parts import ROOT, tiny_pictures, tiny_settings, tiny_values
from PIL import Image

from imagent_jax.cli import main as cli
from imagent_jax.curation.agents import AgentError
from imagent_jax.curation.decisions import Decision, Decisions
from imagent_jax.curation.pipeline import Stopped, Work, curate
from imagent_jax.curation.question import Evidence, Question
from imagent_jax.curation.roles import ROLES, Roles, load_prompts
from imagent_jax.curation.settings import Curation, FilterSettings, read_arguments, setting_names
from imagent_jax.tiny.curators import TinyCurators, TinyCuratorsSettings


def tiny_agents(folder, **changes):
    return TinyCurators(TinyCuratorsSettings(folders=(str(folder / "pictures"), str(folder / "pictures_test")), **changes))


class Wrapped:
    """The embedded agents, with a function of a test between them and the pipeline."""

    def __init__(self, inner, change=lambda messages, schema, answer: answer):
        self.inner, self.change, self.calls, self.lock = inner, change, [], threading.Lock()

    def complete(self, messages, schema):
        with self.lock:
            self.calls.append(schema["title"])
        return self.change(messages, schema, self.inner.complete(messages, schema))


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}


def questions_of(out):
    return [Question.from_json(line) for line in (out / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_pictures(tmp_path_factory.mktemp("pipeline"), 24)


@pytest.fixture
def folder(pictures, tmp_path):
    for name in ("pictures", "pictures_test"):
        (tmp_path / name).symlink_to(pictures / name)
    return tmp_path


def config(folder, **sections):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder, **sections)))
    return str(path)


class Separated(TinyCurators):
    """The embedded agents; the proposer writes a line separator, which JSON does not escape, behind each question."""

    def complete(self, messages, schema):
        answer = super().complete(messages, schema)
        return answer | {"question": f"{answer['question']} \u2028Look closely."} if schema["title"] == "proposal" else answer


def test_a_line_separator_in_a_question_ends_no_line(folder):
    path = config(folder, agents={"backend": "test_curation_pipeline:Separated"})
    assert cli(["curate", "--config", path]) == 0
    rows = [json.loads(line) for line in (folder / "run/release/jsonl/train.jsonl").open(encoding="utf-8")]
    assert len(rows) > 3 and any("\u2028" in row["question"] for row in rows)


def test_the_command_makes_a_data_set_and_says_what_it_does(folder, capsys):
    assert cli(["curate", "--config", config(folder)]) == 0
    said = capsys.readouterr().out
    first, second, *_ = said.splitlines()
    assert first.startswith("Making up to 12 questions about groups of pictures") and f"Writes to {folder / 'run'}" in second
    funnel = json.loads((folder / "run" / "funnel.json").read_text())
    questions = questions_of(folder / "run")
    assert [q.uid for q in questions] == [f"q{n:06d}" for n in range(12)] and funnel["proposed"] == 12
    kept = [q for q in questions if q.history[-1].what != "dropped"]
    assert len(kept) == funnel["kept"] == 12 - sum(one["dropped"] for one in funnel["filters"].values()) > 6
    assert f"Released {len(kept)} questions" in said.replace("\n", " ")
    assert all(q.history[0].by == "proposer" and {"answered", "attacked", "read"} <= {e.what for e in q.history} for q in kept)
    before = files(folder / "run")
    assert cli(["curate", "--config", config(folder)]) == 0 and files(folder / "run") == before
    more = ["--run.proposals", "14", "--run.parallel=3"]
    assert cli(["curate", "--config", config(folder), *more]) == 0
    assert questions_of(folder / "run")[:12] == questions


@pytest.mark.slow(6)
def test_with_reviewers_only_what_they_kept_is_released(folder, capsys):
    path = config(folder)
    assert cli(["curate", "--config", path]) == 0
    kept = [q for q in questions_of(folder / "run") if q.history[-1].what != "dropped"]
    with contextlib.closing(Decisions(folder / "run")) as decisions:
        for name in ("anna", "ben"):
            for n, question in enumerate(kept[:-1]):
                verdict = "reject" if n == 0 or (n == 1 and name == "ben") else "accept"
                facts = {"reason": "vague"} if verdict == "reject" else {}
                decisions.add(f"{name} {n}", Decision(question.uid, name, verdict, facts))
    capsys.readouterr()
    assert cli(["curate", "--review", str(folder / "run"), "--export"]) == 0 and "decisions.jsonl" in capsys.readouterr().out
    assert cli(["curate", "--config", path, "--release.reviewers", "2"]) == 0
    released = [json.loads(line) for line in (folder / "run/release/jsonl").rglob("*.jsonl") for line in line.open()]
    assert sorted(row["uid"] for row in released) == [question.uid for question in kept[2:-1]]


@pytest.mark.slow(6)
def test_a_killed_run_goes_on_to_the_same_bytes_and_asks_nothing_twice(folder):
    whole = tiny_settings(folder, run={"out": str(folder / "whole"), "proposals": 60})
    curate(whole)
    command = [sys.executable, "-m", "imagent_jax.curate", "--config", config(folder, run={"proposals": 60})]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    work = folder / "run" / "work.jsonl"
    for lines in (3, 11):
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL)
        while not (work.exists() and work.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        with work.open("ab") as file:  # what a kill in the middle of a line leaves
            file.write(b'{"number": 1, "question": {"uid": "q0')
    done = set(Work(work).made)
    agents = Wrapped(tiny_agents(folder))
    curate(tiny_settings(folder, run={"proposals": 60}), dict.fromkeys(ROLES, agents))
    assert agents.calls.count("proposal") == 60 - len(done) and 11 <= len(done) < 60
    for name in ("questions.jsonl", "funnel.json", "pool.jsonl", "pool_dropped.json"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.slow(4)
def test_ctrl_c_loses_no_question_in_work(folder):
    command = [sys.executable, "-m", "imagent_jax.curate", "--config", config(folder, run={"proposals": 400})]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True)
    work = folder / "run" / "work.jsonl"
    while not work.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    stated = int(re.search(r"Stopped: (\d+) of 400 proposals are done; the same command goes on", said)[1])
    assert stated == len(Work(work).made) == work.read_bytes().count(b"\n") < 400


def test_a_second_run_in_the_same_folder_is_refused(folder, capsys):
    from imagent_jax.runs.lock import Lock

    (folder / "run").mkdir()
    lock = Lock(folder / "run")
    assert cli(["curate", "--config", config(folder)]) == 2
    lock.release()
    assert "is being written by process" in capsys.readouterr().err


def test_a_missing_extra_is_told_before_anybody_is_asked(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest))
    assert cli(["curate", "--config", config(folder)]) == 2
    assert 'pip install "imagent-jax[data]"' in capsys.readouterr().err and not (folder / "run").exists()


def test_it_stops_when_asked(folder):
    with pytest.raises(Stopped, match="0 of 12 proposals are done"):
        curate(tiny_settings(folder), asked_to_stop=lambda: True)


# ---- faults and repairs -------------------------------------------------------------------------------------------------


def spoilt(folder, change, **agents):
    """Funnel and questions of a run whose proposals are changed by a function of the proposal."""
    cfg = tiny_settings(folder, agents=agents)
    own = tiny_agents(folder, misread=0.0, glance=0.0, slip=0.0)
    proposer = Wrapped(own, lambda messages, schema, answer: change(answer) if schema["title"] == "proposal" else answer)
    funnel = curate(cfg, {**dict.fromkeys(ROLES, own), "proposer": proposer})
    return funnel, questions_of(folder / "run")


@pytest.mark.parametrize(("change", "name"), [
    (lambda made: made | {"question": f"{made['question'][:-1]} (it is {made['answer']})?"}, "answer_in_question"),
    (lambda made: made | {"evidence": [e | {"box": [0, 0, 30, 30]} for e in made["evidence"]]}, "box"),
    (lambda made: made | {"evidence": [e | {"box": [0, 0, 1000, 1000]} for e in made["evidence"]]}, "box"),
    (lambda made: made | {"answer": "12345", "answer_type": "number"}, "agreement"),
    (lambda made: made | {"question": "What digit is on the tag in Image 1?"}, "agreement"),
    (lambda made: made | {"question": "What is it?"}, "agreement"),
])  # fmt: skip
def test_a_fault_in_every_proposal_is_dropped_by_its_filter_or_repaired(folder, change, name):
    funnel, questions = spoilt(folder, change, repairs=0)
    assert funnel["filters"][name]["found"] >= 8 and funnel["kept"] <= 1
    assert funnel["filters"][name]["example"]["why"] and all(q.history[-1].what in ("dropped", "kept") for q in questions)


def test_a_wrong_answer_is_repaired_and_asked_about_again(folder):
    funnel, questions = spoilt(folder, lambda made: made | {"answer": "12345", "answer_type": "number"}, repairs=1)
    assert funnel["kept"] == funnel["kept after repair"] >= 10 and funnel["filters"]["agreement"]["found"] == 12
    for question in questions:
        whats = [event.what for event in question.history]
        assert (
            whats.count("answered") == 6
            and question.answer != "12345"
            and "most say" in question.history[whats.index("found")].facts["why"]
        )


def test_what_is_no_question_is_in_the_funnel(folder):
    funnel, questions = spoilt(folder, lambda made: made | {"evidence": []})
    assert (funnel["filters"]["schema"]["dropped"], funnel["kept"], questions) == (12, 0, [])
    assert funnel["filters"]["schema"]["example"]["why"] == "it rests on no place of an image"


def test_options_are_added_in_an_order_that_says_nothing(folder):
    cfg = tiny_settings(folder, agents={"options": 3}, run={"proposals": 24})
    curate(cfg, dict.fromkeys(ROLES, tiny_agents(folder, misread=0.0, glance=0.0, slip=0.0)))
    kept = [q for q in questions_of(folder / "run") if q.history[-1].what == "kept"]
    assert len(kept) > 12 and {q.answer for q in kept} == {"A", "B", "C"}
    for question in kept:
        [offered] = [event for event in question.history if event.what == "offered"]
        assert question.answer_type == "choice" and len(set(question.options)) == 3
        assert question.options["ABC".index(question.answer)] == offered.facts["answer"] == question.history[0].facts["answer"]


@pytest.mark.parametrize("options", [["five"], ["five", "Five", " "]])
def test_a_question_with_too_few_options_is_dropped_and_the_run_goes_on(folder, options):
    few = Wrapped(tiny_agents(folder), lambda messages, schema, answer: {"options": options})
    funnel = curate(
        tiny_settings(folder, agents={"options": 3}), {**dict.fromkeys(ROLES, tiny_agents(folder)), "distractors": few}
    )
    assert (funnel["filters"]["options"]["dropped"], funnel["without an answer of an agent"], funnel["kept"]) == (12, 0, 0)
    assert funnel["filters"]["options"]["example"]["why"] == "there are 2 that differ, not 3"


def test_proposals_without_an_answer_are_asked_again_and_never_dropped(folder):
    def silent(messages, schema, answer):
        if schema["title"] == "crop" and broken:
            raise AgentError("The server is on holiday.")
        return answer

    broken, agents = True, Wrapped(tiny_agents(folder), silent)
    cfg = tiny_settings(folder, run={"failures": 5})
    with pytest.raises(AgentError, match=r"5 proposals in a row .* holiday"):
        curate(cfg, dict.fromkeys(ROLES, agents))
    assert Work(folder / "run" / "work.jsonl").made == {}
    broken = False
    assert curate(cfg, dict.fromkeys(ROLES, agents))["without an answer of an agent"] == 0
    assert len(questions_of(folder / "run")) == 12


# ---- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--run.propsals", "3"], "There is no setting 'run.propsals'; did you mean 'run.proposals'?"),
    (["--pool.path"], "--pool.path needs a value"),
    (["pool.path=x"], "is no option"),
    (["--run.proposals", "many"], "run.proposals is 'many'; it must be a whole number"),
    (["--run.proposals", "0"], "run.proposals is 0; it must be at least 1"),
    (["--groups.sizes", "[2, 9]"], "a group has 2 to 8 images"),
    (["--groups.ways", "{random: 0}"], "give each way a share above 0"),
    (["--pool.path", ""], "pool.path is empty"),
    (["--release.version", "1.0"], "release.version is 1.0; it must be text"),
    (["--release.version", "new"], "write three numbers, such as '1.0.0'"),
    (["--agents.options", "1"], "a choice has at least 2 options"),
    (["--agents.with_tools=0", "--agents.without_tools=0"], "There is no blind answerer"),
    (["--agents.roles", "{judge: {}}"], "agents.roles has 'judge', which is no role; there are proposer"),
    (["--agents.roles", "{proposer: {model: x}}"], "must hold 'backend' and 'settings' only"),
    (["--agents.backend", "nowhere:At"], "agents.backend 'nowhere:At' cannot be imported"),
    (["--agents.prompts", "nowhere"], "agents.prompts 'nowhere' is no folder"),
    (["--pool.path", "nowhere.jsonl"], "does not exist"),
    (["--pool.path", "*.tar"], "*.tar does not exist"),
    (["--groups.ways", "{random"], "groups.ways is '{random'; it must be a mapping"),
    (["--groups.ways", "{random: .inf}"], "give each way a share above 0"),
    (["--groups.ways", "null"], "groups.ways is empty; it must be a mapping of names"),
    (["--run.proposals", "null"], "run.proposals is empty; it must be a whole number"),
    (["--agents.roles", "{proposer: {settings: null}}"], "with the settings None; give a name"),
    (["--agents.roles", "{proposer: {backend: [5]}}"], "agents.roles.proposer.backend is [5]"),
    (["--run.out", "/dev/null/run"], "Not a directory: '/dev/null/run'"),
    (["--config", "nowhere.yaml"], "There is no config file nowhere.yaml"),
])  # fmt: skip
def test_bad_settings_are_a_sentence(folder, capsys, arguments, words):
    assert cli(["curate", "--config", config(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_unknown_sections_and_files_that_are_no_settings_are_sentences(tmp_path):
    cases = {
        "rn: {}": "no section 'rn'; did you mean 'run'",
        "run: 3": "must hold settings",
        "- 1": "hold sections",
        "a: [": "not YAML",
    }
    for text, words in cases.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_arguments([str(tmp_path / "c.yaml")], [])
    (tmp_path / "c.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ValueError, match="not YAML"):
        read_arguments([str(tmp_path / "c.yaml")], [])


def test_a_run_goes_on_with_its_own_settings_only(folder, capsys):
    assert cli(["curate", "--config", config(folder)]) == 0
    capsys.readouterr()
    assert cli(["curate", "--config", config(folder), "--filters.agreement", "0.9"]) == 2
    assert "was begun with filters.agreement 0.6, not 0.9; set it back" in capsys.readouterr().err
    assert cli(["curate", "--config", config(folder), "--filters.balance", "2", "--release.version", "2.0.0"]) == 0
    assert "2.0.0" in (folder / "run" / "release" / "README.md").read_text().splitlines()[0]


def test_a_file_may_switch_difficulty_on(tmp_path):
    (tmp_path / "a.yaml").write_text("pool: {path: x}\ndifficulty: {on: true}")
    assert read_arguments([str(tmp_path / "a.yaml")], []).difficulty.on is True


@pytest.mark.parametrize("name", ["no", "on", "off", "y"])
def test_a_word_is_the_same_in_a_file_and_on_the_command_line(tmp_path, name):
    (tmp_path / "a.yaml").write_text(f"pool: {{path: {name}}}")
    assert read_arguments([str(tmp_path / "a.yaml")], []).pool.path == name == read_arguments([], ["--pool.path", name]).pool.path


def test_the_shipped_settings_are_valid_and_are_read_back():
    cfg = read_arguments([str(ROOT / "configs" / "curate_tiny.yaml")], [])
    assert Curation.from_dict(cfg.to_dict()) == cfg and cfg.difficulty.on is False
    assert len(setting_names()) == len(set(setting_names())) > 30


def test_a_prompt_of_ones_own_takes_the_place_of_ours(folder):
    (folder / "prompts").mkdir()
    (folder / "prompts" / "crop.md").write_text("Look at this part.\n")
    seen = []
    own = Wrapped(
        tiny_agents(folder), lambda messages, schema, answer: seen.append((schema["title"], messages[0]["content"])) or answer
    )
    curate(tiny_settings(folder, agents={"prompts": str(folder / "prompts")}), dict.fromkeys(ROLES, own))
    assert {text for title, text in seen if title == "crop"} == {"Look at this part."}
    assert {text for title, text in seen if title == "proposal"} == {load_prompts("")["proposer"]}
    (folder / "prompts" / "cropp.md").write_text("x")
    with pytest.raises(ValueError, match=r"has cropp\.md, which is no prompt"):
        load_prompts(str(folder / "prompts"))


@pytest.mark.parametrize(("box", "size"), [
    ((0, 0, 500, 500), (336, 336)), ((500, 0, 501, 1000), (27, 2688)), ((0, 999, 1000, 1000), (2688, 27)),
    ((999, 0, 1000, 500), (54, 2688)),
])  # fmt: skip
def test_a_crop_is_enlarged_but_a_strip_is_no_picture_of_gigabytes(box, size):
    whole = Image.new("RGB", (100, 100), "red")
    roles = Roles({}, {}, SimpleNamespace(image=lambda name: whole), FilterSettings())
    crop = roles._crop("a", Evidence(1, box), 0.0)
    assert crop.size == size and crop.getcolors() == [(crop.width * crop.height, (255, 0, 0))]  # no pixel beside the image


def test_a_role_may_have_a_backend_of_its_own(folder):
    name = "imagent_jax.tiny.curators:TinyCurators"
    own = {"folders": [str(folder / "pictures"), str(folder / "pictures_test")], "glance": 1.0, "misread": 1.0}
    cfg = tiny_settings(folder, agents={"roles": {"answerer": {"backend": name, "settings": own}}})
    assert curate(cfg)["filters"]["agreement"]["found"] >= 6  # an answerer that misreads every digit


class Silent:
    """A backend that never answers."""

    Settings = TinyCuratorsSettings

    def __init__(self, settings):
        self.settings = settings

    def complete(self, messages, schema):
        raise AgentError("The server does not answer.")


def test_agents_that_never_answer_end_the_command_with_a_sentence(folder, capsys):
    backend = {"backend": "test_curation_pipeline:Silent", "settings": {"folders": ["x"]}}
    assert cli(["curate", "--config", config(folder, agents=backend, run={"failures": 2})]) == 3
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: \d proposals in a row had no answer of an agent\. The last: The server does not answer\. "
        r"What is done is kept; the same command goes on\.\n", error
    )  # fmt: skip


def test_a_damaged_line_of_the_work_is_a_sentence(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "work.jsonl").write_text('{"number": 0}\n')
    assert cli(["curate", "--config", config(folder)]) == 2
    assert "work.jsonl, line 1 is damaged" in capsys.readouterr().err
