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

# number OPTION VALUE [LEAST [MOST]]: a whole number from LEAST (0) to MOST (999999999).
number() {
    [[ $2 =~ ^[0-9]+$ ]] || die "$1 is '$2': a whole number is needed"
    ((${#2} <= 9 && 10#$2 <= ${4:-999999999})) || die "$1 is $2: at most ${4:-999999999} is possible"
    ((10#$2 >= ${3:-0})) || die "$1 is $2: at least ${3:-0} is needed"
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

# check WORD...: the Python command as it will be started, without starting it; see launch/check.py.
check() {
    python "$repository/launch/check.py" "$@"
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

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q .
}

# How many GPUs CUDA_VISIBLE_DEVICES names; all of this machine where it names none.
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"; else nvidia-smi -L; fi | grep -c .
}

# run COMMAND...: in a process group of its own, and told of the signals that this script gets. SIGTERM becomes
# SIGUSR1, which the launchers ignore and the ranks answer with a checkpoint and exit code 75; a launcher that got
# SIGTERM would leave its ranks alone, or kill them after 30 seconds. Ends this script with the exit code of the rank
# that failed first, which is in the file where a launcher has lost it, and says how long it took.
run() {
    local code=0 own='' child
    if [[ -z ${SORSA_EXIT_FILE:-} ]]; then
        own=$(mktemp -d)
        export SORSA_EXIT_FILE=$own/code
    fi
    set -m
    (
        trap '' USR1 TERM
        exec "$@"
    ) &
    child=$!
    set +m
    # shellcheck disable=SC2064
    trap "kill -USR1 -- -$child 2>/dev/null" TERM USR1
    # shellcheck disable=SC2064
    trap "kill -INT -- -$child 2>/dev/null" INT
    while :; do # a signal ends the wait, not the child
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    ((code == 0)) || [[ ! -s $SORSA_EXIT_FILE ]] || code=$(<"$SORSA_EXIT_FILE")
    [[ -z $own ]] || rm -rf "$own"
    tell "$code"
    exit "$code"
}

# $1: the exit code; says it, and how long it took.
tell() {
    printf '%s: exit code %d after %d:%02d:%02d\n' "$(hostname)" "$1" \
        $((SECONDS / 3600)) $((SECONDS / 60 % 60)) $((SECONDS % 60)) >&2
}
