#!/usr/bin/env bash
# The SmolLM2 / TOFU recipes with a LoRA adapter, in order:
#
#   jobs/smollm2_tofu_lora.sh PATH/full.jsonl MODEL            # 20 authors, two to forget; about an hour on two CPU cores
#   jobs/smollm2_tofu_lora.sh PATH/full.jsonl MODEL small      # 3 authors, one to forget; minutes on two CPU cores
#
# MODEL: a folder or HuggingFaceTB/SmolLM2-135M-Instruct. The next author is held out.
set -euo pipefail
common=(data.path="$1" overwrite=true)
forget=()
solver=()
if [ "${3:-}" = small ]; then
    common+=("data.split=train[:80]" "holdout.subjects=[author-003]")
    forget=("forget.subjects=[author-000]")
    solver=(solver.gradient_batch=24 solver.curvature_batch=4)
fi
distributed-unlearn run jobs/smollm2_tofu_lora_train.yaml model.path="$2" "${common[@]}"
distributed-unlearn run jobs/smollm2_tofu_lora_retrain.yaml model.path="$2" "${common[@]}" "${forget[@]}"
distributed-unlearn run --allow-incomplete jobs/smollm2_tofu_lora_unlearn.yaml "${common[@]}" "${forget[@]}" "${solver[@]}"
python jobs/table.py runs/smollm2_tofu_lora/unlearn
