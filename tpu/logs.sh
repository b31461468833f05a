#!/usr/bin/env bash
# Follows the output of one host: NAME=... ZONE=... tpu/logs.sh [HOST] (default 0, the one that writes)
source "$(dirname "$0")/common.sh"

gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker="${1:-0}" --command 'tail -n 100 -F train.log'
