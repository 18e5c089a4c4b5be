#!/usr/bin/env bash
# Set up one machine of a cluster, rented or owned, head or worker. `ray up` runs this on each machine; running it again
# does no harm.
#
#   FLEXIFED_SHARED    folder that all machines see under this path: results, and the versions that were installed
#   FLEXIFED_NFS       where the shared folder comes from. Empty: it is there already. head: the head exports it.
#                      SERVER:/PATH: an NFS server, such as fs-0123.efs.us-west-2.amazonaws.com:/ (EFS)
#   FLEXIFED_DOWNLOAD  yes: download the data sets to this machine, once. no: they are there, or runs use a stand-in.
#                      Names, such as "cifar10 agnews": download only these
set -euo pipefail

: "${FLEXIFED_SHARED:?name a folder that all machines see}"
nfs=${FLEXIFED_NFS:-}
project=$HOME/flexifed
venv=$HOME/.venvs/flexifed
data=$HOME/flexifed-data

# The first automatic upgrades of a new machine may hold apt's lock for some minutes.
packages() {
  sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -y install "$@"
}

# The shared folder. Ray sets RAY_HEAD_IP on workers only.
if [ "$nfs" = head ] && [ -z "${RAY_HEAD_IP:-}" ]; then
  packages nfs-kernel-server
  sudo mkdir -p "$FLEXIFED_SHARED"
  sudo chown "$(id -u):$(id -g)" "$FLEXIFED_SHARED"
  # The firewall keeps others out: only machines in the cluster's own security group can reach this export. `insecure`
  # admits ports above 1023, which mounts with `noresvport` use.
  sudo mkdir -p /etc/exports.d
  echo "$FLEXIFED_SHARED *(rw,sync,no_subtree_check,insecure)" | sudo tee /etc/exports.d/flexifed.exports >/dev/null
  sudo exportfs -ra
elif [ -n "$nfs" ] && ! mountpoint -q "$FLEXIFED_SHARED"; then
  [ "$nfs" = head ] && nfs=$RAY_HEAD_IP:$FLEXIFED_SHARED
  packages nfs-common
  sudo mkdir -p "$FLEXIFED_SHARED"
  sudo mount -t nfs4 -o nfsvers=4.1,hard,noresvport "$nfs" "$FLEXIFED_SHARED"
  [ -w "$FLEXIFED_SHARED" ] || sudo chown "$(id -u):$(id -g)" "$FLEXIFED_SHARED" # a new EFS belongs to root
fi
if ! mkdir -p "$FLEXIFED_SHARED/results" "$FLEXIFED_SHARED/versions"; then
  echo "setup.sh: $(hostname) can't write to $FLEXIFED_SHARED; mount it there, or name another FLEXIFED_SHARED" >&2
  exit 1
fi

# Install the project as on a laptop: by uv, into an environment of its own. The first machine decides which of the
# versions that pyproject.toml allows are installed, and all others install the same, because other versions may mean
# other bits. The same holds for Python, whose version Ray requires to be equal on all machines, to the last digit.
export PATH="$HOME/.local/bin:$PATH"
if ! command -v uv >/dev/null; then
  PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --user uv ||
    curl -LsSf https://astral.sh/uv/install.sh | sh
fi
versions=$FLEXIFED_SHARED/versions/$(sha256sum "$project/pyproject.toml" | cut -c1-16).txt
python=
[ ! -e "$versions" ] || python=$(sed -n 's/^# python //p' "$versions")
uv venv --quiet --allow-existing --python "${python:->=3.11}" "$venv"
if [ -e "$versions" ]; then
  uv pip install --quiet --python "$venv" --constraint "$versions" --editable "$project[aws]"
else
  uv pip install --quiet --python "$venv" --editable "$project[aws]"
  {
    sed -n 's/^version_info = /# python /p' "$venv/pyvenv.cfg"
    uv pip freeze --quiet --python "$venv" --exclude-editable
  } >"$versions.$$"
  mv "$versions.$$" "$versions"
fi

# Ray would count a GPU that PyTorch can't use, and every cell there would fail.
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q . &&
  ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "setup.sh: PyTorch can't use the GPU of $(hostname); its CUDA needs an NVIDIA driver of release 580 or later," \
    "here is $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)" >&2
  exit 1
fi

# The environment of Ray's processes and of every login. The token in ~/.ray/auth_token came with the files. `ray job
# stop` kills after RAY_JOB_STOP_WAIT_TIME_S; before that, a run finishes its round and writes a checkpoint.
cat >"$HOME/.flexifed.sh" <<END
export PATH="$venv/bin:\$HOME/.local/bin:\$PATH"
export FLEXIFED_DATA_DIR="$data"
export FLEXIFED_RESULTS_DIR="$FLEXIFED_SHARED/results"
export RAY_AUTH_MODE=token
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1
export RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S=600
END
line='. "$HOME/.flexifed.sh"'
grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || echo "$line" >>"$HOME/.bashrc"

mkdir -p "$data"
case ${FLEXIFED_DOWNLOAD:-no} in
  no) ;;
  yes) "$venv/bin/flexifed" data --data-dir "$data" --download ;;
  *) "$venv/bin/flexifed" data --data-dir "$data" --download --only $FLEXIFED_DOWNLOAD ;; # a word for each set
esac
echo "setup.sh: $(hostname) is ready"
