#!/bin/bash
# Train on SLURM for as long as it takes:
#   sbatch --nodes=4 --time=24:00:00 scripts/slurm.sh +experiment=osp_1b run.name=big
# Two minutes before the time is up, or when SLURM makes room for another job, every rank is signalled; the run saves and
# ends, and this script puts the job back into the queue. The next job continues it: the command is the same.
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
trap : TERM USR1 # the ranks obey these; this shell waits for them

folder=$(python scripts/train.py "$@" --cfg job --resolve --package run | sed -n 's/^dir: //p')
marker="$folder/stopped.json"
rm -f "$marker" # of the job before: what it says must be about this one

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

status=0
# A rank that was asked to stop exits with a status that is not 0, which must not kill those still writing.
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python scripts/train.py "$@"' train "$@" || status=$?

reason=none
if [[ -f $marker ]]; then
    reason=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["reason"])' "$marker")
fi
echo "job $SLURM_JOB_ID: $folder stopped: $reason (exit status $status)"
case $reason/$status in
    # 138: USR1 came before the first step, while the text was prepared say, and nothing was to be saved
    SIG*/* | none/138) scontrol requeue "$SLURM_JOB_ID" ;;
    complete/* | train.stop_at/*) ;;
    *) exit "$((status ? status : 1))" ;;
esac
