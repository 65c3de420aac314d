# shellcheck shell=bash
# What the launch scripts have in common; they source it. `set -euo pipefail` is theirs.
: "${repository:?is set by the script that sources this}"

# Says what is wrong with the command and ends it, as launch/train.py does with a setting. Control characters of file
# names and settings do not reach the terminal.
die() {
    echo "error: ${*//[[:cntrl:]]/?}" >&2
    exit 2
}

# The comment at the head of the calling script.
usage() {
    sed -n '2,/^[^#]/ { /^#SBATCH/d; s/^# \{0,1\}//p }' "$0"
    exit 0
}

# take VARIABLE "$@": sets the variable to the value of the option that stands first, `--option value` or
# `--option=value`, and `taken` to the number of words that were.
# shellcheck disable=SC2034
take() {
    local variable=$1 option=${2%%=*} text
    if [[ $2 == *=* ]]; then
        text=${2#*=} taken=1
    else
        text=${3:-} taken=2
    fi
    [[ -n $text && $text != --* ]] || die "$option needs a value"
    printf -v "$variable" %s "$text"
}

# number OPTION VALUE [LEAST [MOST]]: a whole number from LEAST (0) to MOST (999999999). What comes from outside passes
# here, or another such pattern, before bash computes with it: bash would run commands that stand in it, and take 010 for
# 8.
number() {
    [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || die "$1 is '$2': a whole number is needed"
    ((${#2} <= 9 && $2 <= ${4:-999999999})) || die "$1 is $2: at most ${4:-999999999} is possible"
    (($2 >= ${3:-0})) || die "$1 is $2: at least ${3:-0} is needed"
}

# port OPTION VALUE
port() {
    number "$1" "$2" 1 65535
}

# file OPTION NAME
file() {
    [[ -r $2 && -f $2 ]] || die "$1 $2: no such file, or it cannot be read"
}

# The environment in which sorsa_ds is installed: the active one, else the repository's own (`make install`).
use_environment() {
    export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
    command -v deepspeed >/dev/null || PATH="$repository/.venv/bin:$PATH"
    command -v deepspeed >/dev/null || die "no deepspeed on PATH: activate the environment, or run make install"
}

# called_as WORD...: how this script was called, without the settings; messages of the Python command repeat it.
called_as() {
    [[ -n ${SORSA_COMMAND:-} ]] || printf -v SORSA_COMMAND '%q ' "$@"
    export SORSA_COMMAND=${SORSA_COMMAND% }
}

# check WORD...: the Python command as it will be started, without starting it; see launch/check.py. It is no rank: its
# exit code does not go into the ranks' file. Python needs some seconds until it can say anything.
check() {
    echo 'Checking the command ...' >&2
    env -u SORSA_EXIT_FILE python "$repository/launch/check.py" "$@"
}

# has OPTION WORD...: whether the option stands among the words.
has() {
    local option=$1 word
    shift
    for word; do
        [[ $word != "$option" && $word != "$option="* ]] || return 0
    done
    return 1
}

# PyTorch extends its segments of GPU memory, and leaves no gaps between them; for training only, because vLLM's GPUs
# cannot share such memory. Left alone where the user has set up the allocator.
grow_segments() {
    [[ -n ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=expandable_segments:True
}

# Whether the run computes on GPUs: this machine shows one, and neither DS_ACCELERATOR=cpu nor an empty list of visible
# devices says to leave it alone. A device file is enough, because a GPU whose driver is broken must not be passed over:
# the Python command then says what is wrong with it.
has_gpu() {
    [[ ${DS_ACCELERATOR:-} != cpu ]] || return 1
    case ${CUDA_VISIBLE_DEVICES-all} in '' | -1 | NoDevFiles) return 1 ;; esac
    # grep reads to the end: at the first line it would leave nvidia-smi with a broken pipe, and the pipe fails with it.
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}

# Everything that this script starts computes on the CPU, and sees no GPU.
use_cpu() {
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
}

# How many GPUs CUDA_VISIBLE_DEVICES names; all of this machine where it names none. A GPU that is cut into several
# (MIG) counts once, because a process sees one of its parts.
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || compgen -G '/dev/nvidia[0-9]*' | wc -l
    fi
}

# run COMMAND...: the launcher, in a process group of its own, whose ranks are told of the signals that this script gets:
# SIGTERM and Ctrl-C become SIGUSR1, which the launchers ignore and the ranks answer with a checkpoint and exit code 75.
# A launcher that got the signal itself would leave its ranks alone, or kill them after 30 seconds. A second Ctrl-C kills
# everything. Ends this script with the exit code of the ranks, and says how long it took.
run() {
    local code=0 own='' child interruptions=0 token=$$-$RANDOM-$RANDOM
    if [[ -z ${SORSA_EXIT_FILE:-} ]]; then
        own=$(mktemp -d)
        export SORSA_EXIT_FILE=$own/code
    fi
    rm -f "$SORSA_EXIT_FILE.signal" # of an earlier run
    set -m
    (
        trap '' USR1 TERM
        export SORSA_TOKEN=$token SORSA_SCRIPT=$$ # whose end the ranks notice, also where it is killed
        exec "$@"
    ) &
    child=$!
    set +m
    trap 'signalled SIGTERM' TERM
    trap 'signalled SIGUSR1' USR1
    trap interrupted INT
    while kill -0 "$child" 2>/dev/null; do wait "$child" || :; done # a signal ends the wait, not the child
    wait "$child" || code=$?                                        # the child's own code, which bash remembers
    while [[ -n $(processes) ]]; do sleep 0.2; done # a launcher that was killed leaves its ranks, which save and stop
    code_of_ranks "$code"
    rm -f "$SORSA_EXIT_FILE.signal"
    [[ -z $own ]] || rm -rf "$own"
    tell "$code"
    exit "$code"
}

# The numbers of the processes that `run` has started and that are alive, whichever group or parent they have by now.
processes() {
    { grep -lzFx "SORSA_TOKEN=$token" /proc/[0-9]*/environ 2>/dev/null || :; } | cut -d / -f 3
}

signal_processes() {
    local pid
    for pid in $(processes); do kill "-$1" "$pid" 2>/dev/null || :; done
}

# signalled NAME: the ranks are told to save and stop. All that reaches them is SIGUSR1; the name of what was sent stands
# in a file, so that their messages and records name it.
signalled() {
    { echo "$1" >"$SORSA_EXIT_FILE.signal"; } 2>/dev/null || :
    signal_processes USR1
}

interrupted() {
    if ((interruptions++)); then
        signal_processes KILL
    else
        echo 'Ctrl-C: the ranks are told to save and stop; a second one kills them' >&2
        signalled SIGINT
    fi
}

# code_of_ranks LAUNCHERS_CODE: sets `code`. The ranks write theirs into a file, where the first counts. A launcher may
# have lost it, or have been killed; without the file the run did not come to its end.
code_of_ranks() {
    local told=''
    [[ ! -r $SORSA_EXIT_FILE ]] || read -r told <"$SORSA_EXIT_FILE" || :
    code=$1
    if [[ $told =~ ^[0-9]{1,3}$ ]] && ((10#$told <= 255)); then
        code=$((10#$told))
    elif ((code == 0)); then
        code=1
        echo "error: the launcher reports success, but no rank has come to its end (nothing in $SORSA_EXIT_FILE)" >&2
    fi
}

# $1: the exit code; says it, and how long it took.
tell() {
    printf '%s: exit code %d after %d:%02d:%02d\n' "$(hostname)" "$1" \
        $((SECONDS / 3600)) $((SECONDS / 60 % 60)) $((SECONDS % 60)) >&2
}
