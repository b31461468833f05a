#!/usr/bin/env bash
# Runs imagent_jax.train on this host, again for as long as it ends with 75 (stopped from outside, saved) or 134
# (ended by JAX: another host's process died), and continues an earlier run of the same name: tpu/restart.sh --config FILE.yaml [--section.key VALUE ...]
# SIGTERM to this script ends the run, which saves; the exit code is then the run's, 75.
set -uo pipefail

python=${PYTHON:-python}
resume=$("$python" - "$@" <<'PY'
import sys

from etils import epath

from imagent_jax.config import parse_args
from imagent_jax.runs.folder import checkpoint_folder

run = parse_args(sys.argv[1:]).run
folder = epath.Path(checkpoint_folder(run, epath.Path(run.dir) / run.name))
print(str(folder.is_dir() and any(saved.name.isdigit() for saved in folder.iterdir())).lower())
PY
) || exit 2

stopped=
trap 'stopped=1 interrupted=1; kill -TERM "$child" 2>/dev/null' TERM
while true; do
  "$python" -m imagent_jax.train "$@" "--run.resume=$resume" &
  child=$!
  while # a signal ends the waiting, not the run; bash keeps the code of one that has ended
    interrupted=
    wait "$child"
    code=$?
    [[ -n $interrupted ]]
  do :; done
  [[ $code =~ ^(75|134)$ && -z $stopped ]] || exit "$code"
  resume=true
  sleep "${PAUSE:-5}"
done
