#!/usr/bin/env bash
# Run one entropy_ddp command on several machines: start this on each of them, with the
# same command line and these variables. Results are written by node 0.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 NPROC_PER_NODE=8 \
#       launch/multi_node.sh probe --config my.yaml --out runs/mine
#
# NNODES           machines
# NODE_RANK        this machine's number, from 0; under SLURM, SLURM_NODEID serves
# MASTER_ADDR      host name or address of machine 0, reachable from all
# MASTER_PORT      a port free on machine 0
# NPROC_PER_NODE   processes on each machine, normally one per GPU
# OMP_NUM_THREADS  CPU threads per process; default 1
#
# The checkpoint, batch and configuration files must be readable on every machine.
set -euo pipefail

: "${NNODES:?set it to the number of machines}"
: "${MASTER_ADDR:?set it to the host name or address of machine 0}"
: "${MASTER_PORT:?set it to a port free on machine 0}"
: "${NPROC_PER_NODE:?set it to the number of processes on each machine}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
: "${NODE_RANK:?set it to the number of this machine, 0 to NNODES - 1}"

# The environment of `make install`, if it is there; otherwise the one in PATH.
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC_PER_NODE" \
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
    -m entropy_ddp "$@"
