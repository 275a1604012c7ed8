#!/usr/bin/env bash
# The SmolLM2 / TOFU recipes on four authors, small enough for two CPU cores:
#
#   jobs/smollm2_tofu_small.sh PATH/full.jsonl MODEL      # MODEL: a folder or HuggingFaceTB/SmolLM2-135M-Instruct
#
# Fine-tunes on authors 0 to 2, trains the reference without author 0, forgets author 0; author 3 is held out.
set -euo pipefail
records=$1
model=$2
common=(data.path="$records" "data.split=train[:80]" "holdout.subjects=[author-003]" overwrite=true)
training=(train.epochs=5 train.batch_size=12 train.learning_rate=5.0e-4)

distributed-unlearn run jobs/smollm2_tofu_train.yaml "${common[@]}" "${training[@]}" \
    model.path="$model" output=runs/smollm2_small/train
distributed-unlearn run jobs/smollm2_tofu_retrain.yaml "${common[@]}" "${training[@]}" \
    model.path="$model" "forget.subjects=[author-000]" output=runs/smollm2_small/retrain
distributed-unlearn run --allow-incomplete jobs/smollm2_tofu_unlearn.yaml "${common[@]}" \
    model.path=runs/smollm2_small/train/checkpoint retrained=runs/smollm2_small/retrain/checkpoint \
    "forget.subjects=[author-000]" solver.max_krylov_steps=2 solver.gradient_batch=24 solver.curvature_batch=8 \
    solver.max_steps=40 solver.cubic_coefficient=300 output=runs/smollm2_small/unlearn
# For comparison: AdamW on the same objective, until the stopping rule is met.
distributed-unlearn run --allow-incomplete jobs/smollm2_tofu_unlearn.yaml "${common[@]}" \
    model.path=runs/smollm2_small/train/checkpoint retrained=runs/smollm2_small/retrain/checkpoint \
    "forget.subjects=[author-000]" solver="{method: adamw, learning_rate: 5.0e-5, gradient_batch: 12, max_steps: 60}" \
    solver.stop.check_every_steps=5 output=runs/smollm2_small/adamw
