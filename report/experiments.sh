#!/usr/bin/env bash
# Every run that the report quotes; on the official data, a day or more on two cores, most of it for emnist-64px (all
# images). Finished runs are skipped, task 2's interrupted ones resume.
#
#   report/experiments.sh                            all of them, on the official data and weights
#   report/experiments.sh emnist-12k-64px-seed0 …    some of them
#
#   DATA=DIR      where MNIST and EMNIST lie, from the project's folder (default: data, downloaded if need be)
#   WEIGHTS=FILE  for ResNet-18 (default: imagenet, downloaded)
#   AMP=auto      mixed precision where the hardware has it (default: off, as the report's runs)
#
# The runs go to results/report; report/results holds their small files, and also bench.txt (python tests.py bench),
# tests.txt (python tests.py), the logs that KEEP=DIR .ci/cluster.sh 1 2 leaves, in cluster/, and note.txt (what a
# reader must know of these runs). report/build.sh results/report builds the report from them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/report
wanted=("$@")

run() { # run NAME SCRIPT ARGUMENT...
  local name=$1
  shift
  [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]] || return 0
  echo "== $name"
  ./setup_env.sh python "$@" --data-dir "${DATA:-data}" --out "$out/$name"
}
cnn() { run "$1" cnn_from_scratch.py --dataset mnist "${@:2}"; }
emnist() {
  run "$1" resnet18.py --dataset emnist --weights "${WEIGHTS:-imagenet}" --amp "${AMP:-off}" "${@:2}"
}

# task 1: the spread over seeds, and the original course recipe
for seed in {0..9}; do cnn "mnist-seed$seed" --seed "$seed"; done
for seed in {0..2}; do
  cnn "mnist-course-seed$seed" --seed "$seed" --batch-size 640 --lr 0.01 --momentum 0 --schedule constant
done

# task 2: the four regimes on 12,000 images at 64 px, with three seeds
all=(--regimes linear_probe partial_unfreeze full gradual)
for seed in {0..2}; do emnist "emnist-12k-64px-seed$seed" --limit 12000 --image-size 64 --seed "$seed" "${all[@]}"; done

# the image's size, and all training images
emnist emnist-12k-224px --limit 12000 --image-size 224
emnist emnist-64px --limit 0 --image-size 64

# against emnist-12k-64px-seed0: without the cache, with augmentation, the course's recipe, random weights
partial=(--limit 12000 --image-size 64 --regimes partial_unfreeze)
emnist emnist-12k-64px-nocache "${partial[@]}" --cache-gb 0
emnist emnist-12k-64px-augment "${partial[@]}" --augment
emnist emnist-12k-64px-course "${partial[@]}" --lr 0.0005 --epochs 20
WEIGHTS=none emnist emnist-12k-64px-random --limit 12000 --image-size 64 --regimes full

# with and without mixed precision: to be run on a GPU or CPU that multiplies bf16
emnist emnist-12k-64px-bf16 "${partial[@]}" --amp bf16
emnist emnist-12k-64px-float32 "${partial[@]}" --amp off
