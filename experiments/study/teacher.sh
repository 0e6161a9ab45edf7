#!/usr/bin/env bash
# A student with and without a teacher, side by side on a core each, for three seeds. The teacher is a run of the study.
#
#   bash experiments/study/teacher.sh outputs/study/together/seed=0 outputs/teacher
set -euo pipefail
teacher=$1 out=$2
export OMP_NUM_THREADS=1
common=(experiment=study workers=0 'data.without=[fluent]' eval_every=null save_every=null)

for seed in 0 1 2; do
    python -m clipx.train "${common[@]}" "seed=$seed" name=without "hydra.run.dir=$out/without/seed=$seed" max_steps=300 &
    python -m clipx.train "${common[@]}" "seed=$seed" name=with "hydra.run.dir=$out/with/seed=$seed" max_steps=160 \
        loss=distill "teacher=$teacher" views=6 "feature_cache=$out/features-$seed" &
    wait
done
