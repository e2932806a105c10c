"""What each process of a job runs, as shell text: the environment of the node, checks of it, and the command.

Modules, activation and `setup` are code of others, which may fail inside without harm. So there is no `set -e`: each
of them is checked, and what failed is named. A fault of the cluster's file ends with status 2, and the job is not
queued again.
"""

from __future__ import annotations

import shlex

from spell_megatron.jobs.site import Site

_FUNCTIONS = """\
spell_fail() {  # STATUS [MESSAGE]: end the step
    trap - EXIT ERR
    [ -z "$2" ] || echo "spell: ${SLURMD_NODENAME:-${HOSTNAME:-this machine}}: $2" >&2
    # Slurm ends the other processes, and srun tells the highest status of all. The first is the one that counts.
    # (SIGTERM, 143, is never the cause.)
    [ "$1" = 143 ] || [ -z "$SPELL_RENDEZVOUS" ] || (set -C; echo "$1" > "$SPELL_RENDEZVOUS/failed") 2>/dev/null
    exit "$1"
}
spell_ended() {  # STATUS: foreign code has ended this script
    [ "$1" = 0 ] || spell_fail 2 "$spell_now ended the script with status $1. Correct it in the cluster's file."
}
trap 'spell_ended $?' EXIT"""

_MODULES = """\
spell_now="/etc/profile"
type module >/dev/null 2>&1 || [ ! -r /etc/profile ] || source /etc/profile
type module >/dev/null 2>&1 || spell_fail 2 "there is no command 'module', and the cluster's file wants modules. Leave \
modules out, or have /etc/profile define it."
# Modules of the shell that submitted the job count as loaded, but may have lost their variables on the way.
unset LOADEDMODULES _LMFILES_ ${!_ModuleTable@} ${!__LMOD_REF_COUNT@} ${!__MODULES_LM@}"""

_VENV = """\
spell_now=@ACTIVATE@
[ -r @ACTIVATE@ ] || spell_fail 2 @MISSING@
source @ACTIVATE@"""

# Node-local, because many processes that compile into one folder of a shared filesystem slow each other down.
_DEFAULTS = """\
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null
export PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
spell_cache=$([ -d "$TMPDIR" ] && [ -w "$TMPDIR" ] && echo "$TMPDIR" || echo /tmp)/spell-cache-$(id -u)
mkdir -p -m 700 "$spell_cache" 2>/dev/null
if [ -O "$spell_cache" ] && [ ! -L "$spell_cache" ]; then  # nobody else has put something there
    export TRITON_CACHE_DIR="$spell_cache/triton" TORCHINDUCTOR_CACHE_DIR="$spell_cache/inductor"
    export VLLM_CACHE_ROOT="$spell_cache/vllm" CUDA_CACHE_PATH="$spell_cache/cuda"
fi"""

# The failures that count are those of the commands of `setup` itself, but not those inside a file that it sources,
# nor the status that such a file happens to end with.
_SETUP = """\
spell_setup_failed() {  # COMMAND DEPTH
    local file=${1#* } line
    file=${file%% *} file=${file//[\\"\\']/} file=${file/#\\~\\//$HOME/}
    [ "$2" = "$spell_depth" ] || return 0
    line=$(sed -n "${BASH_LINENO[0]}p" "${BASH_SOURCE[1]}" 2>/dev/null)
    case $1 in "source "* | ". "* | "\\\\. "*) [ ! -r "${file@P}" ] || return 0 ;; esac
    spell_fail 2 "setup failed at: ${line:-$1}. Correct it in the cluster's file; write '|| true' after a command that \
may fail."
}
spell_now="setup" spell_depth=${#BASH_SOURCE[@]}
trap 'spell_setup_failed "$BASH_COMMAND" ${#BASH_SOURCE[@]}' ERR
@SETUP@
trap - ERR"""

_PYTHON = """\
set +eu
spell_said=$(python -c "import spell_megatron" 2>&1) || spell_fail 2 "python ($(type -P python || echo none is found)) \
cannot import spell_megatron: ${spell_said##*$'\\n'}. Name the environment that has it in the cluster's file: venv, \
modules or container.image."
trap - EXIT"""

_GPUS = """\
if [ "$SLURM_LOCALID" = 0 ] && type -P nvidia-smi >/dev/null; then
    spell_said=$(timeout 120 nvidia-smi --list-gpus 2>&1)
    spell_count=$(grep -c "^GPU [0-9]*: " <<< "$spell_said")
    if [ "$spell_count" -lt @GPUS@ ]; then
        echo "$SLURMD_NODENAME" > "$SPELL_RENDEZVOUS/unhealthy-$SLURMD_NODENAME"
        spell_fail 1 "nvidia-smi lists $spell_count of @GPUS@ GPUs: ${spell_said##*$'\\n'}. The job does without this \
node when it is queued again. Tell the administrators."
    fi
fi"""

# Slurm signals every process of a step. Python acts on it; this shell waits, and tells how Python has ended.
_RUN = """\
trap : TERM USR1
@COMMAND@
spell_status=$?
[ $spell_status = 0 ] || spell_fail $spell_status"""


def step_script(site: Site, command: str, gpus: int) -> str:
    """The script of a task of the job.

    Args:
        site: the cluster.
        command: shell text that ends with the command to run.
        gpus: that the node must have before the command runs; 0: any number.
    """
    checks = [_GPUS.replace("@GPUS@", str(gpus))] if gpus else []
    return _lines(_FUNCTIONS, *_environment(site), _PYTHON, *checks, _RUN.replace("@COMMAND@", command))


def local_script(site: Site, command: str) -> str:
    """The script of a run on this machine, whose last command takes the place of the shell."""
    return _lines(_FUNCTIONS, *_environment(site), _PYTHON, command)


def _environment(site: Site) -> list[str]:
    lines = []
    if site.modules:
        lines.append(_MODULES)
    for module in map(shlex.quote, site.modules):
        message = shlex.quote(
            f"`module load {module}` failed. Correct modules in the cluster's file; `module avail` lists what there is."
        )
        lines.append(f"spell_now='`module load`'\nmodule load {module} || spell_fail 2 {message}")
    if site.venv:
        activate = shlex.quote(str(site.venv / "bin" / "activate"))
        missing = shlex.quote(
            f"there is no virtual environment {site.venv}. Correct venv in the cluster's file: a folder that every "
            "node, or the container, sees."
        )
        lines.append(_VENV.replace("@ACTIVATE@", activate).replace("@MISSING@", missing))
    lines.append(_DEFAULTS)
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in site.env.items()]
    if site.setup.strip():
        lines.append(_SETUP.replace("@SETUP@", site.setup.strip()))
    return lines


def _lines(*parts: str) -> str:
    return "\n".join(parts) + "\n"
