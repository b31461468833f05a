#!/usr/bin/env bash
# Starts the run on every host, to go on when you log out:
#   NAME=... ZONE=... tpu/launch.sh --config FILE.yaml [--section.key VALUE ...]
# Arguments are those of imagent_jax.train; paths are on the hosts, from the checkout. run.dir must be a disk that all
# share. A run of the same name that is there already is continued.
source "$(dirname "$0")/common.sh"

(($#)) || {
  echo "error: name a run, as in tpu/launch.sh --config configs/qwen2_5_vl_7b_tpu.yaml --run.dir /shared/runs" >&2
  exit 2
}
arguments=$(printf '%q ' "$@")
on_all "set -e
  if $RUNNING; then echo 'error: a run goes on here' >&2; exit 1; fi
  cd imagent
  PYTHON=\$HOME/venv/bin/python nohup tpu/restart.sh $arguments >\$HOME/train.log 2>&1 </dev/null &
  sleep 2"
echo "Started on every host of $NAME; tpu/logs.sh follows it."
