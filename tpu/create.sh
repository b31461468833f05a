#!/usr/bin/env bash
# Asks for a slice as a queued resource and waits until it is there:
#   NAME=imagent ZONE=us-west4-a tpu/create.sh TYPE [--spot]
# TYPE is an accelerator type, such as v5litepod-16 (v5e:4x4), v6e-16 (v6e:4x4) or v5p-16 (v5p:2x2x2: it counts cores).
source "$(dirname "$0")/common.sh"

type=${1:?an accelerator type, such as v5litepod-16, v6e-16 or v5p-16}
spot=("${@:2}")
case $type in
  v5litepod-*) software=v2-alpha-tpuv5-lite ;;
  v5p-*) software=v2-alpha-tpuv5 ;;
  v6e-*) software=v2-alpha-tpuv6e ;;
  *)
    echo "error: there is no software known here for $type; name a v5litepod-N, v5p-N or v6e-N." >&2
    exit 2
    ;;
esac
gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
  --accelerator-type "$type" --runtime-version "$software" ${spot[@]+"${spot[@]}"}
until [[ $(state) == ACTIVE ]]; do
  if [[ $(state) =~ FAILED|SUSPENDED ]]; then
    echo "error: the request is $(state); tpu/delete.sh removes it, and another zone or --spot may have room." >&2
    exit 1
  fi
  echo "$(date +%T) $(state)"
  sleep 30
done
echo "$NAME is there."
