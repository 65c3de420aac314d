# shellcheck shell=bash
# What the Slurm scripts have in common; they source it after launch/common.sh, inside the job or outside.
: "${repository:?is set by the script that sources this}"

# submit_or_parse SCRIPT "$@". Outside a job: checks, submits SCRIPT and ends. Inside: sets ranks (of a node),
# node_count, master_port, torchrun, logs, max_requeues, and `settings`, which are for the Python command.
submit_or_parse() {
    local script=$1 word given=() sbatch_options=()
    shift
    ranks='' node_count=1 master_port='' torchrun='' logs='' max_requeues=100 settings=()
    given=("$@")
    for word in "$@"; do
        if [[ $word == -- ]]; then # what stands before it is for sbatch
            while [[ $1 != -- ]]; do sbatch_options+=("$1") && shift; done
            shift
            given=("$@")
            break
        fi
    done
    while (($#)); do
        taken=1
        case ${1%%=*} in
            -h | --help) usage ;;
            --ranks_per_node) take ranks "$@" ;;
            --master_port) take master_port "$@" ;;
            --logs) take logs "$@" ;;
            --max_requeues) take max_requeues "$@" ;;
            --torchrun) torchrun=--torchrun ;;
            *) settings+=("$1") ;;
        esac
        shift "$taken"
    done
    [[ -z $master_port ]] || port --master_port "$master_port"
    number --max_requeues "$max_requeues"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        ((${#sbatch_options[@]} == 0)) || die "inside a job there is nothing for sbatch: '${sbatch_options[*]} --'"
        number SLURM_JOB_ID "$SLURM_JOB_ID"
        number SLURM_RESTART_COUNT "${SLURM_RESTART_COUNT:-0}"
        called_as bash "$repository/$script" "--nodes=$SLURM_JOB_NUM_NODES" \
            ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"} -- ${ranks:+--ranks_per_node "$ranks"} $torchrun
        ranks=${ranks:-${SLURM_GPUS_ON_NODE:-}} node_count=$SLURM_JOB_NUM_NODES
    else
        read_sbatch_options " ${sbatch_options[*]} "
    fi
    [[ -n $ranks ]] || die "no GPUs are asked for: say --gpus-per-node=N to sbatch (what is for sbatch stands before" \
        "a \`--\` where sbatch itself does not), or --ranks_per_node N for CPU ranks"
    number --ranks_per_node "$ranks" 1
    number --nodes "$node_count" 1
    use_environment
    check_arguments # the script's own

    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        command -v sbatch >/dev/null || die "there is no sbatch here; launch/multi_gpu.sh and multi_node.sh need none"
        export SORSA_REPOSITORY=$repository # the job runs in this folder, from which the files were named
        exec sbatch "${sbatch_options[@]}" "$repository/$script" "${given[@]}"
    fi
}

# read_sbatch_options " WORD WORD... ": node_count and, unless it is set, ranks; as sbatch reads them, the last counts.
read_sbatch_options() {
    local total
    [[ ! $1 =~ .*\ (--nodes[=\ ]|-N\ ?)([^\ ]+) ]] || node_count=${BASH_REMATCH[2]}
    [[ ! $1 =~ .*\ --(gpus-per-node[=\ ]|gres[=\ ]([^\ ]*,)?gpu:)([^\ ,]*:)?([0-9]+) ]] || ranks=${ranks:-${BASH_REMATCH[4]}}
    if [[ -z $ranks && $1 =~ .*\ (--gpus[=\ ]|-G\ ?)([^\ ,]*:)?([0-9]+)\  ]]; then # of the whole job
        total=${BASH_REMATCH[3]}
        number --gpus "$total" 1
        number --nodes "$node_count" 1
        ((10#$total % 10#$node_count == 0)) ||
            die "--gpus $total does not divide among $node_count nodes: say --gpus-per-node=N"
        ranks=$((10#$total / 10#$node_count))
    fi
}

# run_on_nodes WORD...: launch/multi_node.sh with these words on every node of the job; sets `code`.
run_on_nodes() {
    local nodes master port
    logs=${logs:-$SLURM_SUBMIT_DIR/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
    mkdir -p "$logs"
    # In Slurm's order, which is that of SLURM_PROCID; the first node is reached as Slurm reaches it.
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    printf "%s slots=$ranks\n" "${nodes[@]}" >"$logs/hostfile"
    master=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    port=${master_port:-$((20000 + SLURM_JOB_ID % 10000))}
    export SORSA_EXIT_FILE=$logs/exit-code
    rm -f "$SORSA_EXIT_FILE"
    echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${#nodes[@]} nodes x $ranks" \
        "ranks, meeting at $master:$port; logs in $logs"
    code=0
    # shellcheck disable=SC2016,SC2086
    srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 --wait=60 --open-mode=append --output="$logs/node-%n-%N.log" \
        bash -c 'exec bash "$@" --node_rank "$SLURM_PROCID"' node \
        "$repository/launch/multi_node.sh" --hostfile "$logs/hostfile" --master_addr "$master" \
        --master_port "$port" $torchrun "$@" || code=$?
    code_of_ranks "$code" # a node that has left may have had the others ended
}
