"""Settings: defaults, YAML and command line, what is refused and in which words."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from imagent_jax.config import SETTINGS, TINY, Config, SourceConfig, load_config, parse_args, read_args
from imagent_jax.rl.published import PUBLISHED

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


def test_a_command_line_without_a_file_begins_with_the_tiny_run(tmp_path):
    tiny = load_config(CONFIGS / "tiny.yaml")
    assert (CONFIGS / "tiny.yaml").resolve() == TINY.resolve() and read_args([]) == tiny
    assert (tiny.model.path, tiny.data.name, tiny.run.name) == ("tiny", "tiny_world", "tiny")
    assert read_args(["--run.steps=3"]) == tiny.changed({"run.steps": 3})
    (tmp_path / "a.yaml").write_text("run: {steps: 3}\n")
    assert read_args([f"--config={tmp_path / 'a.yaml'}"]) == Config().changed({"run.steps": 3})


def test_the_tiny_run_names_only_what_differs_from_the_defaults():
    named = {f"{s}.{k}": v for s, values in yaml.safe_load(TINY.read_text()).items() for k, v in values.items()}
    tiny, default = load_config(TINY), Config()
    assert named.keys() == {name for name in SETTINGS if tiny.get(name) != default.get(name)}


RUNS = sorted(
    path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("curate_")
)  # those are test_curation_pipeline's


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
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
        "qwen3_vl_2b_gpu": "relative_1000",
        "qwen3_vl_8b_tpu": "relative_1000",
    }


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {steps: 7, seed: 3}\noptim: {learning_rate: 1e-4}\n")
    (tmp_path / "b.yaml").write_text("run: {seed: 4}\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    config = read_args(["--run.steps", "9", *files, "--tools.names=[visual_reflection]", "--run.resume", "true"])
    assert (config.run.steps, config.run.seed, config.run.resume) == (9, 4, True)
    assert config.optim.learning_rate == 1e-4 and config.tools.names == ("visual_reflection",)
    assert config.rollout == Config().rollout


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
        ("- 1", "The text must hold sections, 'name:' on a line of its own, with settings below each."),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(text, sentence):
    assert said(Config.from_yaml, text) == sentence


def test_on_and_off_are_values_of_settings_in_a_file_as_on_the_command_line(tmp_path):
    changes = {
        "eval.shuffle_options": "off",
        "search.record": "off",
        "run.resume": True,
        "data.skip_bad": True,
        "run.name": "truely",
    }
    text = "eval: {shuffle_options: off}\nsearch: {record: off}\nrun: {resume: True, name: truely}\ndata: {skip_bad: yes}"
    (tmp_path / "a.yaml").write_text(text)
    assert Config.from_yaml(text) == load_config(tmp_path / "a.yaml") == Config().changed(changes)
    (tmp_path / "none.yaml").write_text("")
    words = [f"--{name}={value}" for name, value in changes.items()]
    assert read_args([f"--config={tmp_path / 'none.yaml'}", *words]) == Config().changed(changes)


def test_text_that_is_not_yaml_is_refused_in_one_sentence(tmp_path):
    assert said(Config.from_yaml, "run: [").startswith("The text is not YAML: ")
    (tmp_path / "c.yaml").write_bytes(b"run: \xff")
    assert said(load_config, tmp_path / "c.yaml") == f"{tmp_path / 'c.yaml'} is not YAML: it is no text in UTF-8."


# ---- ranges: what is just good, and what is just bad ------------------------------------------------------------------

AT_LEAST_ONE = (
    "run.keep_checkpoints", "images.min_pixels", "images.pack_blocks", "images.pages",
    "data.train_size", "data.test_size", "tools.max_turns",
    "tools.max_repeats", "tools.max_images", "tools.workers", "tools.low_pixels", "tools.confirm_min_pixels", "rollout.groups",
    "rollout.prompt_tokens", "rollout.response_tokens", "rollout.observation_tokens",
    "rollout.decode_chunk", "grpo.constant", "grpo.epochs",
    "grpo.minibatches", "grpo.micro_groups", "grpo.length_buckets", "eval.during",
    "eval.groups", "eval.samples", "model.logprob_chunk", "distributed.timeout_s", "reward.concurrency", "judge.concurrency",
    "sandbox.cpu_s", "sandbox.disk_mb", "sandbox.printed", "search.passage_chars", "tools.mcp_chars",
)  # fmt: skip
ABOVE_ZERO = (
    "rollout.temperature", "optim.learning_rate", "optim.clip_norm", "tools.timeout_s", "tools.patience_s", "tools.min_box",
    "grpo.importance_cap", "lora.alpha", "sandbox.wall_s", "reward.timeout_s", "judge.timeout_s", "search.timeout_s",
)  # fmt: skip
NOT_NEGATIVE = (
    "run.steps", "run.profile", "run.checkpoint_every", "run.keep_best", "run.log_trajectories", "eval.every",
    "eval.tasks", "grpo.kl", "grpo.clip_high", "optim.weight_decay", "optim.warmup_steps", "lora.rank",
    "distributed.num_processes", "judge.retries", "rollout.refill", "images.originals_gb",
)  # fmt: skip
BELOW_ONE = ["optim.b1", "optim.b2", "grpo.clip_low"]
MESH = ["mesh.data", "mesh.fsdp", "mesh.tensor"]
PAIRS = [("images.min_pixels", "images.max_pixels"), ("tools.low_pixels", "tools.high_pixels"),
         ("tools.confirm_min_pixels", "tools.confirm_max_pixels")]  # fmt: skip
FREE = ["run.seed", "data.seed", "reward.answer", "reward.format", "reward.tool_gain", "eval.seed",
        "reward.iou", "reward.point_in_box", "reward.set_f1", "reward.math_verify", "reward.environment",
        "distributed.process_id"]  # fmt: skip


def nested(settings: dict) -> dict:
    values = {}
    for dotted, value in settings.items():
        section, key = dotted.split(".")
        values.setdefault(section, {})[key] = value
    return values


def refused(ending: str, **settings) -> str:
    sentence = said(Config.from_dict, nested({name.replace("__", "."): value for name, value in settings.items()}))
    assert sentence.endswith(ending), sentence
    return sentence


def test_every_number_has_a_range_or_needs_none():
    numbers = [name for name, kind in SETTINGS.items() if kind in (int, float)]
    ranged = [
        *AT_LEAST_ONE,
        *ABOVE_ZERO,
        *NOT_NEGATIVE,
        *BELOW_ONE,
        *MESH,
        *FREE,
        *(high for _, high in PAIRS),
        "images.vision_block",
        "rollout.group_size",
        "data.curriculum_floor",
        "sandbox.memory_mb",
        "sandbox.files",
        "distributed.heartbeat_s",
        "search.passages",
        "reward.judge",
        *(f"reward.{name}" for name in PUBLISHED),
    ]
    assert sorted(numbers) == sorted(ranged)
    for dotted in FREE:
        assert Config.from_dict(nested({dotted: -3})).get(dotted) == -3


@pytest.mark.slow(4)
def test_ranges_hold_at_their_limits():
    beside = {"rollout.groups": {"grpo.minibatches": 1}}
    cases = [(name, [1], [0, -1], "it must be at least 1.") for name in AT_LEAST_ONE]
    cases += [(name, [1e-9], [0.0, -1e-9], "it must be above 0.") for name in ABOVE_ZERO if name != "tools.min_box"]
    cases += [(name, [0], [-1] if SETTINGS[name] is int else [-1e-9], "it must be at least 0.") for name in NOT_NEGATIVE]
    cases += [(name, [0.0, 0.999], [-1e-9, 1.0], "it must be at least 0 and below 1.") for name in BELOW_ONE]
    cases += [(name, [1, 7, -1], [0, -2], "it must be at least 1, or -1 for the devices that are left.") for name in MESH]
    cases += [("tools.min_box", [1e-9, 1.0], [0.0, 1.01], "it must be above 0 and at most 1."),
              ("data.curriculum_floor", [1e-9, 1.0], [0.0, 1.01], "it must be above 0 and at most 1."),
              ("images.vision_block", [97], [0], "it must be at least 1."),
              ("sandbox.memory_mb", [16], [15, 0], "it must be at least 16."),
              ("sandbox.files", [16], [15, 0], "it must be at least 16."),
              ("distributed.heartbeat_s", [10], [9, 0], "it must be at least 10."),
              ("search.passages", [1, 100], [0, 101], "it must be at least 1 and at most 100."),
              ("rollout.group_size", [2], [0, -1], "it must be at least 2.")]  # fmt: skip
    cases += [
        (name, [], [float("inf"), float("nan")], "it must be a finite number.")
        for name, kind in SETTINGS.items()
        if kind is float
    ]
    for dotted, good, bad, ending in cases:
        for value in good:
            assert Config.from_dict(nested({dotted: value} | beside.get(dotted, {}))).get(dotted) == value
        for value in bad:
            assert refused(ending, **{dotted: value}).startswith(
                f"{dotted} is {float(value) if SETTINGS[dotted] is float else value}"
            )


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_pixels_are_in_order(low, high):
    assert Config.from_dict(nested({low: 3000, high: 3000})).get(high) == 3000
    assert refused(f"raise {high} or lower {low}.", **{low: 3000, high: 2999}).startswith(f"{high} 2999 is below {low} 3000;")


def test_settings_with_which_nothing_is_learned_are_refused():
    sentence = refused("set it to at least 2.", rollout__group_size=1)
    assert sentence.startswith("rollout.group_size is 1, but a rollout learns by comparison with others of its task;")
    assert Config.from_dict({"rollout": {"group_size": 2}})
    none = {"reward__answer": 0, "reward__format": 0, "reward__tool_gain": 0}
    assert refused("give one reward a weight.", **none).startswith("Every weight of reward is 0, so that no rollout is better")
    assert refused("give one reward a weight.", **none | {"reward__custom": []})
    for one in ({"reward__answer": 0.5}, {"reward__format": -1.0}, {"reward__tool_gain": 1}, {"reward__custom": ["a.b:c"]},
                {"reward__iou": 1}, {"reward__custom": {"a.b:c": 0.5}}, {"reward__judge": 1, "judge__model": "m"},
                {"tools__environment": "a.b:World"}):  # fmt: skip
        assert Config.from_dict(nested({k.replace("__", "."): v for k, v in (none | one).items()}))


def test_rewards_of_ones_own_are_a_list_or_have_weights(tmp_path):
    weights = Config.from_dict({"reward": {"custom": ["a:b", "c.d:e"]}}).reward.custom_weights
    assert weights == {"a:b": 1.0, "c.d:e": 1.0}
    config = Config.from_dict({"reward": {"custom": {"a:b": 0.5, "c.d:e": -1}}})
    assert config.reward.custom_weights == {"a:b": 0.5, "c.d:e": -1.0}
    assert Config.from_yaml(config.to_yaml()) == config == Config.from_dict(config.to_dict())
    assert hash(config) == hash(Config.from_dict(config.to_dict()))  # jitted functions take it as a static argument
    (tmp_path / "a.yaml").write_text("reward: {custom: {a:b: 0.5, c.d:e: -1}}")
    assert load_config(tmp_path / "a.yaml") == config
    (tmp_path / "none.yaml").write_text("")
    for word in ('{"a:b": 0.5, "c.d:e": -1}', "{a:b: 0.5, c.d:e: -1}"):
        assert read_args([f"--config={tmp_path / 'none.yaml'}", f"--reward.custom={word}"]) == config
    for wrong in (3, {"a:b": "much"}, [1]):
        said_of_it = refused(
            "it must be a list of names or a mapping from names to numbers, such as {a: 0.5}.", reward__custom=wrong
        )
        assert said_of_it.startswith("reward.custom is ")
    none = {"reward__answer": 0, "reward__format": 0, "reward__tool_gain": 0, "reward__custom": {"a:b": 0}}
    refused("give one reward a weight.", **none)
    for weight in (float("nan"), float("inf")):
        sentence = refused("it must be a finite number.", reward__custom={"a:b": weight})
        assert sentence == f"reward.custom gives 'a:b' the weight {weight}; it must be a finite number."
    assert refused("name the model on the server judge.base_url.", reward__judge=0.5).startswith("reward.judge has a weight, but")


def test_settings_that_do_not_go_together_are_refused():
    slow = {"tools.names": ["python"], "tools.timeout_s": 5.0}
    assert "sandbox.wall_s is 5, not below tools.timeout_s 5" in refused("and no fault.", **slow)
    assert Config.from_dict(nested(slow | {"sandbox.wall_s": 4.9})) and Config.from_dict(nested(slow | {"tools.names": []}))
    assert Config.from_dict(nested({"grpo.minibatches": 16}))
    assert refused("an update needs a group at least.", grpo__minibatches=17).startswith(
        "grpo.minibatches is 17, more than rollout.groups 16;")  # fmt: skip
    tower = "rollout.overlap is for a tower that stays as it is; set model.freeze_vision, unset lora.tower and lora.merger."
    assert Config.from_dict(nested({"rollout.overlap": True})) and Config.from_dict(nested({"model.freeze_vision": False}))
    refused(tower, rollout__overlap=True, model__freeze_vision=False)
    refused(tower, rollout__overlap=True, lora__merger=True)
    refused(tower, rollout__overlap=True, lora__tower=True)
    refused("set grpo.recompute true.", mask__observations="keep")
    assert Config.from_dict(nested({"mask.observations": "keep", "grpo.recompute": True}))
    for name in ("", " "):
        assert refused("give the run a name, which becomes its folder in run.dir.", run__name=name).startswith(
            "run.name is empty"
        )
    for one, other in (("mesh.data", "mesh.fsdp"), ("mesh.data", "mesh.tensor"), ("mesh.fsdp", "mesh.tensor")):
        refused("(what is left); give the others a size.", **{one: -1, other: -1})
    for adapted in ({"lora.rank": 1}, {"lora.path": "somewhere"}):
        assert Config.from_dict(nested(adapted)).lora.on
        assert "with LoRA" in refused(
            "lora.tower or lora.merger to adapt the vision tower or its merger.", **adapted, model__freeze_vision=False
        )
    assert not Config().lora.on
    assert refused("linear_fc1, linear_fc2.", lora__targets=["q_prog"]).startswith(
        "lora.targets is 'q_prog'; it must be a list of"
    )
    assert refused("or set lora.merger true.", lora__targets=[]) and Config.from_dict(
        nested({"lora.targets": [], "lora.merger": True})
    )
    assert Config.from_dict(nested({"tools.names": ["my.own:tool"]})).tools.names == ("my.own:tool",)


SOURCE = {
    "name": "files", "path": "here", "test_path": "there", "weight": 0.5, "answer_type": "f1",
    "tools": ["visual_reflection"], "reward": {"answer": 2.0}, "environment": "own:World",
}  # fmt: skip


def test_a_source_of_a_mixture_is_changed_from_the_command_line_alone(tmp_path):
    text = yaml.safe_dump({"data": {"mixture": {"maps": SOURCE, "charts": {"path": "c"}}}}, sort_keys=False)
    (tmp_path / "a.yaml").write_text(text)
    base = f"--config={tmp_path / 'a.yaml'}"
    config = read_args([base, "--data.mixture.charts.weight=3", "--data.mixture.maps.tools=[]", "--data.mixture.new.path", "n"])
    sources = config.data.mixture
    assert [*sources] == ["maps", "charts", "new"] and config.data.title == "maps, charts, new"
    assert sources["maps"] == SourceConfig(**SOURCE | {"tools": ()}) and sources["charts"] == SourceConfig(path="c", weight=3.0)
    assert sources["new"] == SourceConfig(path="n") and hash(config) == hash(Config.from_yaml(config.to_yaml()))
    assert Config().data.title == "files" and Config.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{weight: 0}", "data.mixture.a.weight is 0; it must be a number above 0, or leave the source out."),
        ("{weight: .inf}", "data.mixture.a.weight is inf; it must be a number above 0, or leave the source out."),
        ("{weight: x}", "A source of data.mixture has weight 'x'; it must be a number."),
        ("{qqqq: 2}", "A source of data.mixture has no setting 'qqqq'; see --help for every setting."),
        ("{weigt: 2}", "A source of data.mixture has no setting 'weigt'; did you mean 'weight'?"),
        ("{tools: zoom}", "A source of data.mixture has tools 'zoom'; it must be a list of names, such as [a, b], or null."),
        ("3", "data.mixture is '3'; it must be a mapping of names, such as {a: ...}."),
        (
            "{name: web}",
            "A source of data.mixture has name 'web'; it must be one of 'files', 'tiny_world', 'tiny_code', 'tiny_search', "
            "'tiny_total', 'tiny_code_steps', 'tiny_search_steps'.",
        ),
        ("{reward: {anser: 1}}", "data.mixture.a.reward has 'anser', which is no reward of the run; did you mean 'answer'?"),
        ("{reward: {answer: .nan}}", "data.mixture.a.reward.answer is nan; it must be a finite number."),
        (
            "{reward: {answer: 0, format: 0, tool_gain: 0}}",
            "Every weight of data.mixture.a.reward is 0, so that no rollout is better; give one reward a weight.",
        ),
    ],
)
def test_a_bad_source_is_refused_in_one_sentence(source, sentence):
    assert said(Config.from_yaml, f"data: {{mixture: {{a: {source}}}}}") == sentence
    assert said(read_args, [f"--data.mixture={{a: {source}}}"]) == sentence


def test_a_mixture_has_names_and_paths_of_its_own():
    assert said(Config.from_yaml, "data: {mixture: {a/b: {}}}").startswith("data.mixture has a source 'a/b'; name it with")
    for key in ("path", "test_path"):
        sentence = said(Config.from_yaml, f"data: {{{key}: x, mixture: {{a: {{path: y}}}}}}")
        assert sentence.startswith("data.mixture and data.path are both set; name each source's path")
    weights = Config.from_yaml("reward: {answer: 0, custom: ['own:one']}\ndata: {mixture: {a: {reward: {'own:one': 0}}}}")
    given = {name: weight for name, weight in weights.reward.weights.items() if weight}
    assert given == {"format": 0.1, "tool_gain": 0.2, "own:one": 1.0} and weights.used_rewards == {*given}
    judged = "reward: {judge: 0}\ndata: {mixture: {a: {path: y, reward: {judge: 1, iou: 2}}}}"
    assert said(Config.from_yaml, judged).startswith("reward.judge has a weight, but judge.model is empty")
    assert Config.from_yaml(f"{judged}\njudge: {{model: m}}").used_rewards == {"answer", "format", "tool_gain", "judge", "iou"}


def changed(name: str):
    """Another value than the default of a setting."""
    default, kind = Config().get(name), SETTINGS[name]
    if typing.get_origin(kind) is typing.Literal:
        return [option for option in typing.get_args(kind) if option != default][-1]
    known = {
        "tools.names": ("visual_confirmation",), "lora.targets": ("q_proj", "up_proj"),
        "tools.settings": {"look": {"timeout_s": 3.5}},
        "data.mixture": {"maps": dict(SOURCE), "charts-2": SOURCE | {"tools": None, "reward": {}, "name": "tiny_world"}},
    }  # fmt: skip
    values = {
        bool: lambda: not default,
        int: lambda: default + 4,
        float: lambda: default * 0.5 + 0.03,
        str: lambda: f"{name}: 'x' # y",
    }
    return values[kind]() if kind in values else known.get(name, (f"own:{name.partition('.')[2]}", "b:c"))


def test_every_setting_survives_yaml_and_the_command_line(tmp_path):
    apart = ["model.freeze_vision", "rollout.overlap", "data.mixture"]  # each goes with less than all others
    for names in ([name for name in SETTINGS if name not in apart], *([name] for name in apart)):
        wanted = {name: changed(name) for name in names}
        assert all(value != Config().get(name) for name, value in wanted.items())
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
        config = Config.from_dict(nested(plain))
        found = {name: config.get(name) for name in SETTINGS} | {"data.mixture": config.to_dict()["data"]["mixture"]}
        assert found == {name: Config().get(name) for name in SETTINGS} | wanted
        assert Config.from_yaml(config.to_yaml()) == config == Config.from_dict(config.to_dict())
        spelt = {name: yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
                 if not isinstance(value, str) else value for name, value in plain.items()}  # fmt: skip
        (tmp_path / "none.yaml").write_text("")
        base = f"--config={tmp_path / 'none.yaml'}"
        assert read_args([base, *(f"--{name}={value}" for name, value in spelt.items())]) == config
        assert read_args([base, *(word for name, value in spelt.items() for word in (f"--{name}", value))]) == config
        (tmp_path / "a.yaml").write_text(config.to_yaml())
        assert read_args(["--config", str(tmp_path / "a.yaml")]) == load_config(str(tmp_path / "a.yaml")) == config


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


@pytest.mark.slow(5)
def test_a_refused_command_line_ends_with_code_2_and_the_sentence_before_any_compute():
    command = [sys.executable, "-m", "imagent_jax.train", "--run.stepz=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CONFIGS.parent)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: There is no setting 'run.stepz'; did you mean 'run.steps'?"
    assert ended.stdout == ""
