#!/usr/bin/env bash
# Keeps a run going on spot machines, from a machine of yours that stays up: makes the slice where it is not there or
# was taken away, installs, launches, and looks again every minute until the run has ended.
# NAME=... ZONE=... tpu/watch.sh TYPE --config FILE.yaml [--section.key VALUE ...]
# A slice that comes back is a new one: run.dir and run.checkpoint_dir must be outside of it (a mounted disk, a bucket).
source "$(dirname "$0")/common.sh"

type=${1:?an accelerator type, such as v5litepod-16}
shift
while true; do
  if [[ $(state) != ACTIVE ]]; then
    [[ $(state) == NONE ]] || "$TPU_DIR/delete.sh"
    if ! { "$TPU_DIR/create.sh" "$type" --spot && "$TPU_DIR/install.sh" && "$TPU_DIR/launch.sh" "$@"; }; then
      echo "$(date +%T) no slice yet; trying again in a minute"
    fi
  elif on_all "! $RUNNING" 2>/dev/null; then
    echo "The run has ended on every host; tpu/logs.sh shows how, tpu/delete.sh gives the slice back."
    exit 0
  fi
  sleep 60
done
