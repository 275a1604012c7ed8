#!/usr/bin/env bash
# The digits recipes in order: train, retrain without a tenth of the records and without class 3, unlearn both.
#
#   jobs/digits.sh cnn          # every method; minutes in all on one core
#   jobs/digits.sh resnet18     # two workers at ZeRO stage 3; better with GPUs
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
if [ "$name" = cnn ]; then
    batches='gradient_batch: 600, curvature_batch: 300'
    unlearn descent 'solver={inner: gradient_descent, gradient_batch: 300, curvature_batch: 100, max_steps: 10}'
    unlearn curenewton "solver={method: curenewton, cubic_coefficient: 1000.0, $batches, max_steps: 3}"
    unlearn damped_newton "solver={method: damped_newton, $batches, max_steps: 2}"
    unlearn pinv_newton "solver={method: pinv_newton, $batches, max_steps: 1}"
fi

python - "$name" <<'TABLE'
import json, pathlib, sys

print("loss / accuracy          forget          retain         holdout    ToW   ||Delta||  products  seconds")
for path in sorted(pathlib.Path("runs/digits").glob(f"{sys.argv[1]}_*/record.json")):
    for last in json.loads(path.read_text()).get("rounds", [])[-1:]:
        sets = (last["after"][name] for name in ("forget", "retain", "holdout"))
        cells = (f"{x['loss_nats_per_token']:9.3f} / {x['exact_memorisation']:.3f}" for x in sets)
        tail = (last["tug_of_war"], last["update_norm"], last["num_products"], last["wall_seconds"])
        print(f"{path.parent.name:22s}", *cells, "{:.3f}  {:9.3f}  {:8d}  {:7.1f}".format(*tail))
TABLE
