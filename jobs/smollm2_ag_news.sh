#!/usr/bin/env bash
# The AG-News recipes in order: prepare, train, retrain without a twentieth of the records, unlearn it.
#
#   jobs/smollm2_ag_news.sh MODEL PATH/test.csv [NUM_RECORDS]
#
# MODEL: a folder or HuggingFaceTB/SmolLM2-135M-Instruct. NUM_RECORDS: 2000, or fewer for a machine without a GPU.
set -euo pipefail
num=${3:-2000}
data=("data.split=train[:$num]" "holdout.split=train[$num:]" overwrite=true)

python jobs/ag_news_classifier.py "$1" "$2" runs/ag_news --num-records "$num" --overwrite
distributed-unlearn run jobs/smollm2_ag_news_train.yaml "${data[@]}"
distributed-unlearn run jobs/smollm2_ag_news_retrain.yaml "${data[@]}"
distributed-unlearn run --allow-incomplete jobs/smollm2_ag_news_unlearn.yaml "${data[@]}"
python jobs/table.py runs/ag_news/unlearn
