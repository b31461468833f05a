#!/usr/bin/env bash
# One machine with several NVIDIA GPUs: one process holds them all. From the checkout, in an environment with `.[cuda]`:
# tpu/gpu/box.sh --config configs/qwen2_vl_2b_gpu.yaml --mesh.fsdp -1
set -euo pipefail

nvidia-smi --query-gpu=name,memory.total --format=csv
exec "$(dirname "$0")/../restart.sh" "$@"
