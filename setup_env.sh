#!/usr/bin/env bash
# The project's Python environment, made or updated first when needed:
#
#   ./setup_env.sh CMD ARG...    run CMD inside it
#   ./setup_env.sh               only set it up
#   source setup_env.sh          activate it in this shell (bash or zsh)
#   ./setup_env.sh --container   on a cluster: make it in the overlay of the container that jobs run in
#
#   VENV=DIR             its folder (default: .venv next to this file)
#   PYTHON=python3.12    what to make it with (default: python3 or python3.14 to 3.10, the first that will do)
#   TORCH_INDEX_URL=URL  where torch and torchvision come from (default: chosen for the GPU's driver)
#   IMAGE=FILE OVERLAY=FILE  the container (default: the cluster's CUDA 12.6 image, 25 GB overlay, in /scratch)

[ -n "${BASH_VERSION:-}${ZSH_VERSION:-}" ] || exec bash "$0" "$@" # called as "sh setup_env.sh"
if [ -n "${ZSH_VERSION:-}" ] || [ "${BASH_SOURCE[0]}" != "$0" ]; then
  # sourced: a child does the work, so that this shell keeps its options and survives a failure
  VENV=${VENV:-} bash "${BASH_SOURCE[0]:-$0}" || return 1
  # shellcheck disable=SC1091 # the file does not exist yet
  . "${VENV:-$(dirname "$(readlink -f "${BASH_SOURCE[0]:-$0}")")/.venv}/bin/activate"
  return
fi

