"""The settings of a run as one: checked, YAML in and out, dotted overrides on the command line."""

import copy
import dataclasses
import difflib
import functools
import math
import operator
import re
import sys
import textwrap
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

import imagent_jax.config.settings as sections


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: sections.RunConfig = sections.RunConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    lora: sections.LoraConfig = sections.LoraConfig()
    images: sections.ImagesConfig = sections.ImagesConfig()
    data: sections.DataConfig = sections.DataConfig()
    tools: sections.ToolsConfig = sections.ToolsConfig()
    sandbox: sections.SandboxConfig = sections.SandboxConfig()
    search: sections.SearchConfig = sections.SearchConfig()
    rollout: sections.RolloutConfig = sections.RolloutConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    judge: sections.JudgeConfig = sections.JudgeConfig()
    mask: sections.MaskConfig = sections.MaskConfig()
    grpo: sections.GRPOConfig = sections.GRPOConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    eval: sections.EvalConfig = sections.EvalConfig()
    mesh: sections.MeshConfig = sections.MeshConfig()
    distributed: sections.DistributedConfig = sections.DistributedConfig()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From nested dictionaries; what is missing keeps its default.

        Raises:
            ValueError: an unknown or ill-typed key (the nearest valid name is given), or values that do not go together.
        """
        check_names(values)
        return _build(_checked(_parser().parse_object, copy.deepcopy(values)))  # the parser changes nested mappings in place

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """From YAML text, the inverse of `to_yaml`; what is missing keeps its default.

        Raises:
            ValueError: not a YAML mapping, or see `from_dict`.
        """
        return cls.from_dict(_read_yaml(text, "The text"))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries; `from_dict` is the inverse."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Complete and reloadable."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def get(self, dotted: str) -> Any:
        """The value of a setting by dotted name."""
        return functools.reduce(getattr, dotted.split("."), self)

    @property
    def used_rewards(self) -> set[str]:
        """Names of the rewards that have a weight, in all tasks or in those of a source."""
        weights = self.reward.weights, *(source.reward for source in self.data.mixture.values())
        return {name for each in weights for name, weight in each.items() if weight}

    def changed(self, settings: Mapping[str, Any]) -> "Config":
        """Return the configuration with some settings replaced, by dotted name.

        Raises:
            ValueError: see `from_dict`.
        """
        values = self.to_dict()
        for name, value in settings.items():
            section, _, key = name.partition(".")
            values.setdefault(section, {})[key] = value
        return Config.from_dict(values)

    def validate(self) -> None:
        """Raises ValueError for a value out of range or values that do not go together; the sentence says what to change."""
        if self.rollout.group_size == 1:
            raise ValueError(
                "rollout.group_size is 1, but a rollout learns by comparison with others of its task; set it to at least 2."
            )
        self._validate_ranges()
        self._validate_images()
        if self.grpo.minibatches > self.rollout.groups:
            raise ValueError(
                f"grpo.minibatches is {self.grpo.minibatches}, more than rollout.groups {self.rollout.groups}; an update needs a "
                "group at least."
            )
        if self.rollout.overlap and (not self.model.freeze_vision or self.lora.merger or self.lora.tower):
            raise ValueError(
                "rollout.overlap is for a tower that stays as it is; set model.freeze_vision, unset lora.tower and lora.merger."
            )
        if self.mask.observations == "keep" and not self.grpo.recompute:
            raise ValueError(
                "mask.observations is 'keep', but a sampler has no log-probabilities of observations; set grpo.recompute true."
            )
        self._validate_sources()
        self._validate_rewards()
        if not self.run.name.strip():
            raise ValueError("run.name is empty; give the run a name, which becomes its folder in run.dir.")
        for axis in dataclasses.fields(sections.MeshConfig):
            if (size := self.get(f"mesh.{axis.name}")) != -1 and size < 1:
                raise ValueError(f"mesh.{axis.name} is {size}; it must be at least 1, or -1 for the devices that are left.")
        if sum(axis == -1 for axis in (self.mesh.data, self.mesh.fsdp, self.mesh.tensor)) > 1:
            raise ValueError("Only one mesh axis can be -1 (what is left); give the others a size.")
        if self.lora.on and not self.model.freeze_vision:
            raise ValueError(
                "model.freeze_vision is false, but with LoRA the model's own weights stay as they are; leave it true, and set "
                "lora.tower or lora.merger to adapt the vision tower or its merger."
            )
        limit = self.tools.settings.get("python", {}).get("timeout_s")
        place, limit = ("tools.timeout_s", self.tools.timeout_s) if limit is None else ("tools.settings.python.timeout_s", limit)
        if "python" in self.tools.names and self.sandbox.wall_s >= limit:
            raise ValueError(
                f"sandbox.wall_s is {self.sandbox.wall_s:g}, not below {place} {limit:g}; lower it, so that slow code is an "
                "error that the policy can repair and no fault."
            )
        if self.sandbox.backend == "remote" and not self.sandbox.url:
            raise ValueError("sandbox.backend is 'remote', but sandbox.url is empty; name a server that speaks POST /run_code.")
        if not self.lora.targets and not self.lora.merger:
            raise ValueError("lora.targets is empty, so that nothing is adapted; name matrices, or set lora.merger true.")

    def _validate_sources(self) -> None:
        """Raises ValueError for a source of `data.mixture` that cannot be used, whatever its files hold."""
        weights = self.reward.weights
        for name, source in self.data.mixture.items():
            place = f"data.mixture.{name}"
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"data.mixture has a source {name!r}; name it with letters, digits, _ and - only.")
            if not 0 < source.weight < math.inf:
                raise ValueError(f"{place}.weight is {source.weight:g}; it must be a number above 0, or leave the source out.")
            for reward, weight in source.reward.items():
                if reward not in (*weights, "environment"):
                    raise ValueError(f"{place}.reward has {reward!r}, which is no reward of the run; {nearest(reward, weights)}")
                if not math.isfinite(weight):
                    raise ValueError(f"{place}.reward.{reward} is {weight}; it must be a finite number.")
            if not any((weights | source.reward).values()) and not self._paid_by(source.environment):
                raise ValueError(f"Every weight of {place}.reward is 0, so that no rollout is better; give one reward a weight.")
        if self.data.mixture and (self.data.path or self.data.test_path):
            raise ValueError(
                "data.mixture and data.path are both set; name each source's path in data.mixture and unset data.path."
            )

    def _validate_ranges(self) -> None:
        for dotted, bounds in _BOUNDS.items():
            check_range(dotted, self.get(dotted), bounds)

    def _paid_by(self, *environments: str) -> bool:
        """Return whether environments of a user's own may pay a reward."""
        return bool(self.reward.environment and any((self.tools.environment, *environments)))

    def _validate_rewards(self) -> None:
        weights = self.reward.weights
        if not any(weights.values()) and not self._paid_by(*(source.environment for source in self.data.mixture.values())):
            raise ValueError("Every weight of reward is 0, so that no rollout is better than another; give one reward a weight.")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"reward.custom gives {name!r} the weight {weight}; it must be a finite number.")
        if "judge" in self.used_rewards and not self.judge.model:
            raise ValueError("reward.judge has a weight, but judge.model is empty; name the model on the server judge.base_url.")

    def _validate_images(self) -> None:
        for low, high in (
            ("images.min_pixels", "images.max_pixels"),
            ("tools.low_pixels", "tools.high_pixels"),
            ("tools.confirm_min_pixels", "tools.confirm_max_pixels"),
        ):
            if self.get(high) < self.get(low):
                raise ValueError(f"{high} {self.get(high)} is below {low} {self.get(low)}; raise {high} or lower {low}.")


