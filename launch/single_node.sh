#!/usr/bin/env bash
# Run one entropy_ddp command with several processes on this machine.
#
#   launch/single_node.sh probe --config my.yaml --out runs/mine
#   NGPU=4 launch/single_node.sh sweep --config my.yaml --out runs/mine
#
# LoRA of a base that no GPU holds, and full weights, on eight GPUs:
#
#   launch/single_node.sh probe --config configs/llama3.1_70b_lora.yaml --out runs/70b
#   launch/single_node.sh probe --config configs/qwen2.5_7b_full.yaml --out runs/7b
#
# NGPU             processes; default: the GPUs that torch sees, or 2 where there are none
# OMP_NUM_THREADS  CPU threads per process; default 1
set -euo pipefail

# The environment of `make install`, if it is there; otherwise the one in PATH.
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"

NGPU="${NGPU:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Standalone takes a free port, so that two runs on one machine do not meet.
exec torchrun --standalone --nproc_per_node="$NGPU" -m entropy_ddp "$@"
