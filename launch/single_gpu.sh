#!/usr/bin/env bash
# Train on one GPU, or as one process where there is none. Nothing is sharded: ds_configs/stage0.json.
#
#   launch/single_gpu.sh --config launch/recipes/llama3_8b_1gpu.yaml output.name=mine
#   launch/single_gpu.sh --gpu 2 adapter.rank=64
#
#   --gpu N       which GPU (default: the first that CUDA_VISIBLE_DEVICES names, else 0); one of those that it names
#   --help        this text; `python launch/train.py --help` explains the settings
#
# Everything else goes to launch/train.py as it stands.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

gpu='' settings=()
while (($#)); do
    taken=1
    case ${1%%=*} in
        -h | --help) usage ;;
        --gpu) take gpu "$@" ;;
        *) settings+=("$1") ;;
    esac
    shift "$taken"
done
has --ds_config "${settings[@]}" || has --resume "${settings[@]}" ||
    settings=(--ds_config "$repository/ds_configs/stage0.json" "${settings[@]}")
visible=${CUDA_VISIBLE_DEVICES:-0}
[[ -z $gpu ]] || number --gpu "$gpu"
[[ -z $gpu || -z ${CUDA_VISIBLE_DEVICES:-} || ,$visible, == *,"$gpu",* ]] ||
    die "--gpu $gpu is not among CUDA_VISIBLE_DEVICES=$visible"
use_environment
called_as "$0" ${gpu:+--gpu "$gpu"}
check train 1 1 "${settings[@]}" >/dev/null

if has_gpu; then
    export CUDA_VISIBLE_DEVICES=${gpu:-${visible%%,*}}
else
    use_cpu
fi
[[ -z ${SORSA_EXIT_FILE:-} ]] || rm -f "$SORSA_EXIT_FILE" # of an earlier run
# One process, also inside a job of several tasks.
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0
grow_segments
run python "$repository/launch/train.py" "${settings[@]}"
