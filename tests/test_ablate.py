"""Ablations: variants are what their files say, intervals are Student's, and a stopped command goes on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import tiny_config
from jax import numpy as jnp
from scripted_run import ANSWER, play, scripts

from imagent_jax.config import TINY, Config, MaskConfig, read_args
from imagent_jax.evals import ablate
from imagent_jax.rl.learner import LossSettings, batch_loss, shown_in
from imagent_jax.rl.loss import PRESETS
from imagent_jax.rl.mask import MaskTables, mask_tables, two_level_mask
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny.world import task_at
from imagent_jax.types import TokenKind

VARIANTS = Path(__file__).parent.parent / "configs" / "ablations"


def settings(name: str) -> Config:
    return read_args([f"--config={TINY}", f"--config={VARIANTS / 'full.yaml'}", f"--config={VARIANTS / name}.yaml"])


@pytest.mark.slow(3)
def test_every_variant_differs_from_the_full_method_in_what_its_title_says():
    files = sorted(VARIANTS.glob("*.yaml"))
    full = settings("full").to_dict()
    for file in files:
        changed = {f"{s}.{k}" for s, d in settings(file.stem).to_dict().items() for k, v in d.items() if v != full[s][k]}
        assert bool(changed - {"run.name"}) == (file.stem != "full"), file
        assert settings(file.stem).run.name == file.stem and ablate.title_of(file)
    assert len(files) >= 14


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])
def test_the_losses_are_the_published_ones(name):
    assert vars(settings(name).grpo).items() >= PRESETS[name].items()
    assert vars(Config().grpo).items() >= PRESETS["dapo"].items()


def test_intervals_are_students():
    for n in (2, 3, 10, 30):
        values = np.random.default_rng(n).normal(size=n)
        mean, half = ablate.interval(values)
        low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
        assert mean == pytest.approx((low + high) / 2) and half == pytest.approx((high - low) / 2, rel=1e-3)
    assert math.isnan(ablate.interval([1.0])[1])


@pytest.mark.slow(6)
def test_observations_train_only_where_they_are_kept(parts, batch, rollout, config):
    """Kept, they count in the loss with a weight of one, whatever stands where a sampler's log-probability would be."""
    from dataclasses import replace

    shown = batch.kind == TokenKind.OBSERVATION
    assert shown.any()
    trained = {}
    for choice in ("drop", "keep"):
        mask_cfg = MaskConfig(observations=choice, drop_truncated=False, drop_over_turns=False, drop_repeated=False)
        tables = MaskTables(*map(jnp.asarray, mask_tables(mask_cfg)))
        trained[choice] = np.asarray(two_level_mask(batch.kind, batch.end, batch.advantages, *tables[:2]))
        if choice == "keep":
            old = jnp.asarray(batch.logprobs) - 0.5 * shown
            loss = jax.jit(batch_loss, static_argnums=(0, 1))
            ours = [
                loss(parts.model, LossSettings.of(config), parts.params, type(parts.params)({}), shown_in(rollout.store, batch),
                     replace(batch, logprobs=logprobs), tables, 1.0, None, old)[0]
                for logprobs in (batch.logprobs, np.where(shown, 3.0, batch.logprobs).astype(np.float32))
            ]  # fmt: skip
            assert float(ours[0]) == float(ours[1])
    assert not trained["drop"][shown].any() and trained["keep"][shown].all()
    assert not trained["keep"][batch.kind == TokenKind.PAD].any()
    with pytest.raises(ValueError, match="set grpo.recompute true"):
        Config.from_dict({"mask": {"observations": "keep"}})


def test_a_run_is_given_the_shared_settings_the_variant_and_the_seed(tmp_path, monkeypatch, capfd):
    """What it leaves is read back: the base, the end, and the steps between."""
    asked, code = [], [0]
    metrics = [
        {"step": 0, "base/accuracy": 0.123456, "base/length": 3.0, "time/evaluation": 1.0},
        *({"step": i, "accuracy": i / 7, "reward/total": i / 3, "tools/used_rate": 0.5, "tools/invalid": 0.25, "length": 10.0 * i,
           "mask/dropped_tokens": 0.125, "loss": 1.0} for i in (1, 2)),
        {"step": 2, "final/accuracy": 0.7654321, "time/total": 98.76},
    ]  # fmt: skip

    def run(command):
        asked.append(command)
        cfg = read_args(command[3:])
        folder = Path(cfg.run.dir) / cfg.run.name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
        assert (cfg.run.log_trajectories, cfg.run.seed, cfg.grpo.kl, cfg.optim.learning_rate) == (0, 7, 0.5, 0.25)
        return SimpleNamespace(returncode=code[0])

    monkeypatch.setattr(ablate.subprocess, "run", run)
    (tmp_path / "full.yaml").write_text(
        "# Full\nrun: {seed: 3, log_trajectories: 5}\ngrpo: {kl: 0.25}\noptim: {learning_rate: 0.5}\n"
    )
    (tmp_path / "some.yaml").write_text("# Some\ngrpo: {kl: 0.5}\n")
    result = ablate.train_once(tmp_path / "some.yaml", 7, ["--optim.learning_rate=0.25"])
    assert result == {
        "seed": 7, "base": {"accuracy": 0.12346, "length": 3.0}, "final": {"accuracy": 0.76543}, "seconds": 98.8,
        "curves": {"accuracy": [0.1429, 0.2857], "reward/total": [0.3333, 0.6667], "tools/used_rate": [0.5] * 2,
                   "tools/invalid": [0.25] * 2, "mask/dropped_tokens": [0.125] * 2, "length": [10.0, 20.0]},
    }  # fmt: skip
    assert asked[0][1:3] == ["-m", "imagent_jax.train"]
    ablate.train_once(tmp_path / "full.yaml", 7, ["--optim.learning_rate=0.25", "--grpo.kl=0.5"])
    assert [arg for arg in asked[1] if arg.startswith("--config")] == [f"--config={TINY}", f"--config={tmp_path}/full.yaml"]
    code[0] = 2
    with pytest.raises(RuntimeError, match="The run of some with seed 7 failed"):
        ablate.train_once(tmp_path / "some.yaml", 7, ["--optim.learning_rate=0.25"])


