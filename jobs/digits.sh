#!/usr/bin/env bash
# The digits recipes in order: train, retrain without a tenth of the records and without class 3, unlearn both.
#
#   jobs/digits.sh cnn          # seconds a run on one core, every second-order method
#   jobs/digits.sh resnet18     # minutes a run on two cores
#
# Everything is written below runs/digits; the last lines are a table of all results.
set -euo pipefail
name=$1
class=('forget={classes: [3]}')

[ -d runs/digits/"$name" ] || python jobs/digits_checkpoints.py runs/digits
distributed-unlearn run jobs/digits_"$name"_train.yaml overwrite=true
distributed-unlearn run jobs/digits_"$name"_retrain.yaml overwrite=true
distributed-unlearn run jobs/digits_"$name"_retrain.yaml overwrite=true "${class[@]}" \
    output=runs/digits/"$name"_retrain_class

unlearn() { # NAME, then overrides; the verdict of a baseline is not this script's business
    local target=$1
    shift
    distributed-unlearn run --allow-incomplete jobs/digits_"$name"_unlearn.yaml overwrite=true "$@" \
        output=runs/digits/"$name"_"$target"
    distributed-unlearn run --allow-incomplete jobs/digits_"$name"_unlearn.yaml overwrite=true "$@" "${class[@]}" \
        objective.name=delete solver.stop.forget_matches_holdout=false \
        retrained=runs/digits/"$name"_retrain_class/checkpoint output=runs/digits/"$name"_"$target"_class
}

unlearn scurenewton
unlearn adamw 'solver={method: adamw, learning_rate: 1.0e-3, gradient_batch: 100, max_steps: 30}'
