"""What a job runs, as shell text: its batch script and its steps. It knows nothing of NeMo-Run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from spell_megatron.config.reading import to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.jobs import step
from spell_megatron.jobs.site import Site
from spell_megatron.processes.rendezvous import ENDED, NODES
from spell_megatron.ranks import LAUNCHER_VARIABLES

MAX_FRUITLESS = 3
"""How often in a row a job is queued again after a start that made neither a checkpoint nor a validation. Starts that
preemption has ended do not count."""

_END = "END_OF_SPELL_CONFIG"

_FORGET = f"unset {' '.join(LAUNCHER_VARIABLES)} ${{!PYTHON@}}"
"""What a shell that submits a job may hold of other programs. Slurm passes its whole environment to the job."""

# Run when the batch script ends, in whatever way: well, with a fault that the user must correct (2), by SIGINT (130),
# by SIGTERM (143), or because a process failed. A job that ends within its time of grace Slurm does not queue again by
# itself.
_ENDING = """\
spell_made() { cat @RUN@/checkpoints/latest; grep -c '"validation/pass@1"' @RUN@/metrics.jsonl; } 2>/dev/null
spell_end() {
    code=$?
    trap - EXIT
    set +ex
    if [ $code != 0 ] && [ -e "$SPELL_RENDEZVOUS/failed" ]; then read -r code < "$SPELL_RENDEZVOUS/failed"; fi
    bad=$(cat "$SPELL_RENDEZVOUS"/unhealthy-* 2>/dev/null | paste -sd,)
    touch "$SPELL_RENDEZVOUS/@ENDED@"  # `spell engines` waits for it
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    [[ $job != *PreemptTime=[0-9]* ]] || preempted=yes
    again=
    case $code in
        0 | 2 | 130) ;;
        143) again=$preempted ;;
        *) again=yes ;;
    esac
    if [ -e "$SPELL_RENDEZVOUS/requeue" ]; then again=yes; fi
    if [ -e @RUN@/stop ]; then again=; fi
    if [[ $job != *JobState=RUNNING* ]]; then again=; fi  # scancel or the limit has ended it
    if [ -z "$again" ]; then exit $code; fi
    tries=0
    if [ "$(spell_made)" = "$spell_began" ]; then tries=$(cat "$spell_tries" 2>/dev/null || echo 0); fi
    if [ "$(spell_made)" = "$spell_began" ] && [ -z "$preempted" ]; then tries=$((tries + 1)); fi
    echo $tries > "$spell_tries"
    if [ $tries -gt @MAX@ ]; then
        refused="it started $tries times without a new checkpoint or validation. If starts end at the time limit, \
raise time in the cluster's file; otherwise the logs say why they end"
    elif [[ $job == *" Requeue=0 "* ]]; then
        refused="sbatch has no_requeue"
    else
        trap '' TERM  # by which Slurm ends this script
        refused=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && refused=
        if [ -z "$refused" ] && [ -n "$bad" ]; then
            without=$(sed -n 's/.* ExcNodeList=\\([^( ]*\\).*/\\1/p' <<< "$job" | head -n1)
            scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${without:+$without,}$bad"
        fi
    fi
    latest=$(cat @RUN@/checkpoints/latest 2>/dev/null)
    if [ -z "$refused" ]; then
        echo "The job is queued again, to go on from ${latest:+checkpoint }${latest:-the beginning}."
    else
        echo "The job is not queued again: $refused.${latest:+ Continue the run with --resume.}"
    fi
    exit $code
}
# Links the logs of the job's steps to the folder that has the logs of the engines.
spell_log=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* StdOut=\\([^ ]*\\).*/\\1/p' | head -n1)
mkdir -p @RUN@/logs && ln -sfn "$(dirname "$spell_log")" @RUN@/logs/job-$SLURM_JOB_ID
# NeMo-Run calls sbatch --requeue, which is stronger than this line.
if grep -q '^#SBATCH --no-requeue' "$0"; then scontrol update "JobId=$SLURM_JOB_ID" Requeue=0; fi
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e @RUN@/stop ]; then
    echo "The run does not start again: it was asked to stop."
    exit 0
