# Read by the other scripts: where the machines are and how to reach them. Settings are environment variables.
# shellcheck shell=bash
set -euo pipefail

: "${NAME:?the name of the machines, such as NAME=imagent}"
: "${ZONE:?their zone, such as ZONE=us-west4-a}"
TPU_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SOURCE=$(dirname "$TPU_DIR")
RUNNING='pgrep -f [i]magent_jax.train >/dev/null' # the brackets: not the shell that asks
export TPU_DIR SOURCE RUNNING

# on_all COMMAND: runs it in a shell on every host of the slice, at once.
on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

# state: of the queued resource, such as ACTIVE or SUSPENDED; NONE where there is none.
state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)' 2>/dev/null ||
    echo NONE
}
