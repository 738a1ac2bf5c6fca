#!/usr/bin/env bash
# Which tokens made the entropy fall? Attribute the step after every tenth checkpoint of a
# TRL run, and compare them on one page.
#
#   examples/diagnose.sh build/fall runs/fall
#
# $1  what examples/entropy_fall.py wrote: checkpoints, completions, prompts
# $2  folder for the results: one run directory for each step, and report.html
set -euo pipefail

train="$1"
out="$2"
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
mkdir -p "$out"

for step in 10 20 30 40 50 60 70 80 90; do
    # TRL's file N + 1 is the batch of the step taken from checkpoint N.
    rollouts="$out/U-$step.jsonl"
    python -m entropy_ddp import trl \
        "$train/completions/completions_$(printf %05d $((step + 1))).parquet" \
        --checkpoint "$train/checkpoint-$step" --output "$rollouts" --overwrite --quiet
    # E is sampled anew: its importance weights assume responses of this very checkpoint.
    python -m entropy_ddp attribute --verify --overwrite --quiet --out "$out/step-$step" \
        --set checkpoint.path="$train/checkpoint-$step" \
        --set checkpoint.base=build/demo/base \
        --set "batches.E={sample: {prompts: $train/prompts.jsonl, num_prompts: 2048, with_replacement: true, max_new_tokens: 24, sequences_per_call: 512}}" \
        --set batches.U.file="$rollouts" \
        --set update.from_checkpoint=true
    echo "step $step: $out/step-$step"
done
python -m entropy_ddp report "$out"/step-* --out "$out/report.html"
