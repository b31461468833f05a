#!/usr/bin/env bash
# Gives the slice back, with all that is on its disks: NAME=... ZONE=... tpu/delete.sh
source "$(dirname "$0")/common.sh"

gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
