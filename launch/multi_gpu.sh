#!/usr/bin/env bash
# Train on all GPUs of this machine, or on those that CUDA_VISIBLE_DEVICES names; without GPUs, on CPU ranks.
#
#   launch/multi_gpu.sh --config launch/recipes/llama3_70b_8gpu.yaml output.name=mine
#   launch/multi_gpu.sh --ranks 4 adapter.rank=64
#
#   --ranks N     on N ranks (default: all GPUs; 2 on a machine without)
#   --port P      TCP port for the ranks to meet (default 29500; two jobs on one machine need two)
#   --help        this text; `python launch/train.py --help` explains the settings
#
# Everything else goes to launch/train.py as it stands (its default: ds_configs/zero3.json).
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

ranks='' port=29500 settings=() own=()
while (($#)); do
    taken=1
    case ${1%%=*} in
        -h | --help) usage ;;
        --ranks) take ranks "$@" ;;
        --port) take port "$@" ;;
        *) settings+=("$1") && shift && continue ;;
    esac
    own+=("${@:1:taken}")
    shift "$taken"
done
port --port "$port"
[[ -z $ranks ]] || number --ranks "$ranks" 1
use_environment
called_as "$0" "${own[@]}"
if ! has_gpu; then
    use_cpu
    ranks=${ranks:-2}
fi
world_size=${ranks:-$(count_gpus)}
if [[ -n $ranks && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    # deepspeed would forget the variable where it is given a number: GPUs that are in use by others.
    ((ranks <= $(count_gpus))) || die "--ranks $ranks: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names fewer GPUs"
    CUDA_VISIBLE_DEVICES=$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")
    export CUDA_VISIBLE_DEVICES
    ranks=''
fi
check train "$world_size" "$world_size" "${settings[@]}" >/dev/null

[[ -z ${SORSA_EXIT_FILE:-} ]] || rm -f "$SORSA_EXIT_FILE" # of an earlier run
grow_segments
# shellcheck disable=SC2086
run deepspeed --log_level critical --master_port "$port" ${ranks:+--num_gpus $ranks} "$repository/launch/train.py" "${settings[@]}"
