#!/bin/bash
# An array of recorded runs that survive the time limit: Slurm sends SIGUSR1 two minutes before it, the recording
# is saved, the job goes back into the queue, and the script goes on from its own checkpoint.
#
#   mkdir -p logs && sbatch examples/slurm.sh      # Slurm makes no folders for its logs
#   farcli fit lfd2 runs/*.zarr -o lfd2.safetensors
#
#SBATCH --job-name=digits
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --output=logs/%A_%a.log
#SBATCH --open-mode=append

# The command runs as a step of its own: Slurm signals steps, and not this shell.
srun --kill-on-bad-exit=0 farcli record -o "runs/{job}-{task}.zarr" --every 20 --seed "$SLURM_ARRAY_TASK_ID" --resume -- \
    python examples/train_digits.py --seed "$SLURM_ARRAY_TASK_ID" --out "ckpts/$SLURM_ARRAY_TASK_ID"
code=$?

# 75: the script itself asks to be run again. 128 + N: signal N ended it (10 SIGUSR1, 15 SIGTERM) after the
# recording was saved.
case $code in
    75 | 138 | 143) scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" ;;
esac
exit $code
