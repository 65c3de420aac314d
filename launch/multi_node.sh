#!/usr/bin/env bash
# Train on several nodes, without ssh or pdsh: run this once on every node, with the same arguments.
#
#   launch/multi_node.sh --hostfile hostfile --config launch/recipes/llama3_70b_2nodes.yaml \
#       --ds_config ds_configs/zero3_multinode.json output.name=mine
#
#   --hostfile FILE    one line per node: `NAME slots=NUMBER_OF_GPUS`. The first one's rank 0 is where all ranks meet
#   --nodes N          instead of a hostfile: so many nodes, all alike; needs --node_rank and --master_addr, and torchrun
#   --ranks R          with --nodes: ranks of each node (default: all GPUs)
#   --node_rank K      which line of it this node is, from 0 (default: the one with this host's name or address)
#   --master_addr A    address of the first node (default: its name in the hostfile)
#   --master_port P    TCP port there (default 29500)
#   --torchrun         start the ranks with torchrun instead of deepspeed: leaves CUDA_VISIBLE_DEVICES as it is
#   --script FILE      run this instead of launch/train.py; it has to end through sorsa_ds.runtime.exit_codes.run
#   --help             this text; `python launch/train.py --help` explains the settings
#
# Everything else goes to launch/train.py as it stands. The folder of the runs must be one that all nodes share.
# On networks with several interfaces set NCCL_SOCKET_IFNAME (GPUs) and GLOO_SOCKET_IFNAME. See docs/launching.md.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

hostfile='' node_count='' ranks='' node_rank='' master_addr='' master_port=29500 launcher=deepspeed script='' settings=() own=()
while (($#)); do
    taken=1
    case ${1%%=*} in
        -h | --help) usage ;;
        --hostfile) take hostfile "$@" ;;
        --nodes) take node_count "$@" ;;
        --ranks) take ranks "$@" ;;
        --node_rank) take node_rank "$@" ;;
        --master_addr) take master_addr "$@" ;;
        --master_port) take master_port "$@" ;;
        --script) take script "$@" ;;
        --torchrun) launcher=torchrun ;;
        *) settings+=("$1") && shift && continue ;;
    esac
    own+=("${@:1:taken}")
    shift "$taken"
done

nodes=() slots=() world_size=0
read_hostfile() {
    local name rest
    file --hostfile "$hostfile"
    while read -r name rest || [[ -n $name ]]; do
        [[ -z $name || $name == \#* ]] && continue
        [[ $rest =~ ^slots=([1-9][0-9]{0,4})[[:space:]]*(#.*)?$ ]] ||
            die "--hostfile $hostfile: '$name $rest' does not read NAME slots=NUMBER"
        [[ " ${nodes[*]} " != *" $name "* ]] || die "--hostfile $hostfile names $name twice"
        nodes+=("$name") slots+=("${BASH_REMATCH[1]}")
        world_size=$((world_size + BASH_REMATCH[1]))
    done <"$hostfile"
    ((${#nodes[@]})) || die "--hostfile $hostfile names no node"
}

nodes_alike() {
    local i
    number --nodes "$node_count" 1 99999
    [[ -n $node_rank ]] || die "--nodes needs --node_rank: which of them this is, from 0"
    [[ -n $master_addr ]] || die "--nodes needs --master_addr: the address of the first node"
    [[ -n $ranks ]] || { has_gpu && ranks=$(count_gpus); } || die "--ranks is missing: this node has no GPU to count"
    number --ranks "$ranks" 1 99999
    for ((i = 0; i < node_count; i++)); do nodes+=("node $i") slots+=("$ranks"); done
    world_size=$((node_count * ranks)) launcher=torchrun
}

if [[ -n $node_count ]]; then
    [[ -z $hostfile ]] || die "--nodes and --hostfile say the same: leave one of them out"
    nodes_alike
else
    [[ -n $hostfile ]] || die "--hostfile is missing: one line per node, NAME slots=NUMBER_OF_GPUS (or say --nodes)"
    [[ -z $ranks ]] || die "--ranks goes with --nodes; a hostfile says it as slots=$ranks"
    read_hostfile
fi

if [[ -z $node_rank ]]; then
    names=" $(hostname) $(hostname -s) $(hostname -f 2>/dev/null || :) $(hostname -I 2>/dev/null || :) "
    for i in "${!nodes[@]}"; do
        [[ $names != *" ${nodes[i]} "* ]] || node_rank=$i
    done
    [[ -n $node_rank ]] || die "--hostfile $hostfile does not name this node,$names; mend it, or say --node_rank"
fi
number --node_rank "$node_rank"
((node_rank < ${#nodes[@]})) || die "--node_rank is $node_rank: ${hostfile:-"--nodes $node_count"} names nodes 0 to $((${#nodes[@]} - 1))"
port --master_port "$master_port"
here=${slots[node_rank]}
[[ $(printf '%s\n' "${slots[@]}" | sort -u | wc -l) == 1 ]] && each=$here || each=0 # 0: nodes differ
if [[ $launcher == torchrun ]]; then
    ((each)) || die "--torchrun needs the same slots on every node"
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != "$(seq -s, 0 $((here - 1)))" ]]; then
    die "deepspeed would take GPUs 0 to $((here - 1)) instead of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: say --torchrun"
fi
use_environment
called_as "$0" "${own[@]}"
if [[ -n $script ]]; then
    file --script "$script"
else
    script=$repository/launch/train.py
    check train "$world_size" "$each" "${settings[@]}" >/dev/null
    grow_segments
fi
has_gpu || use_cpu

where=(--master_addr "${master_addr:-${nodes[0]}}" --master_port "$master_port" --node_rank "$node_rank")
if [[ $launcher == torchrun ]]; then
    run torchrun --nnodes "${#nodes[@]}" --nproc_per_node "$here" "${where[@]}" "$script" "${settings[@]}"
else
    run deepspeed --log_level critical --hostfile "$hostfile" --no_ssh "${where[@]}" "$script" "${settings[@]}"
fi
