#!/usr/bin/env bash
# Joins this host to a job of several, and starts a rank on each of its GPUs (or CPU cores).
# Run it on every host, from the repository, with the same arguments: a folder that all hosts
# share, as each rank writes its slices of a checkpoint there, and what else the example takes.
# A job that has checkpoints there goes on from the newest.
#
#   HOSTS=2 RENDEZVOUS=first-host:29400 configs/start_host.sh /shared/runs/hosts --epochs 8
#
#   HOSTS           how many hosts
#   RENDEZVOUS      the name and a free port of one of them, where they meet
#   JOB             an id that tells jobs at one rendezvous apart
#   RANKS_PER_HOST  a number instead
set -euo pipefail

out=${1:?a folder that all hosts share}
shift
if [[ -e $out/checkpoints ]]; then
  set -- --resume "$out/checkpoints" "$@"
fi

exec torchrun \
  --nnodes "${HOSTS:?how many hosts}" \
  --nproc-per-node "${RANKS_PER_HOST:-auto}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${RENDEZVOUS:?host:port where they meet}" \
  --rdzv-id "${JOB:-adadelta}" \
  examples/train_torchrun.py --out "$out" "$@"