set -u
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER # a cluster's modules may set them
script=$(readlink -f "${BASH_SOURCE[0]}") # the file itself, not a link to it
requirements=${script%/*}/requirements.txt
VENV=${VENV:-${script%/*}/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV

say() { echo "setup_env: $*" >&2; } # stdout belongs to CMD
fail() { say "$@"; exit 1; }

# What the environment is made from. A copy is written into it last: without one, it is incomplete.
# The folder's path is included because an environment that was moved or copied no longer works.
stamp() { printf '%s\n' "$index" "$version" "$(cd "$VENV" && pwd -P)" "$(cat "$requirements")"; }

# Complete and up to date? Quick, because "python -V" answers before the interpreter starts.
# An environment keeps its wheels and its Python until a variable asks for others.
current() {
  { read -r index && read -r version; } 2>/dev/null <"$VENV/.stamp" &&
    [ "${TORCH_INDEX_URL:-$index}" = "$index" ] &&
    [ "$("$VENV/bin/python" -V 2>&1)" = "$version" ] &&
    [ "$("${PYTHON:-$VENV/bin/python}" -V 2>&1)" = "$version" ] &&
    [ "$(stamp)" = "$(cat "$VENV/.stamp")" ]
}

find_python() { # sets python and version
  local candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10) trouble='' made_with
  # first the one that this environment has been made with
  made_with=$("$VENV/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null) &&
    candidates=("$made_with" "${candidates[@]}")
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  PATH=${PATH//"$VENV/bin:"/} # while this environment is active, its own python must not rebuild it
  for python in "${candidates[@]}"; do
    version=$("$python" -V 2>&1) || continue
    if [[ ! $version =~ ^Python\ 3\.[1-9][0-9] ]]; then
      trouble=${trouble:-"$python is $version, too old"}
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      trouble=${trouble:-"$python has no venv module (Debian, Ubuntu: apt install python3-venv)"}
    else
      return
    fi
  done
  fail "${trouble:-no ${PYTHON:-python3} found}: install Python 3.10 or newer, or set PYTHON=/path/to/python3"
}

# The wheels' CUDA must not be too new for the driver, and must still support the GPU:
# - CUDA 13 runs on drivers from 580 on, CUDA 12 from 525, CUDA 11 from 450, whatever the minor version
#   (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html)
# - torch on PyPI has CUDA 13 since 2.11, for GPUs of compute capability 7.5 and up; PyTorch's own indexes
#   have cu126 up to torch 2.14 (5.0 to 9.0), cu128 up to 2.11 (Blackwell too), cu118 up to 2.7
#   (github.com/pytorch/pytorch: RELEASE.md, issues 190355 and 190385)
choose_index() { # sets index
  local gpu driver capability=8.0 wheels before why="no NVIDIA driver found; they run on the CPU too"
  before=$(head -n 1 "$VENV/.stamp" 2>/dev/null)
  # prints "550.54.15, 8.9"; an old nvidia-smi does not know compute_cap, and its plain output has to do
  gpu=$({ nvidia-smi --query-gpu=driver_version,compute_cap --format=csv || nvidia-smi; } 2>/dev/null)
  index=PyPI
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    index=$TORCH_INDEX_URL why="TORCH_INDEX_URL"
  elif [ -n "$before" ]; then
    index=$before why="as before"
  elif [[ $gpu =~ ([0-9]{3})\.[0-9] ]]; then
    driver=${BASH_REMATCH[1]}
    [[ $gpu =~ ,\ ([0-9]+\.[0-9]) ]] && capability=${BASH_REMATCH[1]}
    why="driver $driver, compute capability $capability; PyPI's CUDA 13 needs 580 and 7.5"
    if ((driver < 580 || ${capability/./} < 75)); then
      wheels=cu126
      ((${capability/./} < 100)) || wheels=cu128
      ((driver >= 525)) || wheels=cu118
      ((driver >= 450)) || wheels=cpu
      index=https://download.pytorch.org/whl/$wheels
    fi
  fi
  say "torch wheels from $index ($why)"
}

lock() {
  exec 9>>"$VENV/.lock"
  if command -v flock >/dev/null; then
    flock -n 9 && return
    if [ $? = 1 ]; then
      say "waiting for another set-up of $VENV" && flock 9
    else
      say "warning: $VENV can't be locked: start no other set-up of it"
    fi
  else # macOS: a link that names its owner, taken over when the owner is dead
    until ln -s $$ "$VENV/.lock.pid" 2>/dev/null; do
      kill -0 "$(readlink "$VENV/.lock.pid")" 2>/dev/null || rm -f "$VENV/.lock.pid"
      sleep 1
    done
    trap 'rm -f "$VENV/.lock.pid"' EXIT
  fi
}

try() { # progress to the terminal; errors, pages of them from pip, into one line that says how to go on
  local errors
  errors=$("$@" 2>&1 1>&3) && return
  [ -z "$old" ] || echo "$old" >"$VENV/.stamp" # pip left what was there, and it still works
  case $errors in
    *"No space left"* | *quota* | *"Input/output error"*) # the last is an overlay's, on a full disk
      fail "no space left for $VENV (needs 6 GB) or in ${TMPDIR:-/tmp}: free some, or set VENV=DIR (in a container" \
        "OVERLAY=FILE) or TMPDIR=DIR" ;;
    *"connection broken"*) fail "no network, or the package index can't be reached: try again when it can" ;;
  esac
  fail "$(grep -i error <<<"$errors" | tail -n 1) (with $version; PYTHON or TORCH_INDEX_URL may help)"
}

update() {
  find_python
  mkdir -p "$VENV" 2>/dev/null
  [ -w "$VENV" ] || fail "can't write to $VENV: set VENV=DIR"
  VENV=$(cd "$VENV" && pwd -P) # it may be a link to another disk, which venv refuses
  # a folder that is someone else's is never emptied
  [ -e "$VENV/.lock" ] || [ -e "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
    fail "$VENV was not made by this script: remove it or set VENV to another folder"
  lock
  (current) && return # another call has just done it
  choose_index
  local new old pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
  new=$(stamp) old=$(cat "$VENV/.stamp" 2>/dev/null)
  rm -f "$VENV/.stamp"
  # updated in place if complete and only the requirements differ; otherwise, or if incomplete, made anew
  if [ "$(head -n 3 <<<"$old")" != "$(head -n 3 <<<"$new")" ] || ! "${pip[@]}" -V &>/dev/null; then
    old=
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name '.lock*' -exec rm -rf {} + || fail "can't empty $VENV"
    try "$python" -m venv --without-pip "$VENV"
    try "$VENV/bin/python" -m ensurepip --default-pip 3>/dev/null # apart, as venv would hide its error
  fi
  say "installing into $VENV with $version (a few minutes the first time)"
  # torch first and from that index alone: among several, pip takes the newest version, whatever its CUDA
  [ "$index" = PyPI ] ||
    PIP_EXTRA_INDEX_URL=$index try "${pip[@]}" install --index-url "$index" -r <(grep ^torch "$requirements")
  try "${pip[@]}" install -r "$requirements"
  echo "$new" >"$VENV/.stamp.new" && mv "$VENV/.stamp.new" "$VENV/.stamp"
}

fetch() { # copies a missing image or overlay from where the cluster keeps them, gzipped or not
  local dir from found=
  [ ! -s "$1" ] || return 0
  for dir in "${1%/*}" $public; do
    for from in "$dir/${1##*/}" "$dir/${1##*/}.gz"; do
      [ -n "$found" ] || [ ! -s "$from" ] || [ ! -r "$from" ] || found=$from
    done
  done
  [ -n "$found" ] || fail "no ${1##*/} in $public: copy one to $1, or set IMAGE and OVERLAY"
  mkdir -p "${1%/*}" 2>/dev/null
  { exec 8>>"$1.part"; } 2>/dev/null || fail "can't write to ${1%/*}: set IMAGE and OVERLAY"
  flock -n 8 || fail "another set-up is fetching $1"
  say "$1 from $found (minutes)"
  # renamed once complete; sparse, as an overlay is mostly zeros
  if [[ $found == *.gz ]]; then gunzip -c "$found"; else cat "$found"; fi |
    dd of="$1.part" bs=1M conv=sparse status=none
  [ "${PIPESTATUS[*]}" = "0 0" ] && mv "$1.part" "$1" && return
  rm -f "$1.part" # half a copy would fill the disk
  fail "could not copy $found to $1 (is there room?)"
}

