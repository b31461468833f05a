"""Training on a mesh equals training on one device; devices hold their parts; the gradient exchanges what it must; runs resume
on other meshes. What eight simulated devices do is measured by `mesh_training.py`, in one process."""

import json
from pathlib import Path

import pytest
from mesh_training import JOB, RATE, G, N, R
from rounding import rounding
from simulated import TOGETHER, start

SCRIPT = Path(__file__).parent / "mesh_training.py"
pytestmark = pytest.mark.slow(70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def report(folder):
    """What `mesh_training.py` found; meanwhile, the main job on one device."""
    one = start(1, "-m", "imagent_jax.train", *JOB, f"--run.dir={folder}", "--run.name=one")
    process = start(8, SCRIPT, folder)
    for child in (one, process):
        out, error = child.communicate(timeout=2 * TOGETHER)
        assert child.returncode == 0, error[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["devices"] == 8
    return found


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def meshes(report, *cases):
    return [(case, found) for case in cases for found in report[case]["meshes"]]


def test_an_update_on_a_mesh_is_that_of_one_device(report):
    tokens = rounding(1.0, N * G * R)  # what the sums over the tokens of the batch may differ by, relative to their terms
    for case, found in meshes(report, "frozen", "everything", "adapters"):
        at = case, found["mesh"]
        assert found["loss"] < tokens and found["norm"] < tokens, at
        assert found["gradient"] < tokens * report[case]["largest"], at
        assert found["params"] < RATE / 100, at
    assert report["frozen"]["largest"] > 1e-3 and len(report["frozen"]["meshes"]) == 4


def test_a_mesh_of_one_device_changes_no_bit(report):
    found = report["frozen"]["meshes"][0]
    assert found["mesh"] == [1, 1, 1]
    assert found["loss"] == found["norm"] == found["gradient"] == found["params"] == 0


def test_no_large_parameter_or_moment_is_whole_over_fsdp(report):
    for case, found in meshes(report, "frozen", "everything"):
        assert found["whole"] == [], (case, found["mesh"])


def test_weights_travel_and_activations_stay(report):
    """Every weight is gathered once, its gradient summed once for the prompts and once for the responses; without `tensor`,
    nothing else is exchanged."""
    exchanged = {tuple(f["mesh"]): f["exchanged"] for f in report["frozen"]["meshes"] if "exchanged" in f}
    elements = report["frozen"]["elements"]
    for sizes, kinds in exchanged.items():
        parts = elements / sizes[2]
        assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}, (sizes, kinds)
        assert sum(kinds["all-gather"]) <= parts, sizes
    summed = [sum(sum(kinds.get(kind, [])) for kind in ("all-reduce", "reduce-scatter")) for kinds in exchanged.values()]
    assert elements <= summed[0] <= 2 * elements


def test_kernels_run_on_their_own_groups_and_heads(report):
    assert set(report["kernels"]) == {"xla", "cudnn", "splash_interpret"}
    assert max(report["kernels"].values()) < 2e-5, report["kernels"]


def test_a_run_of_eight_devices_resumes_on_eight_four_and_one(report):
    eight, four, one = report["resumes"]
    assert eight["continued"] == 0
    for found in (eight, four, one):
        assert found["restored"] == found["moved"] == 0 and found["continued"] < RATE / 100, found


def test_the_main_job_on_four_devices_is_that_of_one(report, folder):
    """The same trajectories, token by token: noise belongs to a row, and rounding never tips a choice here. (What is packed
    together is up to the schedule.)"""
    assert report["job"] == 0
    for name in ("base-000000", "train-000001", "train-000002", "trained-000002"):
        one, four = (
            [json.loads(line) for line in (folder / run / "trajectories" / f"{name}.jsonl").read_text().splitlines()]
            for run in ("one", "four")
        )
        for a, b in zip(one, four, strict=True):
            logged = [record["tokens"].pop("logprob") for record in (a, b)]  # rounded as it is written
            assert logged[0] == pytest.approx(logged[1], abs=2e-4)
            assert {**a, "advantage": 0} == {**b, "advantage": 0}
            assert a["advantage"] == b["advantage"] or a["advantage"] == pytest.approx(b["advantage"], abs=1e-5)
    for a, b in zip(metrics(folder, "one"), metrics(folder, "four"), strict=True):
        assert a.keys() == b.keys() and a.pop("warnings", None) == b.pop("warnings", None)
        for key in a:
            if not key.startswith(("time/", "compile/", "rollout/", "memory/", "vision/waste")) and "time/" not in key:
                assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), key
