#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice; goes on by itself after an error of a machine or a preemption.
#
# Run it on your own machine, where gcloud is logged in, with these set:
#   export TPU=NAME ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base
#   export NFS=10.0.0.2:/share            # a Filestore share in the slice's network: runs
#   export BUCKET=NAME                    # latents and weights of others; "" for none
#   export SOURCE=https://github.com/YOU/ant-jax.git
#   export ARGS="--config configs/imagenet256_dit_l2.py:uncertainty,snr --workdir /mnt/nfs/runs/dit_l2
#       --config.autoencoder.weights=/mnt/bucket/VAE.safetensors --config.autoencoder.latents=/mnt/bucket/LATENTS"
#
#   tpu_slice.sh create     asks for the slice (SPOT=1 for a cheap one that may be taken away) and waits for it
#   tpu_slice.sh setup      installs on every worker and mounts the disks; safe to repeat
#   tpu_slice.sh start      starts training on every worker where it does not run yet
#   tpu_slice.sh logs       the last lines of every worker; the whole log is in ~/ant-jax.log of each
#   tpu_slice.sh fetch DIR  copies every worker's log
#   tpu_slice.sh stop       saves the step and stops
#   tpu_slice.sh watch      all of it, for days: makes the slice anew whenever it is taken away
#   tpu_slice.sh delete     gives the slice back
#
# For latents, samples or figures put --mode encode, sample or evaluate into ARGS.

set -euo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
fi
: "${TPU:?}" "${ZONE:?}"
gcloud_tpu() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_workers() { gcloud_tpu tpu-vm ssh "$TPU" --worker=all --command="$1"; }
state() { gcloud_tpu tpu-vm describe "$TPU" --format='value(state)' 2>/dev/null || echo NONE; }

create() {
    local spot=()
    [ -z "${SPOT:-}" ] || spot=(--spot)
    gcloud_tpu queued-resources create "$TPU" --node-id="$TPU" --accelerator-type="${TYPE:?}" \
        --runtime-version="${VERSION:?}" "${spot[@]}" || return
    until [ "$(state)" = READY ]; do
        echo "waiting for $TPU: $(state)"
        sleep 60
    done
}

setup() {
    # What is between the quotes of END runs on each worker; the settings come first.
    on_workers "$(printf 'NFS=%q BUCKET=%q SOURCE=%q\n' "${NFS:?}" "${BUCKET-}" "${SOURCE:?}")
$(cat <<'END'
set -euo pipefail
sudo apt-get update -qq
sudo apt-get install -qq -y nfs-common git python3-pip
sudo mkdir -p /mnt/nfs
mountpoint -q /mnt/nfs || sudo mount -t nfs "$NFS" /mnt/nfs
# A bucket that is mounted is closed to everybody else, root too.
if [ -n "$BUCKET" ] && ! mountpoint -q /mnt/bucket; then
    sudo mkdir -p /mnt/bucket
    sudo chown "$(id -un)" /mnt/bucket
    command -v gcsfuse >/dev/null || {
        echo "install gcsfuse first: cloud.google.com/storage/docs/cloud-storage-fuse/install" >&2
        exit 1
    }
    gcsfuse --implicit-dirs "$BUCKET" /mnt/bucket
fi
[ -d ~/ant-jax ] || git clone -q "$SOURCE" ~/ant-jax
cd ~/ant-jax && git pull -q --ff-only
# The images have an older Python than is needed; uv brings one.
python3 -m pip install -q --user uv
[ -d .venv ] || ~/.local/bin/uv venv -q --python 3.12 .venv
~/.local/bin/uv pip install -q -e '.[tpu,tfds]'
cat >~/ant-jax-loop.sh <<'LOOP'
# One worker: starts again after an error, unless three in a row came within ten minutes each.
cd ~/ant-jax || exit 1
child='' stop='' quick=0
trap 'stop=1; [ -z "$child" ] || kill -TERM "$child"' TERM
while [ -z "$stop" ] && [ "$quick" -lt 3 ]; do
    began=$SECONDS
    .venv/bin/python -u -m ant_jax.main --distributed "$@" &
    child=$!
    wait "$child" && status=0 || status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done
    echo "$(date -Is) ended with status $status"
    [ "$status" -ne 0 ] || exit 0
    if [ $((SECONDS - began)) -lt 600 ]; then quick=$((quick + 1)); else quick=0; fi
    sleep 20
done
echo "given up with status $status"
LOOP
END
)"
}

start() {
    : "${ARGS:?}"
    # The loop outlives the connection. A worker that was restarted has lost its disks: setup first.
    on_workers "mountpoint -q /mnt/nfs && [ -f ~/ant-jax-loop.sh ] || exit 1
kill -0 \"\$(cat ~/ant-jax.pid 2>/dev/null)\" 2>/dev/null && exit
echo \"\$(date -Is) started\" >>~/ant-jax.log
nohup setsid bash ~/ant-jax-loop.sh $(tr '\n' ' ' <<<"$ARGS") >>~/ant-jax.log 2>&1 </dev/null &
echo \$! >~/ant-jax.pid"
}

logs() { on_workers 'hostname; tail -n 5 ~/ant-jax.log'; }

fetch() {
    mkdir -p "$1"
    local workers worker
    workers=$(gcloud_tpu tpu-vm describe "$TPU" --format='value(networkEndpoints.len())')
    for ((worker = 0; worker < workers; worker++)); do
        gcloud_tpu tpu-vm scp "$TPU:ant-jax.log" "$1/worker-$worker.log" --worker="$worker"
    done
}

# shellcheck disable=SC2016
stop() { on_workers 'kill -TERM "$(cat ~/ant-jax.pid)"'; }

delete() { gcloud_tpu queued-resources delete "$TPU" --force; }

watch() {
    local last
    while true; do
        case $(state) in
        READY)
            last=$(on_workers 'tail -n 1 ~/ant-jax.log' || true)
            case $last in
            *"status 0"*) echo "done, or stopped" && return ;;
            *"given up"*) echo "see the logs" && return 1 ;;
            esac
            # Where it runs already, start does nothing.
            start || { setup && start; } || echo "a worker does not answer"
            ;;
        NONE) { create && setup && start; } || echo "not yet" ;;
        PREEMPTED | TERMINATED) delete || echo "not yet" ;;
        esac
        sleep 300
    done
}

case $1 in
create | setup | start | logs | stop | watch | delete) "$1" ;;
fetch) fetch "${2:?where to?}" ;;
*)
    echo "unknown: $1; without arguments this script explains itself" >&2
    exit 1
    ;;
esac