TINY = Path(__file__).parent.parent / "tiny" / "tiny.yaml"
"""Settings of the embedded tiny run; a command line without `--config` begins with them."""
_SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Config)
SETTINGS: dict[str, Any] = {f"{s}.{k}": t for s, kind in _SECTIONS.items() for k, t in typing.get_type_hints(kind).items()}
"""The type of every setting, by dotted name."""
_BOUNDS: dict[str, dict[str, float]] = {
    f"{s}.{f.name}": f.metadata["bounds"] for s, kind in _SECTIONS.items() for f in dataclasses.fields(kind)
}
_SOURCE: dict[str, Any] = typing.get_type_hints(sections.SourceConfig)
_FORMER = {("data.name", "jsonl"): "files"}
"""Values of settings that have another name now."""
_INSIDE = {"least": operator.ge, "above": operator.gt, "most": operator.le, "below": operator.lt}
_WORDS = {"least": "at least", "above": "above", "most": "at most", "below": "below"}


def check_range(name: str, value: Any, bounds: Mapping[str, float]) -> None:
    """Raise ValueError if a number is not finite, or not within bounds as `settings.setting` gives them. None is in any range."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number.")
    if value is not None and not all(_INSIDE[least](value, bound) for least, bound in bounds.items()):
        raise ValueError(f"{name} is {value}; it must be {_in_words(bounds)}.")


def _in_words(bounds: Mapping[str, float]) -> str:
    """A range in words."""
    return " and ".join(f"{_WORDS[name]} {bound:g}" for name, bound in bounds.items())


def load_config(path: str | Path) -> Config:
    """The config in a YAML file; settings it does not name keep their defaults.

    Raises:
        ValueError: no such file, not a YAML mapping, or see `Config.from_dict`.
    """
    return Config.from_dict(read_file(path))


def read_args(argv: Sequence[str], program: str = "imagent_jax.train") -> Config:
    """The config of a command line: the files of `--config`, in order, then `--section.key VALUE` (or `=VALUE`).

    Without `--config` the settings of the tiny run (`TINY`) take the place of the files.

    Raises:
        ValueError: see `Config.from_dict`.
    """
    for arg in argv:
        name = re.sub(r"^(data\.mixture|tools\.settings)\..+", r"\1", arg[2:].partition("=")[0])  # `--data.mixture.NAME.weight=2`
        if arg.startswith("--") and name not in ("help", "config", "", *SETTINGS):
            raise ValueError(f"There is no setting {name!r}; {nearest(name, SETTINGS)}")
    parser = _parser(program)
    base = parser.get_defaults()
    for path in _checked(parser.parse_args, list(argv)).config or (TINY,):
        values = read_file(path)
        check_names(values)
        base = _checked(parser.parse_object, values, cfg_base=base)
    return _build(_checked(parser.parse_args, list(argv), namespace=base))


def parse_args(argv: Sequence[str] | None = None, program: str = "imagent_jax.train") -> Config:
    """`read_args`, or one sentence on standard error and exit code 2; `--help` prints every setting."""
    try:
        return read_args(sys.argv[1:] if argv is None else argv, program)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def reference() -> str:
    """`docs/configuration.md`: every setting with its type, default and meaning, from the dataclasses themselves."""
    lines = ["# Configuration", "", "Every setting: its default, its type and what it means. This page is written by", ""]
    lines += ["```bash", "python -m imagent_jax.config > docs/configuration.md", "```"]
    for section, settings in _SECTIONS.items():
        lines += ["", f"## {section}", *textwrap.wrap(settings.__doc__ or "", 120), ""]
        for f in dataclasses.fields(settings):
            name = f"{section}.{f.name}"
            written = yaml.safe_dump(_plain(f.default), default_flow_style=True, width=1000).removesuffix("...\n").strip()
            kind = re.split(r" \(|, such", kind_in_words(SETTINGS[name]))[0]
            inside = f", {_in_words(_BOUNDS[name])}" if _BOUNDS[name] else ""
            words = f"- `{name}: {written}`, {kind}{inside}: {f.metadata['help']}"
            lines += textwrap.wrap(words, 120, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _parser(program: str = "imagent_jax.train") -> ArgumentParser:
    """One argument per setting: type, default and help are the dataclasses' own."""
    parser = ArgumentParser(
        prog=f"python -m {program}",
        usage="%(prog)s [--config FILE.yaml] [--section.key VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    files = "YAML file of settings, may be given again; settings of the command line win (without: the tiny run's)"
    parser.add_argument("--config", action="append", metavar="FILE.yaml", help=files)
    for section, kind in _SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        for f in dataclasses.fields(kind):
            name = f"{section}.{f.name}"
            has_values = typing.get_origin(SETTINGS[name]) is Literal or SETTINGS[name] is bool
            options: dict[str, Any] = {} if has_values else {"metavar": "VALUE"}
            group.add_argument(f"--{name}", type=SETTINGS[name], default=f.default, help=f.metadata["help"], **options)
    return parser


def _build(parsed: Namespace) -> Config:
    for name, kind in SETTINGS.items():
        if parsed[name] is None:
            raise ValueError(f"{name} is empty; it must be {kind_in_words(kind)}, or be left out for its default.")
    given = {section: dict(vars(parsed[section])) for section in _SECTIONS}
    given["data"]["mixture"] = sections.Table({name: _source(s) for name, s in given["data"]["mixture"].items()})
    config = Config(**{section: kind(**given[section]) for section, kind in _SECTIONS.items()})
    config.validate()
    return config


def _source(parsed: Namespace | sections.SourceConfig) -> sections.SourceConfig:
    values: dict[str, Any] = {**vars(parsed), "reward": sections.Table(parsed.reward)}
    return sections.SourceConfig(**values)


def _plain(value: Any) -> Any:
    """Return a value with dictionaries and lists in place of other mappings and tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def _checked(parse: Callable[..., Namespace], *args: Any, **kwargs: Any) -> Namespace:
    """The parser's result, or its complaint as one sentence in our words."""
    try:
        return parse(*args, **kwargs)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        ill = re.fullmatch(r'Parser key "([\w.]+)": .*(?:Got|Given) value: ?(.*?)(?: Subclass types expect.*)?', message)
        if found := re.search(r"data\.mixture.* Option '([^']+)' is not accepted", message):
            raise ValueError(f"A source of data.mixture has no setting {found[1]!r}; {nearest(found[1], _SOURCE)}") from None
        if ill and (found := re.search(r'data\.mixture.* Parser key "(\w+)"', message)):
            kind = kind_in_words(_SOURCE[found[1]])
            raise ValueError(f"A source of data.mixture has {found[1]} {ill[2]!r}; it must be {kind}.") from None
        if ill and (now := _FORMER.get((ill[1], ill[2]))):
            raise ValueError(f"{ill[1]} {ill[2]!r} is now {now!r}; write {now!r} in its place.") from None
        if ill and ill[1] in SETTINGS:
            raise ValueError(f"{ill[1]} is {ill[2]!r}; it must be {kind_in_words(SETTINGS[ill[1]])}.") from None
        if lacks := re.match(r"argument --([\w.]+): expected one argument", message):
            raise ValueError(f"--{lacks[1]} needs a value, as in --{lacks[1]}=VALUE.") from None
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}; see --help for every setting.") from None


def check_names(values: Mapping[str, Any], names: Iterable[str] = SETTINGS) -> None:
    """Raise ValueError for a section or setting of nested dictionaries that is none of `names`, which are dotted."""
    sections: dict[str, str] = {}
    for name in names:
        sections.setdefault(name.partition(".")[0], name)
    for section, settings in values.items():
        if section not in sections:
            raise ValueError(f"There is no section {section!r}; {nearest(str(section), sections)}")
        if not isinstance(settings, Mapping):
            raise ValueError(f"Section {section!r} must hold settings, such as {sections[section]}, not {settings!r}.")
        for key in settings:
            if (name := f"{section}.{key}") not in names:
                raise ValueError(f"There is no setting {name!r}; {nearest(name, names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The valid name closest to `name`: one that ends in it, else the most similar, else where to look."""
    names = list(names)
    last = name.rpartition(".")[2]
    close = [n for n in names if n == last or n.endswith(f".{last}")] or difflib.get_close_matches(name, names, 1, 0.5)
    if not close:  # a setting given without its section, and misspelt
        keys = {n.rpartition(".")[2]: n for n in names}
        close = [keys[key] for key in difflib.get_close_matches(last, keys, 1, 0.5)]
    return f"did you mean {close[0]!r}?" if close else "see --help for every setting."


def kind_in_words(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    if (items := typing.get_args(kind)) and typing.get_origin(items[0]) is Literal:
        return f"a list of {', '.join(typing.get_args(items[0]))}"
    if typing.get_origin(kind) is dict:
        return "a mapping of names, such as {a: ...}"
    if any(typing.get_origin(item) is dict for item in items):
        return "a list of names or a mapping from names to numbers, such as {a: 0.5}"
    if type(None) in items:
        return f"{kind_in_words(next(item for item in items if item is not type(None)))}, or null"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (quote it in YAML)"}
    return words.get(kind, "a list of names, such as [a, b]")


def read_file(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """Return the sections of a YAML file.

    Args:
        what: it is, for the sentence.
    Raises:
        ValueError: there is no such file, or it holds none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no {what} {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not YAML: it is no text in UTF-8.") from None
    return _read_yaml(text, str(path))


class Loader(yaml.SafeLoader):
    """Reads `true` and `false` as truth values, as YAML 1.2 and the command line do. `on` and `off` are names and values."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:bool"]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}.") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{origin} must hold sections, 'name:' on a line of its own, with settings below each.")
    return values or {}
