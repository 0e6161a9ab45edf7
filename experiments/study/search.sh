#!/usr/bin/env bash
# Rate, decay and soft targets of what won, by Optuna, which stops poor trials at 30 and 60 %.
#
#   bash experiments/study/search.sh outputs/search
set -euo pipefail
export OMP_NUM_THREADS=1

python -m clipx.train -m experiment=study hydra/sweeper=optuna name=search "hydra.sweep.dir=$1" workers=0 \
    'data.without=[fluent]' max_steps=150 eval_every=null save_every=null \
    model=tiny_resnet optim=muon sched=warmup_constant_cooldown data.captions_per_picture=2 \
    'optim.lr=tag(log,interval(3e-4,1e-2))' optim.weight_decay=0,0.1,0.2 loss.label_smoothing=0,0.05,0.1,0.2 \
    hydra.sweeper.n_trials=12 hydra.sweeper.startup=4 'hydra.sweeper.rungs=[30%,60%]'
