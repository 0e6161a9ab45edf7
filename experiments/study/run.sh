#!/usr/bin/env bash
# One change at a time against experiment=study: for each a sweep over seeds, two sweeps at a time, on one thread each.
# Finished runs are skipped, so that seeds can be added later.
#
#   bash experiments/study/run.sh outputs/study 0,1,2
set -euo pipefail
out=$1 seeds=$2
export OMP_NUM_THREADS=1

change() {
    local name=$1
    shift
    if (( $(jobs -r | wc -l) == 2 )); then wait -n; fi
    python -m clipx.train -m experiment=study "name=$name" "hydra.sweep.dir=$out/$name" 'hydra.sweep.subdir=seed=${seed}' \
        "seed=$seeds" workers=0 'data.without=[fluent]' max_steps=300 eval_every=null save_every=null "$@" &
}

change baseline
change muon optim=muon
change resnet model=tiny_resnet
change smoothing loss.label_smoothing=0.1
change cooldown sched=warmup_constant_cooldown
change two_captions data.captions_per_picture=2
change linear sched=warmup_linear
change constant sched=constant sched.warmup=30
change weighted data.caption=weighted 'data.caption_weights=[2,1,1]'
change word_dropout data.word_dropout=0.1
change join data.caption=join
change positive loss.same=positive
change mask loss.same=mask
change sigmoid loss=sigmoid
change fixed_temperature model.temperature=0.07 model.learn_temperature=false
change flip augment=flip
change affine augment=affine
change color augment=color
change strong augment=strong
change trivial augment=trivial
change randaugment augment=randaugment
change patch_dropout patch_dropout=0.5
change registers model.image.registers=4
change layer_scale model.image.layer_scale=0.1
change ema ema=0.98
change lion optim=lion optim.lr=2e-4 optim.weight_decay=0.5
change nadam optim=any optim.optimizer=torch.optim.NAdam optim.lr=1e-3 optim.weight_decay=0.1 '+optim.betas=[0.9,0.98]' \
    +optim.decoupled_weight_decay=true +optim.eps=1e-6
change together model=tiny_resnet optim=muon loss.label_smoothing=0.1 data.captions_per_picture=2 \
    sched=warmup_constant_cooldown
wait
