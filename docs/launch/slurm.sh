#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster; goes on by itself after a time limit or a preemption.
#
#   export RUN=/shared/runs/dit_l2      # the workdir, on a disk that all nodes share
#   sbatch --nodes=2 --gpus-per-node=8 docs/launch/slurm.sh \
#       --config configs/imagenet256_dit_l2.py:uncertainty,snr --config.autoencoder.weights=/shared/VAE.safetensors \
#       --config.autoencoder.latents=/shared/LATENTS
#   tail -f ant-jax-JOBID.log           # all processes; each line begins with the number of its process
#   scancel --signal=TERM JOBID         # saves and stops; sbatch the same line to go on
#   scancel JOBID                       # stops; what came after the last checkpoint is lost
#
# Submit it in the folder of the repository, which lies on the shared disk too, with its
# environment in .venv ('pip install -e .[cuda13,tfds]'). The arguments are those of python -m ant_jax.main;
# MODE=encode, sample or evaluate does that instead of training. Options after sbatch
# override those below; add your partition and account.

#SBATCH --job-name=ant-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Preempted, or on a node that fails, the job goes back into the queue.
#SBATCH --requeue
# Ten minutes before the time limit this script, and it alone, is told.
#SBATCH --signal=B:USR1@600

set -euo pipefail
: "${RUN:?export RUN=DIR, the workdir, on a disk that all nodes share}"
mode=${MODE:-train}

limit=
trap 'limit=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# A preemption tells the tasks, which save the step and end; this shell waits for them.
trap : TERM

# One task a node, with all of its GPUs; one that fails ends the others.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
    .venv/bin/python -u -m ant_jax.main --distributed --workdir "$RUN" --mode "$mode" "$@" &
tasks=$!
status=0
wait "$tasks" || status=$?
while kill -0 "$tasks" 2>/dev/null; do # A signal has ended the wait, not the tasks.
    status=0
    wait "$tasks" || status=$?
done

# Training that was asked to stop ends with status 0, as training that is done; the other modes are
# ended by the signal, and go on with what they have finished.
if [ -n "$limit" ]; then
    steps=$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["num_steps"])' \
        "$RUN/config.json" || echo none)
    if [ "$mode" != train ] || [ ! -d "$RUN/checkpoints/$steps" ]; then
        echo "time limit: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