# The same environment in /ext3 of the overlay, which jobs then read. /ext3/env.sh comes last: if it exists, all is there.
container() {
  local engine inside said scratch=/scratch/${USER:-$(id -un)}
  local public=${PUBLIC:-/scratch/work/public/singularity /scratch/work/public/overlay-fs-ext3
    /share/apps/images /share/apps/overlay-fs-ext3}
  [ "${ENVIRONMENT:-}" != BATCH ] || fail "--container is for a shell: jobs share the overlay and only read it"
  engine=$(command -v singularity || command -v apptainer) ||
    fail "no singularity on this machine: run this in an interactive job (README, On the cluster)"
  IMAGE=$(realpath -ms "${IMAGE:-$scratch/cuda12.6.2-cudnn9.5.0-devel-ubuntu24.04.1.sif}")
  OVERLAY=$(realpath -ms "${OVERLAY:-$scratch/overlay-25GB-500K.ext3}")
  [[ $script$OVERLAY != *[,:]* ]] || fail "Singularity can't bind a folder with , or : in its name: rename it"
  fetch "$IMAGE"
  fetch "$OVERLAY"
  inside=("$engine" -q exec --fakeroot --overlay "$OVERLAY:rw" --bind "${script%/*},${OVERLAY%/*}" "$IMAGE")
  said=$("${inside[@]}" true 2>&1) || case $said in
    *"in use"*) fail "$OVERLAY is in use by a job or another set-up: try again when that has ended" \
      "(a set-up that was killed may leave its mount behind: pkill fuse2fs)" ;;
    *) fail "the container does not start: ${said##*$'\n'}" ;;
  esac
  if [ -z "${PYTHON:-}" ] &&
    ! "${inside[@]}" python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' &>/dev/null; then
    say "the image has no Python 3.10 or newer with venv: using Miniforge's, in /ext3/miniforge3"
    export PYTHON=/ext3/miniforge3/bin/python3
    "${inside[@]}" test -e /ext3/miniforge3/.complete || miniforge
  fi
  # CUDA 12, as a login node does not know the drivers of the GPU nodes; no cache in a small home folder. If the
  # set-up fails, an environment that it has left as it was stays in use.
  # shellcheck disable=SC2016 # for the container's shell
  "${inside[@]}" env VENV=/ext3/env PIP_NO_CACHE_DIR=1 PYTHON="${PYTHON:-python3}" \
    TORCH_INDEX_URL="${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cu126}" \
    bash -c 'rm -f /ext3/env.sh; bash "$1"; status=$?
      [ ! -e /ext3/env/.stamp ] || echo . /ext3/env/bin/activate >/ext3/env.sh
      exit "$status"' bash "$script"
}

miniforge() {
  local url=https://github.com/conda-forge/miniforge/releases/latest/download/Miniforge3-Linux-x86_64.sh
  curl -fsSL -o "$OVERLAY.miniforge" "${MINIFORGE_URL:-$url}" ||
    fail "Miniforge can't be downloaded: try again, or PYTHON=... for another python3 in the image"
  # shellcheck disable=SC2016 # for the container's shell
  "${inside[@]}" bash -c 'rm -rf /ext3/miniforge3 &&
    bash "$1" -b -p /ext3/miniforge3 >/dev/null && touch /ext3/miniforge3/.complete' bash "$OVERLAY.miniforge" ||
    fail "Miniforge can't be installed into $OVERLAY"
  rm -f "$OVERLAY.miniforge"
}

case ${1:-} in
  -h | --help) exec sed -n '2,12s/^# \{0,1\}//p' "$script" ;;
  --container) container; exit ;;
  -*) fail "unknown option $1 (see --help)" ;;
esac
current || (update 3>&2) || exit 1
[ $# -gt 0 ] || { echo "setup_env: ready: $VENV ($("$VENV/bin/python" -V))" && exit; }
export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
exec "$@"
