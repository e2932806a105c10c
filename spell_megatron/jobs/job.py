"""What a job runs, as shell text: its batch script and its steps. It knows nothing of NeMo-Run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from spell_megatron.config.reading import to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.jobs import step
from spell_megatron.jobs.site import Site
from spell_megatron.processes.rendezvous import NODES
from spell_megatron.ranks import LAUNCHER_VARIABLES

MAX_FRUITLESS = 3
"""How often in a row a job that failed is queued again without having made a checkpoint since."""

_END = "END_OF_SPELL_CONFIG"

_FORGET = f"unset {' '.join(LAUNCHER_VARIABLES)} ${{!PYTHON@}}"
"""What a shell that submits a job may hold of other programs. Slurm passes its whole environment to the job."""

# Run when the batch script ends, in whatever way: well, with a fault that the user must correct (2), by SIGTERM (143),
# or because a process failed. A job that ends within its time of grace Slurm does not queue again by itself.
_ENDING = """\
spell_end() {
    code=$?
    trap - EXIT
    set +ex
    if [ $code != 0 ] && [ -e "$SPELL_RENDEZVOUS/failed" ]; then read -r code < "$SPELL_RENDEZVOUS/failed"; fi
    bad=$(cat "$SPELL_RENDEZVOUS"/unhealthy-* 2>/dev/null | paste -sd,)
    checkpoint() { cat @RUN@/checkpoints/latest 2>/dev/null; }
    tries=0
    if [ "$(checkpoint)" = "$spell_began" ]; then tries=$(($(cat "$spell_tries" 2>/dev/null || echo 0) + 1)); fi
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    again=
    case $code in
        0 | 2) ;;
        143) [[ $job != *PreemptTime=[0-9]* ]] || again=yes ;;
        *) again=yes; [ $tries -le @MAX@ ] || again=; echo $tries > "$spell_tries" ;;
    esac
    if [ -e "$SPELL_RENDEZVOUS/requeue" ]; then again=yes; fi
    if [ -n "$again" ] && [[ $job == *JobState=RUNNING* ]]; then  # neither scancel nor the limit has ended it
        echo "The job is queued again, to go on from checkpoint $(checkpoint)."
        trap '' TERM  # by which Slurm ends this script
        scontrol requeue "$SLURM_JOB_ID"
        if [ -n "$bad" ]; then
            without=$(sed -n 's/.* ExcNodeList=\\([^( ]*\\).*/\\1/p' <<< "$job" | head -n1)
            scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${without:+$without,}$bad"
        fi
    elif [ $tries -gt @MAX@ ]; then
        echo "The job failed $tries times without a new checkpoint: it is not queued again."
    fi
    exit $code
}
# Links the logs of the job's steps to the folder that has the logs of the engines.
spell_log=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* StdOut=\\([^ ]*\\).*/\\1/p' | head -n1)
mkdir -p @RUN@/logs && ln -sfn "$(dirname "$spell_log")" @RUN@/logs/job-$SLURM_JOB_ID
spell_began=$(cat @RUN@/checkpoints/latest 2>/dev/null)
spell_tries=@RUN@/jobs/$SLURM_JOB_ID.failures
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
    ending = _ENDING.replace("@RUN@", _run_folder(config)).replace("@MAX@", str(MAX_FRUITLESS))
    return f"{unset}\n{_prepare(config, folder)}\n{nodes}\n{ending}"


def _prepare(config: Config, folder: str) -> str:
    return "\n".join(
        [
            f"export SPELL_RENDEZVOUS={folder}",
            'mkdir -p "$(dirname "$SPELL_RENDEZVOUS")" && mkdir -m 700 "$SPELL_RENDEZVOUS" || exit 1',
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
