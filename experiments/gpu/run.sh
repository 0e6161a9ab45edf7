#!/usr/bin/env bash
# The training step on a GPU beside open_clip's: bf16, batches of 1,024 and 4,096, with and without compile; memory at 256.
#
#   experiments/gpu/run.sh OUT      writes OUT/*.json and the console's lines to OUT/*.txt
#
# Without a GPU it does the same in small on the CPU, to show that it runs.
set -euo pipefail
out=${1:?where to}
python=${PYTHON:-python}
mkdir -p "$out"
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    common=(data=dummy data.size=224 data.samples=20000 amp=bf16 workers=8 rounds=5 steps=20)
    models=(vit_b32 small) batches=(256 1024 4096)
else
    common=(data=dummy data.samples=400 workers=1 rounds=1 steps=2 model.image.depth=1 model.text.depth=1)
    models=(tiny) batches=(32 64)
fi
for model in "${models[@]}"; do
    for batch in "${batches[@]}"; do
        for compile in false true; do
            name=$model-$batch-compile=$compile
            "$python" experiments/speed/against_open_clip.py model="$model" batch_size="$batch" compile=$compile \
                "${common[@]}" 'parts=[step]' json="$out/$name.json" 2>&1 | tee "$out/$name.txt"
        done
    done
done
