#!/usr/bin/env bash
# Trains an experiment on all hosts of a Cloud TPU slice, from your own machine.
#
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_pod.sh \
#     experiments/byte_lm.py --workdir gs://my-bucket/run --mesh.fsdp 8
#
# The slice must exist. This copies the last commit to each host, installs it,
# and runs `train` with the words given, on every host at once; the hosts find
# each other by the slice's own metadata. FILE is relative to the repository,
# and the run directory must be a place that all hosts see. The same command
# goes on from the last checkpoint. PROJECT is optional; INSTALL=0 uses what an
# earlier call has installed.
set -euo pipefail

usage() {
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 1 ] && [ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] || usage
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -f "$1" ] || { printf 'no experiment file %q\n' "$1" >&2; exit 2; }

where=(--zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"
}

if [ "${INSTALL:-1}" = 1 ]; then
  bundle=$(mktemp -d)
  trap 'rm -rf "$bundle"' EXIT
  git archive --prefix=deepseek-jax/ --output="$bundle/deepseek-jax.tar" HEAD
  gcloud compute tpus tpu-vm scp "$bundle/deepseek-jax.tar" "$TPU:" "${where[@]}"
  on_every_host "tar -xf deepseek-jax.tar && cd deepseek-jax && \
python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
fi

# `ssh` hands one string to a shell: every word must survive that.
on_every_host "cd deepseek-jax && exec .venv/bin/python -m deepseek_jax.cli \
train $(printf '%q ' "$@")"
