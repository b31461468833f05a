"""The scripts and manifests of tpu/: what a machine without a TPU, a cluster or a network can say of them."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow(2)

TPU = Path(__file__).parent.parent / "tpu"
SCRIPTS = sorted(TPU.rglob("*.sh"))
STAND_IN = """#!/bin/sh
[ "$1" = - ] && exec {python} "$@"
echo "$@" >> {log}
[ -e {hang} ] && {{ trap 'exit 75' TERM; sleep 60 & wait; }}
case $(wc -l < {log}) in 1) exit 75 ;; 2) exit 134 ;; esac
exit {code}
"""


def test_scripts_pass_shellcheck():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert command, "shellcheck is not installed: pip install -e '.[test]'"
    found = subprocess.run([command, "-x", "-P", TPU, *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert len(SCRIPTS) >= 9 and all(s.stat().st_mode & stat.S_IXUSR for s in SCRIPTS if s.name != "common.sh")


def start(folder: Path, code: int, *arguments: str) -> tuple[subprocess.Popen, Path]:
    """restart.sh with a stand-in for Python: training ends with 75, with 134, then with `code`."""
    log, python = folder / "calls", folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable, log=log, hang=folder / "hang", code=code))
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "PAUSE": "0", "PYTHONPATH": str(TPU.parent)}
    run = subprocess.Popen([TPU / "restart.sh", f"--run.dir={folder}", *arguments], env=env, stderr=subprocess.PIPE, text=True)
    return run, log


def test_a_stopped_run_is_started_again_and_goes_on(tmp_path):
    run, log = start(tmp_path, 3, "--run.name=a b")
    assert run.wait(120) == 3, "the last exit code"
    calls = log.read_text().splitlines()
    resumes = [call.rpartition("--run.resume=")[2] for call in calls]
    assert resumes == ["false", "true", "true"] and all("--run.name=a b" in call for call in calls)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_has_checkpoints_is_continued(tmp_path, elsewhere):
    (tmp_path / ("disk/tiny" if elsewhere else "tiny/checkpoints") / "40").mkdir(parents=True)
    options = [f"--run.checkpoint_dir={tmp_path / 'disk'}"] * elsewhere
    run, log = start(tmp_path, 0, *options)
    asked = " ".join([f"-m imagent_jax.train --run.dir={tmp_path}", *options, "--run.resume=true"])
    assert run.wait(120) == 0 and log.read_text().startswith(asked)


def test_sigterm_ends_the_run_with_its_own_exit_code(tmp_path):
    (tmp_path / "hang").touch()
    run, log = start(tmp_path, 0)
    while not log.exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 75 and len(log.read_text().splitlines()) == 1, "ended, and not started again"


def test_bad_settings_end_at_once_in_one_sentence(tmp_path):
    run, log = start(tmp_path, 0, "--run.stepz=3")
    assert run.wait(120) == 2 and not log.exists()
    assert "There is no setting 'run.stepz'" in run.communicate()[1]


def test_the_jobset_holds_jobs_that_kubernetes_accepts():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    (jobset,) = yaml.safe_load_all((TPU / "gke" / "jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert set(jobset["spec"]) <= {
        "failurePolicy",
        "replicatedJobs",
        "successPolicy",
        "network",
        "startupPolicy",
        "suspend",
    }
    for job in jobset["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        spec = job["template"]["spec"]
        one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": spec}
        validate.validate(one, "1.30", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate(one | {"spec": spec | {"parallelism": "four"}}, "1.30", strict=True)
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        chips = [int(container["resources"][kind]["google.com/tpu"]) for kind in ("requests", "limits")]
        shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        rows, columns = map(int, shape.split("x"))
        assert chips[0] == chips[1] == rows * columns // spec["parallelism"] and spec["parallelism"] == spec["completions"]
        assert container["command"] == ["tpu/restart.sh"] and os.access(TPU / "restart.sh", os.X_OK)
