#!/bin/bash
# Train on SLURM in as many jobs as the run needs:
#   sbatch --nodes=4 --time=24:00:00 scripts/slurm.sh +experiment=osp_1b run.name=big
# Two minutes before the time limit or a preemption, SLURM signals every rank. The run saves its state and ends, and this
# script requeues the job, which continues the run with the same command.
#SBATCH --job-name=osp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To the ranks, not to this shell (that would be B:USR1); raise 120 if the run warns at its start that a save takes longer
#SBATCH --signal=USR1@120

# One task per GPU, and every task sees all GPUs of its host: do not add --gpus-per-task.
# The environment must be active where sbatch is called, or be activated here.
set -euo pipefail
trap : TERM USR1 # the ranks handle these signals; this shell waits for the ranks

folder=$(python scripts/train.py "$@" --cfg job --resolve --package run | sed -n 's/^dir: //p')
marker="$folder/stopped.json"
rm -f "$marker" # of an earlier job

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

status=0
# A stopped rank exits with a status other than 0, which must not kill ranks that are still writing.
# shellcheck disable=SC2016  # each task expands the variables
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python scripts/train.py "$@"' train "$@" || status=$?

reason=none
if [[ -f $marker ]]; then
    reason=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["reason"])' "$marker")
fi
echo "job $SLURM_JOB_ID: $folder stopped: $reason (exit status $status)"
case $reason/$status in
    # 138: USR1 arrived before the first step, e.g. while the text was prepared, and there was nothing to save
    SIG*/* | none/138) scontrol requeue "$SLURM_JOB_ID" ;;
    complete/* | train.stop_at/*) ;;
    *) exit "$((status ? status : 1))" ;;
esac
