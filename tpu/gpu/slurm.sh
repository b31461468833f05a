#!/usr/bin/env bash
# Slurm: one process a machine, which finds the others by itself:
#   sbatch --nodes 2 tpu/gpu/slurm.sh --config FILE.yaml [--section.key VALUE ...]
# Submit from the checkout, with the environment (`.[cuda]`) active; run.dir on a disk that all machines share.
# Before its time is up the run gets SIGTERM, saves and ends with 75; the job is then queued again, and goes on.
#SBATCH --job-name=imagent
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:TERM@300
set -uo pipefail

trap 'interrupted=1; kill -TERM "$run" 2>/dev/null' TERM # sbatch's signal reaches this shell alone
srun --kill-on-bad-exit=1 tpu/restart.sh --mesh.fsdp=-1 "$@" &
run=$!
while # a signal ends the waiting, not the run; bash keeps the code of one that has ended
  interrupted=
  wait "$run"
  code=$?
  [[ -n $interrupted ]]
do :; done
((code != 75)) || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
