#!/usr/bin/env bash
# The digits recipes in order: train, retrain without a tenth of the records and without class 3, unlearn both.
#
#   jobs/digits.sh cnn          # every method; minutes in all on one core
#   jobs/digits.sh resnet18     # two workers at ZeRO stage 3; better with GPUs
#
# Everything is written below runs/digits; the last lines are two tables of all results.
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
if [ "$name" = cnn ]; then
    batches='gradient_batch: 600, curvature_batch: 300'
    unlearn descent 'solver={inner: gradient_descent, gradient_batch: 300, curvature_batch: 100, max_steps: 10}'
    unlearn curenewton "solver={method: curenewton, cubic_coefficient: 1000.0, $batches, max_steps: 3}"
    unlearn damped_newton "solver={method: damped_newton, $batches, max_steps: 2}"
    unlearn pinv_newton "solver={method: pinv_newton, $batches, max_steps: 1}"
fi

echo "a tenth of the images, drawn at random:"
mapfile -t samples < <(find runs/digits -maxdepth 1 -name "${name}_*" ! -name '*_class' | sort)
python jobs/table.py "${samples[@]}"
echo "class 3:"
python jobs/table.py runs/digits/"$name"_*_class
