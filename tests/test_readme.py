"""The front page: every block of code in README.md runs, loads or parses. Commands of the other pages parse."""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from scripted_run import ANSWER, play
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from imagent_jax.chat import QWEN
from imagent_jax.cli import COMMANDS as COMMANDS_OF_IMAGENT
from imagent_jax.config import SETTINGS, TINY, Config, read_args
from imagent_jax.rl.rewards import reward_functions, score_trajectories
from imagent_jax.tiny.base import base_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python -m [^`;&\n]+", README)))  # of blocks and of sentences
PAGES = {page.stem: page.read_text() for page in (ROOT / "docs").glob("*.md") if page.stem not in ("benchmarks", "plans")}
OTHERS = sorted(
    (page, line)
    for page, text in PAGES.items()
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"imagent (?!\w+ [A-Z-])|python -m imagent_jax\.(train|evaluate|view|ablate) ", line)
)  # `imagent index CORPUS` is a form, no command


def of(kind: str) -> list[str]:
    return [text for language, text in BLOCKS if language == kind]


class Parsed(Exception):
    """Arguments were accepted; nothing else is to happen."""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the files that the page names, the current one and where Python looks."""
    for text in of("yaml") + of("python"):
        if name := re.match(r"# (\S+\.(?:py|yaml))\n", text):
            with open(tmp_path / name[1], "a") as file:
                file.write(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def random_weights(folder: Path) -> None:
    """Hugging Face files of a model of the tiny base's shape that was never trained."""
    shutil.copytree(base_folder(), folder)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder)).save_pretrained(folder)


def test_every_block_is_of_a_kind_that_is_checked():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "yaml"} and 2 * len(BLOCKS) == README.count("```")
    assert all(len(text.splitlines()) <= 20 for _, text in BLOCKS)
    assert all("python -m imagent_jax." in line for text in of("bash")[2:] for line in text.splitlines())


def test_the_two_commands_to_start_are_what_is_installed_and_what_ci_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    train, test = of("bash")[:2]
    assert train == "pip install -e . && python -m imagent_jax.train\n"
    assert f"({test.strip()})" in (ROOT / ".ci" / "run").read_text()
    offered = set(re.findall(r"\.\[(\w+)\]", README))
    assert {"test", "cuda", "tpu"} <= offered <= set(project["optional-dependencies"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_module_and_its_arguments(command, mine, monkeypatch):
    words = shlex.split(command)
    arguments, module = words[3:], importlib.import_module(words[2])
    (mine / "FILE.yaml").write_text("")
    if hasattr(module, "parse"):  # settings and options of its own
        module.parse(arguments)
        return
    if hasattr(module, "parse_args"):  # settings
        if arguments == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                module.parse_args(arguments)
        else:
            assert isinstance(read_args(arguments), Config)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args):
        parse(*args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.delitem(sys.modules, words[2])  # it is run anew, as `python -m` does
    with pytest.raises(Parsed):
        runpy.run_module(words[2], run_name="__main__")


@pytest.mark.parametrize(("page", "command"), OTHERS)
def test_every_command_of_the_other_pages_is_one_that_the_program_takes(page, command, tmp_path, monkeypatch):
    words = shlex.split(command.replace("python -m imagent_jax.", "imagent "), comments=True)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    module, parse = importlib.import_module(f"imagent_jax.{words[1]}"), argparse.ArgumentParser.parse_args

    def parsed(*args):
        raise Parsed

    if hasattr(module, "parse"):
        module.parse(words[2:])
    elif hasattr(module, "parse_args"):
        cfg = read_args(words[2:])
        own = page != "tools" or "--config" in words  # the sizes of the tiny run have no room for other tools
        assert own and (cfg.data.name == "files" or not cfg.data.path)
    else:
        monkeypatch.setattr("imagent_jax.curation.command._run", parsed)
        if words[1] != "curate" or "--review" in words:
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: parsed(parse(*args)))
        with pytest.raises(Parsed):
            module.main(words[2:])


def test_every_command_has_its_line_on_the_page_of_commands():
    table = PAGES["runs"].split("## Commands")[1].split("## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*COMMANDS_OF_IMAGENT]


def test_every_extra_has_its_line_on_the_page_of_commands():
    table = PAGES["runs"].split("## Extras")[1].split("## ")[0]
    listed = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*listed} == {*extras}


def test_every_setting_that_is_named_exists():
    named = re.findall(r"--(\w+\.\w+) ([^\s`;]+)", README.replace("--section.key VALUE", ""))
    assert len(named) >= 3
    for name, value in named:
        assert name in SETTINGS
        if not value.isupper():  # else it stands for a value
            read_args([f"--{name}", value])


@pytest.mark.slow(30)
def test_your_own_data_tool_reward_and_model_do_what_the_page_says(mine, capsys):
    random_weights(mine / "weights")
    own = yaml.safe_load((mine / "mine.yaml").read_text())
    small = {name: values | own.pop(name, {}) for name, values in yaml.safe_load(TINY.read_text()).items()}
    small["rollout"]["prompt_tokens"] = 1024
    (mine / "mine.yaml").write_text(yaml.safe_dump(small | own))  # the page's lines on top of small sizes
    page = {}
    for text in of("python"):
        exec(compile(text, "README.md", "exec"), page)
    answered, *said = capsys.readouterr().out.splitlines()
    t = page["agent"].answer(page["task"].question, page["task"].images)
    assert answered == f"{t.task.question} {t.answer} {[turn.text for turn in t.turns]}" and t.answer
    assert len(said) == 2 and all(re.match(r"(TRUNCATED|VOID|ANSWERED|FAULT|REPEATED) \[", line) for line in said)

    parts, task = page["parts"], page["parts"].test_tasks(1)[0]
    assert parts.tools.names == ("visual_confirmation", "turn") and task.question == "Which image is red?"
    turn = QWEN.render_call("turn", {"image": 2, "degrees": 270})
    t = play(parts.collector, task, 0, [turn, ANSWER.format("Image 1")])
    assert t.executed_calls == 1 and t.images[2].image.size == (200, 120)
    assert t.images[2].describe() == "Image 3: 270-degree turn of Image 2"
    parts_of_reward = score_trajectories([t], reward_functions(parts.cfg.reward))[0]
    assert parts_of_reward["answer"] == 1.0 and parts_of_reward["mine:brief"] == pytest.approx(0.1)
    often = play(parts.collector, task, 0, [turn, QWEN.render_call("turn", {"image": 9}), turn, ANSWER.format("Image 1")])
    assert (often.executed_calls, often.invalid_calls) == (2, 1)
    assert score_trajectories([often], reward_functions(parts.cfg.reward))[0]["mine:brief"] == 0.0