def test_the_table_shows_what_each_column_says():
    final = {"accuracy": 0.5, "tools/used_rate": 0.6, "tools/executed_rate": 0.7, "length": 80.0}
    one = {"final": final, "curves": {"accuracy": [0.1, 0.3], "mask/dropped_tokens": [0.02, 0.06], "length": [1.0, 2.0]}}
    two = {"final": final | {"accuracy": 0.7}, "curves": one["curves"]}
    lines = ablate.table([{"title": "A", "runs": [one, two]}, {"title": "B", "runs": [one]}]).splitlines()
    assert lines == [
        "| variant | seeds | right, % | right on the way, % | call a tool, % | calls executed, % | dropped tokens, % | tokens |",
        "|---|---|---|---|---|---|---|---|",
        "| A | 2 | 60.0 ± 127.1 | 20.0 ± 0.0 | 60.0 ± 0.0 | 70.0 ± 0.0 | 4.0 ± 0.0 | 80.0 ± 0.0 |",
        "| B | 1 | 50.0 | 20.0 | 60.0 | 70.0 | 4.0 | 80.0 |",
    ]


def test_the_gain_for_any_call_pays_right_answers_after_refused_calls_too(parts):
    engine, task = Collector(parts.model, parts.processor, parts.tools, tiny_config(
        {"rollout": {"prompt_tokens": 512, "response_tokens": 512}})), task_at(3, "train", 0)  # fmt: skip
    said = scripts(task)
    paid = [ablate.gain_for_any_call(play(engine, task, 0, said[line])) for line in (0, 1, 7, 5)]
    right = ablate.gain_for_any_call(play(engine, task, 0, [ANSWER.format(task.answer)]))
    assert paid == pytest.approx([0.2, 0, 0.2, 0]) and right == 0


def fake_run(seed: int) -> dict:
    final = {"accuracy": 0.5 + 0.1 * seed, "tools/used_rate": 0.9, "tools/executed_rate": 1.0, "length": 60.0}
    return {"seed": seed, "base": {}, "final": final, "seconds": 1.0, "curves": {name: [0.1] * 6 for name in ablate.CURVES}}


def test_a_stopped_command_repeats_nothing_and_makes_the_table(tmp_path, monkeypatch):
    asked = []

    def run(file, seed, overrides):
        asked.append((file.stem, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake_run(seed)

    monkeypatch.setattr(ablate, "train_once", run)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "ablations.md").write_text("# Ours\n\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    command = [str(VARIANTS / "full.yaml"), str(VARIANTS / "no_gain.yaml"), f"--out={tmp_path}/out", f"--docs={docs}",
               "--seeds", "0", "1"]  # fmt: skip
    assert ablate.main(command) == 130
    assert ablate.main(command) == 0
    assert asked == [("full", 0), ("full", 1), ("no_gain", 0), ("no_gain", 0), ("no_gain", 1)]
    kept = json.loads((tmp_path / "out" / "no_gain.json").read_text())
    assert (
        kept["variant"] == "no_gain" and kept["title"] == ablate.title_of(VARIANTS / "no_gain.yaml") and kept["overrides"] == []
    )
    assert ablate.main([*command[:2], *command[2:4], "--table"]) == 0 and len(asked) == 5
    text = (docs / "ablations.md").read_text()
    assert text.startswith("# Ours\n\n<!-- table -->\n| variant") and text.index("| The full") < text.index(f"| {kept['title']}")
    assert "| The full method | 2 | 55.0 ± 63.5 |" in text and "old" not in text and text.endswith("after\n")
    assert (docs / "ablations.png").stat().st_size > 1000


def test_bad_input_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("run: {name: x}\n")
    for command in ([str(tmp_path / "nowhere.yaml")], [str(tmp_path / "x.yaml")], ["--table"], ["--grpo.kll=1"]):
        assert ablate.main([*command, f"--out={tmp_path}/empty"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)


@pytest.mark.slow(30)
def test_a_run_in_a_process_of_its_own_gives_its_figures(tmp_path):
    (tmp_path / "gain.yaml").write_text((VARIANTS / "gain_for_any_call.yaml").read_text())
    result = ablate.train_once(tmp_path / "gain.yaml", 0, [
        "--run.steps=1", "--rollout.groups=2", "--rollout.group_size=2", "--grpo.micro_groups=1", "--grpo.length_buckets=1",
        "--eval.tasks=4", "--eval.groups=4", "--data.train_size=64", "--data.test_size=32", "--run.compile_cache=",
        "--eval.every=0",
    ])  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    assert 0 <= result["final"]["accuracy"] <= 1 and len(result["curves"]["accuracy"]) == 1
