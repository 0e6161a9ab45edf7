#!/usr/bin/env bash
# What a GPU has to show: tests that need one; then, in bf16, the step beside open_clip's, its most expensive kernels,
# and the loader on all cores.  Without a GPU it does the same in small on the CPU, to show that it runs.
#
#   experiments/gpu/run.sh OUT      writes OUT/*.json, the console's lines to OUT/*.txt, and the table to OUT/table.md
#
# Needs the checkout, what setup.cfg requires, and pytest; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?where to}
python=${PYTHON:-python}
export PYTHONPATH=$PWD
mkdir -p "$out"
"$python" -m pytest -m cuda tests 2>&1 | tee "$out/tests.txt" || true      # a failure must not cost the measurements
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    common=(data=dummy data.size=224 data.samples=20000 amp=bf16 rounds=5 steps=20)
    models=(vit_b32 small) batches=(256 1024 4096) modes=(false true) photos=(16 500) seconds=20
else
    common=(data=dummy data.samples=400 workers=1 rounds=1 steps=2 model.image.depth=1 model.text.depth=1)
    models=(tiny) batches=(32 64) modes=(false) photos=(2 20) seconds=1
fi
for model in "${models[@]}"; do
    for batch in "${batches[@]}"; do
        for compile in "${modes[@]}"; do
            name=$model-$batch-compile=$compile
            "$python" experiments/speed/against_open_clip.py model="$model" batch_size="$batch" compile=$compile \
                "${common[@]}" 'parts=[step]' json="$out/$name.json" 2>&1 | tee "$out/$name.txt"
        done
    done
    "$python" -m clipx.bench model="$model" batch_size="${batches[1]}" "${common[@]}" 'parts=[step]' trace=true \
        json="$out/$model-profile.json" hydra.run.dir="$out/$model-profile" 2>&1 | tee "$out/$model-profile.txt"
done
"$python" experiments/loader/photos.py "$out/photos" "${photos[@]}"
"$python" -m clipx.bench model="${models[0]}" data=shards data.root="$out/photos" data.val=0 batch_size="${batches[0]}" \
    'parts=[loader]' rounds=3 seconds=$seconds json="$out/loader.json" 2>&1 | tee "$out/loader.txt"
rm -r "$out/photos"
"$python" experiments/gpu/table.py "$out" | tee "$out/table.md"