fi
spell_began=$(spell_made)
spell_tries=@RUN@/jobs/$SLURM_JOB_ID.failures
trap : USR1  # `scancel --full --signal=USR1` means the steps
trap spell_end EXIT"""


@dataclass(frozen=True)
class Step:
    """One `srun` of the job."""

    name: str
    script: str
    """What each of its tasks runs."""
    nodes: int
    tasks_per_node: int
    first_node: int


def steps(site: Site, config: Config, resume: bool) -> list[Step]:
    """The trainer, and the engines if they have processes of their own; the job ends with the trainer."""
    nodes, engines = site.trainer_nodes, site.nodes if site.colocated else site.engine_nodes
    per_node = config.training.parallel.processes // nodes
    train = _train(config, engines, resume)
    trainer = Step("trainer", step.step_script(site, train, _gpus(site, config)), nodes, per_node, 0)
    if not engines:
        return [trainer]
    serve = _engines(engines) + (" --colocated" if site.colocated else "")
    script = step.step_script(site, serve, _gpus(site, config, engines=True))
    return [trainer, Step("engines", script, engines, 1, 0 if site.colocated else nodes)]


def _gpus(site: Site, config: Config, engines: bool = False) -> int:
    """GPUs that each node of a step must have; 0 on CPUs."""
    return 0 if config.run.device == "cpu" else site.gpus_of(engines)[1]


def local_script(site: Site, config: Config, resume: bool) -> str:
    """The run without Slurm: one process, which starts the others itself."""
    folder = f"{_run_folder(config)}/jobs/local.$$"
    train = 'exec python -m spell_megatron train --config "$SPELL_RENDEZVOUS/config.yaml"'
    command = f"{_prepare(config, folder)}\n{train}{' --resume' if resume else ''}"
    return f"{_FORGET}\n{step.local_script(site, command)}"


def prologue(config: Config) -> str:
    """Commands of the batch script, on the job's first node and outside of containers, before the steps.

    They make the folder in which the processes find each other, a new one for each start of the job, and leave
    the run's settings and the addresses of the nodes there. And they see to it that a job that was asked to stop, or
    failed, is queued again (see docs/cluster.md).
    """
    folder = f"{_run_folder(config)}/jobs/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
    # By NeMo-Run's SLURM_UNBUFFEREDIO srun gives its tasks a terminal, and logs fill with the frames of progress bars.
    # By --gpus-per-task srun would show each task a share of the node's GPUs. All processes of a step see all of them.
    unset = f"unset SLURM_UNBUFFEREDIO SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK CUDA_VISIBLE_DEVICES\n{_FORGET}"
    both = "$SLURM_JOB_NODELIST${SLURM_JOB_NODELIST_HET_GROUP_1:+,$SLURM_JOB_NODELIST_HET_GROUP_1}"
    nodes = f'scontrol --oneliner show node "{both}" > "$SPELL_RENDEZVOUS/{NODES}.tmp" || exit 1\n{_appears(NODES)}'
    ending = (
        _ENDING.replace("@RUN@", _run_folder(config)).replace("@MAX@", str(MAX_FRUITLESS)).replace("@ENDED@", ENDED)
    )
    return f"{unset}\n{_prepare(config, folder)}\n{nodes}\n{ending}"


# The submitting machine may just have made the run's folder, so that it can neither be made nor seen here yet.
_MAKE_FOLDER = """\
spell_looks=0
until mkdir -p "$(dirname "$SPELL_RENDEZVOUS")"; do
    spell_looks=$((spell_looks + 1))
    [ $spell_looks -le 60 ] || exit 1
    sleep 2
done"""


def _prepare(config: Config, folder: str) -> str:
    return "\n".join(
        [
            f"export SPELL_RENDEZVOUS={folder}",
            _MAKE_FOLDER,
            'mkdir -m 700 "$SPELL_RENDEZVOUS" || exit 1',
            f"cat > \"$SPELL_RENDEZVOUS/config.yaml.tmp\" <<'{_END}' || exit 1",
            to_yaml(config) + _END,
            _appears("config.yaml"),
        ]
    )


def _appears(name: str) -> str:
    """Gives a file of the rendezvous its name when it is complete: other nodes see all of it or nothing."""
    return f'mv "$SPELL_RENDEZVOUS/{name}.tmp" "$SPELL_RENDEZVOUS/{name}" || exit 1'


def _run_folder(config: Config) -> str:
    return shlex.quote(str(config.run.output_dir / config.run.name))


def _train(config: Config, engine_nodes: int, resume: bool) -> str:
    again = f'[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && [ -e {_run_folder(config)}/checkpoints/latest ]'
    return "\n".join(
        [
            f"resume={'--resume' if resume else ''}",
            f"if {again}; then resume=--resume; fi",
            'python -m spell_megatron train --config "$SPELL_RENDEZVOUS/config.yaml" '
            f'--rendezvous "$SPELL_RENDEZVOUS" --engine-nodes {engine_nodes} $resume',
        ]
    )


def _engines(nodes: int) -> str:
    return (
        'python -m spell_megatron engines --config "$SPELL_RENDEZVOUS/config.yaml" '
        f'--rendezvous "$SPELL_RENDEZVOUS" --engine-nodes {nodes}'
    )
