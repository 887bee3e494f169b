#!/usr/bin/env bash
# Runs any rlhf-ray command on whole nodes of a Slurm cluster, and continues it in a new job where the time ends first:
#
#     sbatch --nodes=10 cluster/slurm.sh ppo configs/multi_node.yaml
#
# Submit from the project's folder. That folder with its .venv, `run.dir`, models and data lie on a file system that
# all nodes see. Written for ray 2.60.0.
#SBATCH --job-name=rlhf-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Ray takes whole nodes: symmetric-run refuses a node where Ray runs already.
#SBATCH --exclusive
# 15 minutes before the end, to this script alone (B:): the signal would end Ray itself, with every actor in it, before
# a checkpoint could be written. Allow for the longest step and the checkpoint after it.
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($# == 0)); then
    printf 'slurm.sh: no rlhf-ray command given; append one, such as: ppo configs/one_node.yaml\n' >&2
    exit 2
fi
source .venv/bin/activate

# Nobody without the token can run code on the nodes. The home folder is shared, so all of them read the same one.
umask 077
export RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null

# An address, because a node's own name may resolve to its loopback interface, and then it does not know that it is
# the head. This script runs on the first node.
address=$(hostname -I | awk '{print $1}'):$((20000 + SLURM_JOB_ID % 10000))
pid_file=$(mktemp)
trap 'rm -f "$pid_file"' EXIT

# The default, 30 s, is short for nodes that read their Python from a shared file system.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# On every node: start Ray, on the first one run the command, stop Ray. Without the CPU options the one task of a node
# would be bound to one core.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- \
    bash -c 'echo $$ >"$0"; RAY_ADDRESS=auto exec rlhf-ray "$@"' "$pid_file" "$@" &
step=$!

# rlhf-ray answers SIGTERM with a checkpoint and exit code 143. Before it runs there is nothing to keep, and where it
# has just ended by itself there is nothing to continue.
time_is_up=no
end_run() {
    local process=$step
    [[ -s $pid_file ]] && process=$(<"$pid_file")
    if kill -TERM "$process"; then time_is_up=yes; fi
}
trap end_run USR1

# The signal interrupts `wait`, so wait until the step is gone.
status=0
while [[ -n $(jobs -pr) ]]; do
    status=0
    wait "$step" || status=$?
done

if [[ $time_is_up == yes ]]; then
    printf 'slurm.sh: time is up (rlhf-ray ended with code %d); the job is queued again and continues\n' "$status" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
