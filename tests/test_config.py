"""Settings: defaults, YAML and command line, what is refused and in which words."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from imagent_jax.config import SETTINGS, Config, load_config, parse_args, read_args

CONFIGS = Path(__file__).parent.parent / "configs"
CHANGED = {
    "run": {"name": "a: 'b' # c", "steps": 7, "resume": True, "compile_cache": ""},
    "model": {"dtype": "bfloat16"},
    "tools": {"names": ["visual_confirmation"], "min_box": 0.1},
    "optim": {"learning_rate": 1e-6, "b2": 0.999},
    "reward": {"custom": ["pkg.mod:fn"]},
    "mesh": {"fsdp": -1},
}


def said(call, *args) -> str:
    with pytest.raises(ValueError) as refused:
        call(*args)
    sentence = str(refused.value)
    assert "\n" not in sentence and sentence[-1] in ".?"
    return sentence


def test_every_setting_has_a_default_and_a_sentence():
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.type):
            assert f.default is not dataclasses.MISSING, f"{section.name}.{f.name}"
            assert len(f.metadata["help"]) > 5, f"{section.name}.{f.name}"
    Config().validate()


def test_a_config_is_frozen_and_hashable():
    assert hash(Config()) == hash(Config.from_dict({}))
    assert {Config(): 1}[Config.from_dict({})] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.steps = 3


def test_saved_yaml_reproduces_the_config(tmp_path):
    config = Config.from_dict(CHANGED)
    assert config.run.name == "a: 'b' # c" and config.tools.names == ("visual_confirmation",)
    assert Config.from_yaml(config.to_yaml()) == config
    assert yaml.safe_load(config.to_yaml()).keys() == {f.name for f in dataclasses.fields(Config)}
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == read_args(["--config", str(tmp_path / "config.yaml")]) == config


def test_tiny_yaml_is_the_default_run_written_out():
    assert load_config(CONFIGS / "tiny.yaml") == Config()
    header, _, written = (CONFIGS / "tiny.yaml").read_text().partition("\n")
    assert header.startswith("# ") and written == Config().to_yaml(), "put Config().to_yaml() below the first line"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert Config.from_yaml(config.to_yaml()) == config


def test_shipped_configs_use_the_coordinates_of_their_model_family():
    found = {p.stem: load_config(p).tools.coordinates for p in CONFIGS.glob("qwen*.yaml")}
    assert found == {
        "qwen2_vl_2b_gpu": "relative_1000",
        "qwen2_vl_7b_tpu": "relative_1000",
        "qwen2_5_vl_3b_gpu": "absolute",
        "qwen2_5_vl_7b_tpu": "absolute",
    }


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {steps: 7, seed: 3}\noptim: {learning_rate: 1e-4}\n")
    (tmp_path / "b.yaml").write_text("run: {seed: 4}\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    config = read_args(["--run.steps", "9", *files, "--tools.names=[visual_reflection]", "--run.resume", "true"])
    assert (config.run.steps, config.run.seed, config.run.resume) == (9, 4, True)
    assert config.optim.learning_rate == 1e-4 and config.tools.names == ("visual_reflection",)
    assert config.rollout == Config().rollout
    assert read_args([]) == Config()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--run.stepz", "1"], "There is no setting 'run.stepz'; did you mean 'run.steps'?"),
        (["--steps=3"], "There is no setting 'steps'; did you mean 'run.steps'?"),
        (["--learning_rat=3"], "There is no setting 'learning_rat'; did you mean 'optim.learning_rate'?"),
        (["--run.st=3"], "There is no setting 'run.st'; did you mean 'run.steps'?"),
        (["--qqqq=3"], "There is no setting 'qqqq'; see --help for every setting."),
        (["--run.steps", "many"], "run.steps is 'many'; it must be a whole number."),
        (["--run.steps=1.5"], "run.steps is '1.5'; it must be a whole number."),
        (["--run.resume", "maybe"], "run.resume is 'maybe'; it must be true or false."),
        (["--optim.learning_rate=fast"], "optim.learning_rate is 'fast'; it must be a number."),
        (["--grpo.level=tokens"], "grpo.level is 'tokens'; it must be one of 'token', 'sequence', 'constant'."),
        (["--run.steps"], "--run.steps needs a value, as in --run.steps=VALUE."),
        (["train"], "Unrecognized arguments: train; see --help for every setting."),
        (["--config", "/nowhere.yaml"], "There is no config file /nowhere.yaml."),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(argv, sentence):
    assert said(read_args, argv) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run: {stepz: 1}", "There is no setting 'run.stepz'; did you mean 'run.steps'?"),
        ("optim: {steps: 1}", "There is no setting 'optim.steps'; did you mean 'run.steps'?"),
        ("rolout: {}", "There is no section 'rolout'; did you mean 'rollout'?"),
        ("run: 3", "Section 'run' must hold settings, such as run.name, not 3."),
        ("run: {steps: true}", "run.steps is 'True'; it must be a whole number."),
        ("run: {steps: }", "run.steps is empty; it must be a whole number, or be left out for its default."),
        ("run: {name: 5}", "run.name is '5'; it must be text (quote it in YAML)."),
        ("tools: {names: visual}", "tools.names is 'visual'; it must be a list of names, such as [a, b]."),
        ("- 1", "The text must hold sections with settings, such as 'run:' with 'steps: 100' below it."),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(text, sentence):
    assert said(Config.from_yaml, text) == sentence


def test_text_that_is_not_yaml_is_refused_in_one_sentence():
    assert said(Config.from_yaml, "run: [").startswith("The text is not YAML: ")


@pytest.mark.parametrize(
    ("dotted", "value", "ending"),
    [
        ("rollout.groups", 0, "it must be at least 1."),
        ("rollout.temperature", 0.0, "it must be above 0."),
        ("optim.learning_rate", float("inf"), "it must be a finite number."),
        ("optim.b2", 1.0, "it must be at least 0 and below 1."),
        ("grpo.kl", -0.1, "it must not be negative."),
        ("grpo.importance_cap", 0.0, "it must be above 0."),
        ("tools.min_box", 1.5, "it is a fraction of the image's side, at most 1."),
        ("images.max_pixels", 3000, "raise images.max_pixels or lower images.min_pixels."),
        ("images.max_pixels", 100_000, "raise images.vision_block or lower images.max_pixels."),
        ("tools.confirm_max_pixels", 50_000, "raise images.vision_block or lower tools.confirm_max_pixels."),
        ("images.vision_block", 90, "it must be a multiple of 4 (2x2 patches)."),
        ("grpo.minibatches", 17, "an update needs a group at least."),
        ("data.name", "jsonl", "name the folder with train.jsonl and test.jsonl."),
        ("run.name", " ", "give the run a name, which becomes its folder in run.dir."),
        ("mesh.tensor", 0, "it must be at least 1, or -1 for the devices that are left."),
        ("tools.names", ["visual_reflexion"], 'there is no tool "visual_reflexion"; did you mean "visual_reflection"?'),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_remedy(dotted, value, ending):
    section, key = dotted.split(".")
    sentence = said(Config.from_dict, {section: {key: value}})
    assert dotted in sentence and sentence.endswith(ending)


def test_only_one_mesh_axis_takes_the_devices_that_are_left():
    assert said(Config.from_dict, {"mesh": {"data": -1, "fsdp": -1}}).startswith("Only one mesh axis can be -1")


def test_help_names_every_setting_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.type):
            name = f"{section.name}.{f.name}"
            entry = shown.split(f"--{name} ", 1)[1].split(" --", 1)[0]
            assert f.metadata["help"] in entry, name
            assert "default: " in entry and "type: " in entry, name
            if SETTINGS[name] in (int, float):
                assert f"default: {f.default})" in entry, name
            if typing.get_origin(SETTINGS[name]) is typing.Literal:
                assert all(option in entry for option in typing.get_args(SETTINGS[name])), name


def test_the_page_of_settings_is_what_its_command_writes():
    command = [sys.executable, "-m", "imagent_jax.config"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=CONFIGS.parent, check=True)
    page = (CONFIGS.parent / "docs" / "configuration.md").read_text()
    assert page == ended.stdout, "run python -m imagent_jax.config > docs/configuration.md"
    assert re.findall(r"^- `([\w.]+): ", page, re.MULTILINE) == list(SETTINGS)
    assert max(map(len, page.splitlines())) <= 120


def test_a_refused_command_line_ends_with_code_2_and_the_sentence_before_any_compute():
    command = [sys.executable, "-m", "imagent_jax.train", "--run.stepz=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CONFIGS.parent)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: There is no setting 'run.stepz'; did you mean 'run.steps'?"
    assert ended.stdout == ""
