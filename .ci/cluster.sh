#!/usr/bin/env bash
# Proves run_cnn.sbatch, run_resnet.sbatch and "setup_env.sh --container" on a real SLURM of two emulated nodes and
# a real Apptainer, on one Debian machine, as root, in minutes:
#
#   .ci/cluster.sh           all points
#   .ci/cluster.sh 2 6       some of them
#
#   VENV=DIR     the environment that the jobs use (default: .venv next to setup_env.sh, made when it is not there)
#   TOOLS=DIR    keep Apptainer there for the next time
#   KEEP=DIR     leave the jobs' and SLURM's logs there
#
# Jobs, daemons and mounts live in namespaces of their own, which end with this script: the machine keeps nothing of
# it but Debian's packages, and its files, users and network are neither used nor changed. The image is a stand-in:
# the host's /usr bound over an empty one, as the environment is bound into it; a real one has 6 GB.

# shellcheck disable=SC2317,SC2031,SC2030 # points are called by their number, and P is a folder for one subshell
set -u
here=$(readlink -f "${BASH_SOURCE[0]}")
repo=${here%/.ci/*}
points=("$@")
[ $# -gt 0 ] || points=(1 2 3 4 5 6 7 8 9 10 11)

skip() { printf '%s\n' "cluster: skipped: $*" "cluster: 0 passed, 0 failed, ${#points[@]} skipped" && exit 0; }

# ---------------------------------------------------------------------------------------------- outside

install_tools() { # SLURM from Debian; Apptainer from its unstable suite, unpacked beside with its own libc
  local apt=$1/apt libs=$1/lib/usr/lib/x86_64-linux-gnu file mirror options
  apt-get -qq update &&
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
      slurmctld slurmd slurm-client munge shellcheck patchelf squashfs-tools squashfuse fuse2fs fuse-overlayfs uidmap \
      git curl iproute2 procps e2fsprogs || return
  [ ! -x "$1/usr/bin/singularity" ] || return 0
  mkdir -p "$apt"/{lists/partial,archives/partial} "$1"/{deb,root}
  mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg arch=amd64]" \
    "${mirror:-http://deb.debian.org/debian} sid main" >"$apt/sources.list"
  options=(-qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::archives="$apt/archives"
    -o Acquire::Languages=none -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update &&
    (cd "$1/deb" && apt-get "${options[@]}" download apptainer libc6 libseccomp2 libsqlite3-0) &&
    dpkg -x "$1"/deb/apptainer_*.deb "$1/root" || return
  for file in "$1"/deb/lib*.deb; do dpkg -x "$file" "$1/lib" || return; done
  mv "$1/root/usr" "$1/usr" && mv "$1/root/etc" "$1/usr/etc" || return
  for file in "$1/usr/bin/apptainer" "$1/usr/lib/x86_64-linux-gnu/apptainer/bin/starter"; do
    patchelf --set-interpreter "$libs/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$libs" "$file" || return
  done
  # apptainer looks for its files by its own place; these machines may lack CAP_SYS_RESOURCE
  ln -s ../etc "$1/usr/lib/etc" && mkdir -p "$1/usr/lib/var/lib/apptainer/mnt/session" &&
    sed -i 's/^root default capabilities.*/root default capabilities = no/' "$1/usr/etc/apptainer/apptainer.conf" &&
    rm -rf "$apt" "$1/deb" && ln -sf apptainer "$1/usr/bin/singularity"
}

if [ -z "${CLUSTER_INSIDE:-}" ]; then
  began=$SECONDS
  [ "$(id -u)" = 0 ] || skip "not root"
  [ -e /etc/debian_version ] || skip "not Debian"
  unshare --mount --pid --net --fork --mount-proc true 2>/dev/null || skip "no right to make namespaces"
  [ -e /dev/fuse ] || skip "no /dev/fuse"
  VENV=${VENV:-$repo/.venv}
  [ -x "$VENV/bin/python" ] || VENV=$VENV "$repo/setup_env.sh" true || skip "setup_env.sh made no environment"
  work=$(mktemp -d /tmp/cluster.XXXXXX)
  trap 'rm -rf "$work"' EXIT # its mounts are gone with their namespace by then
  tools=${TOOLS:-$work/tools}
  mkdir -p "$tools"
  install_tools "$tools" >"$work/install.log" 2>&1 ||
    skip "packages can't be installed: $(tail -n 1 "$work/install.log")"
  "$tools/usr/bin/singularity" --version >/dev/null || skip "Apptainer of Debian unstable does not run here"
  echo "cluster: tools in $((SECONDS - began)) s"
  # --kill-child and the pid namespace: nothing outlives this
  CLUSTER_INSIDE=1 W=$work TOOLS=$tools VENV=$VENV unshare --mount --pid --net --fork --mount-proc --kill-child \
    bash "$here" "${points[@]}" &
  trap 'kill -KILL $!; exit 143' TERM INT HUP
  wait $!
  status=$?
  if [ -n "${KEEP:-}" ]; then mkdir -p "$KEEP" && cp -r "$work/logs/." "$KEEP"; fi
  echo "cluster: $((SECONDS - began)) s in all"
  [ -s "$work/result" ] || { echo "cluster: 0 passed, 1 failed, 0 skipped" && exit 1; }
  cat "$work/result"
  exit "$status"
fi

# ---------------------------------------------------------------------------------------------- the cluster

user=student uid=4242
as() { # as the student, in the student's folder P
  (cd "$P" && exec setpriv --reuid=$uid --regid=$uid --clear-groups env HOME="$W/home" USER=$user LOGNAME=$user "$@")
}

private_files() { # this namespace's own users, hosts and fuse
  mkdir "$W/etc" && mknod -m 666 "$W/etc/fuse" c 10 229 && mount --bind "$W/etc/fuse" /dev/fuse
  { cat /etc/passwd && echo "$user:x:$uid:$uid::$W/home:/bin/bash"; } >"$W/etc/passwd"
  { cat /etc/group && echo "$user:x:$uid:"; } >"$W/etc/group"
  echo "$user:100000:65536" | tee "$W/etc/subuid" >"$W/etc/subgid"
  printf "%s\n" "127.0.0.1 localhost g2-a g2-b $(hostname)" "10.77.0.1 here" >"$W/etc/hosts"
  for f in passwd group hosts subuid subgid; do
    [ -e "/etc/$f" ] || continue # without subuid Apptainer maps root alone, which is enough
    mount --bind "$W/etc/$f" "/etc/$f"
  done
}

reachable() { # folders that lie in a place closed to others, such as /root, are bound over an open one, here alone
  local path top i=0 closed=()
  for path; do
    mkdir -p "$W/bind/$i" && mount --bind "$path" "$W/bind/$((i++))"
    for ((top = 2; ; top++)); do
      dir=$(cut -d/ -f1-$top <<<"$path")
      [ "$dir" != "$path" ] || break
      [ -z "$(find "$dir" -maxdepth 0 ! -perm -001)" ] || { closed+=("$dir") && break; }
    done
  done
  for dir in $(printf '%s\n' ${closed[@]+"${closed[@]}"} | sort -u); do mount -t tmpfs -o mode=755 none "$dir"; done
  i=0
  for path; do
    mkdir -p "$path" && mount --bind "$W/bind/$((i++))" "$path"
  done
}

start_slurm() {
  local s=$W/slurm host p
  host=$(hostname -s)
  mkdir -p "$s"/{state,spool.g2-a,spool.g2-b,log,run} && chmod 711 "$W" "$s" "$s/run"
  head -c 128 /dev/urandom >"$s/munge.key" && chmod 400 "$s/munge.key"
  munged --force --key-file="$s/munge.key" --socket="$s/run/munge.sock" --pid-file="$s/run/munged.pid" \
    --log-file="$s/log/munged.log" --seed-file="$s/run/munge.seed" || return
  cat >"$s/slurm.conf" <<CONF
ClusterName=burst
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$s/run/munge.sock
CredType=cred/munge
StateSaveLocation=$s/state
SlurmdSpoolDir=$s/spool.%n
SlurmctldPidFile=$s/run/slurmctld.pid
SlurmdPidFile=$s/run/slurmd.%n.pid
SlurmctldLogFile=$s/log/slurmctld.log
SlurmdLogFile=$s/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldParameters=node_reg_mem_percent=1
SlurmdParameters=config_overrides
KillWait=20
SlurmdTimeout=20
MinJobAge=3600
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
GresTypes=gpu
NodeName=g2-a NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=12 RealMemory=47000 Gres=gpu:2 State=UNKNOWN
NodeName=g2-b NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=12 RealMemory=47000 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=g2-standard-12 Nodes=g2-a,g2-b Default=YES MaxTime=INFINITE State=UP
PartitionName=grace Nodes=g2-a,g2-b MaxTime=INFINITE State=UP GraceTime=30
PartitionName=high Nodes=g2-a,g2-b MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=g2-standard-48 Nodes=g2-a,g2-b MaxTime=INFINITE State=UP
CONF
  printf 'NodeName=g2-%s Name=gpu File=/dev/%s\n' a null a zero b null b zero >"$s/gres.conf"
  export SLURM_CONF=$s/slurm.conf
  slurmctld && slurmd -N g2-a && slurmd -N g2-b && wait_for 90 "two idle nodes" all_idle
}

empty() { [ -z "$(squeue -h)" ]; }
all_idle() { [ "$(sinfo -h -p g2-standard-12 -t idle -o %D 2>/dev/null)" = 2 ]; }

make_image() { # an empty image, and an overlay whose environment is the host's
  local d s=$W/sandbox
  mkdir -p "$s"/{usr,etc,tmp,proc,sys,dev,root,home,var/tmp,run,opt,ext3,mnt} "$W"/{full,empty,new}/{upper/ext3,work}
  for d in bin sbin lib lib64; do ln -s "usr/$d" "$s/$d"; done
  touch "$s"/etc/{passwd,group,resolv.conf,hosts,localtime}
  APPTAINER_BIND=/usr:/usr:ro singularity build "$W/image.sif" "$s" >"$W/build.log" 2>&1 || return
  echo "export VIRTUAL_ENV=$VENV PATH=$VENV/bin:\$PATH" >"$W/full/upper/ext3/env.sh"
  for d in full empty new; do
    truncate -s 300M "$W/$d.ext3" && mkfs.ext3 -q -F -d "$W/$d" "$W/$d.ext3" || return
  done
  chown $uid:$uid "$W"/*.ext3
}

make_checkout() { # the student's clone of what is in the repository's folder, and an upstream
  mkdir "$W/home" "$W/src"
  (cd "$repo" && git -c safe.directory='*' ls-files -co --exclude-standard -z) |
    tar -C "$repo" --null -T - --ignore-failed-read -cf - 2>/dev/null | tar -C "$W/src" -xf -
  # the tests have a run of their own in CI; here it matters that they run, and what follows when they fail
  cat >"$W/src/tests.py" <<'PY'
import importlib.util, os, sys
assert importlib.util.find_spec("cnn_from_scratch").origin.startswith(os.path.dirname(__file__))
print(f"1 passed, {int('FAIL' in os.environ)} failed, 0 skipped")
sys.exit('FAIL' in os.environ)
PY
  chown -R $uid:$uid "$W/home" "$W/src"
  P=$W/src
  as git config --global user.name Student && as git config --global user.email student@example.org &&
    as git config --global init.defaultBranch main && as git init -q && as git add -A && as git commit -qm start &&
    as git clone -q --bare . "$W/home/upstream.git" && as git clone -q "$W/home/upstream.git" "$W/home/project" &&
    P=$W/home/project
}

# ---------------------------------------------------------------------------------------------- helpers

wait_for() { # wait_for SECONDS WHAT COMMAND...: polls
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < until)) || { no "waited in vain for $what" && return 1; }
    sleep .2
  done
}

ok() { echo "  ok: $*"; }
no() { echo "  NOT OK: $*"; failed=1; }
check() { # check WHAT COMMAND...
  local what=$1
  shift
  if "$@"; then ok "$what"; else no "$what"; fi
}

equal() { # equal WHAT WANTED GOT
  check "$1" [ "$2" = "$3" ]
  [ "$2" = "$3" ] || echo "      | wanted: $2, got: $3"
}
submit() { as sbatch --parsable --cpus-per-task=1 --mem=3G "$@" | cut -d';' -f1; } # prints the job's id
tiny=(--dataset digits --weights none --image-size 32 --amp off)
field() { scontrol show job "$1" 2>/dev/null | grep -oE "\b$2=[^ ]*" | head -n 1 | cut -d= -f2; }
is() { case " $2 " in *" $(field "$1" JobState) "*) ;; *) false ;; esac; }
ended() { is "$1" "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL" && ! squeue -h -j "$1" -o %T | grep -q .; }
log() { cat "$P"/*_training_"$1".out "$P"/*_training_"$1".err 2>/dev/null; } # log JOB
logged() { log "$1" | grep -qE -e "$2"; }
times() { [ "$(log "$1" | grep -cE -e "$2")" = "$3" ]; }
there() { ls "$@" >/dev/null; } # all of these files
shown() { log "$1" | grep -E -m 1 -e "$2" | sed 's/^/      | /'; }
folder() { compgen -G "$P/results/*-$1"; }
finish() { wait_for "${2:-300}" "job $1 to end" ended "$1"; } # finish JOB [SECONDS]
requeued() { [ "$(field "$1" Restarts)" = 1 ]; } # once
exit_status() { field "$1" ExitCode | cut -d: -f1; }
restart() { # SLURM lets a requeued job wait two minutes, here two seconds
  wait_for 180 "job $1 to be requeued" is "$1" "PENDING" && sleep 2 &&
    wait_for 180 "job $1 to start again" started "$1" "$(field "$1" Restarts)"
}
started() { # started JOB RESTARTS; one that has requeued itself in the meantime waits
  is "$1" "RUNNING COMPLETED FAILED" || [ "$(field "$1" Restarts)" != "$2" ] ||
    { scontrol update jobid="$1" StartTime=now 2>/dev/null; false; }
}

processes() { # those that have a variable of this value
  grep -lzx "$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3
}
power_off() { # a spot machine vanishes: SIGKILL for its daemon and all processes of its jobs, at once
  local pids p
  pids=$(cat "$W/slurm/run/slurmd.$1.pid")
  for p in $(processes "SLURMD_NODENAME=$1"); do
    pids+=" $p"
    p=$(sed -n 's/^PPid:\s*//p' "/proc/$p/status" 2>/dev/null)
    ! grep -q '^slurmstepd' "/proc/${p:-0}/cmdline" 2>/dev/null || pids="$p $pids" # first, as it would report the end
  done
  # shellcheck disable=SC2086 # a list
  kill -KILL $pids 2>/dev/null
}
down() { scontrol update nodename="$1" state=down reason='Instance stopped/deleted'; } # as the cloud's watcher says
power_on() { slurmd -N "$1" && wait_for 90 "$1 to be back" node_up "$1"; }
node_up() { sinfo -h -n "$1" -o %T | grep -qE '^(idle|mixed|allocated)$'; }

python() { as "$VENV/bin/python" "$@"; }
same_weights() { # bit for bit, and the log too, but for its seconds
  python - "$1" "$2" <<'PY'
import csv, sys, torch
a, b = (torch.load(f"{d}/linear_probe/best.pt", weights_only=True)["model"] for d in sys.argv[1:])
rows = [[{**r, "seconds": 0} for r in csv.DictReader(open(f"{d}/linear_probe/log.csv"))] for d in sys.argv[1:]]
sys.exit(not (a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and rows[0] == rows[1]))
PY
}

# ---------------------------------------------------------------------------------------------- the points

# a probe that goes through the network at every step: seconds of work and small checkpoints, many of them
slow=("${tiny[@]}" --regimes linear_probe --augment --batch-size 8 --checkpoint-minutes 0.005)
endless=("${slow[@]}" --epochs 100000 --patience 100000)
training() { folder "$1" >/dev/null && [ -e "$(folder "$1")/linear_probe/last.pt.prev" ]; } # two checkpoints

point_1() { # both files from submission to results
  local cnn resnet a b dir
  cnn=$(submit run_cnn.sbatch --dataset digits --epochs 2)
  resnet=$(submit run_resnet.sbatch "${tiny[@]}" --limit 300 --dry-run)
  finish "$cnn" && finish "$resnet"
  for a in $cnn $resnet; do
    check "job $a completed" is "$a" COMPLETED
    check "header: start, node, restarts" logged "$a" "^===== job $a starts 2.* restart 0 \| node g2-[ab] ====="
    for b in 'GPU:      none seen; 1 requested per node' 'versions: python 3.* torch [0-9].*apptainer' \
      "code:     commit $(as git rev-parse --short HEAD), up to date"; do
      check "header: $b" logged "$a" "^$b"
    done
    check "footer" logged "$a" "^===== job $a ends 2.* exit status 0 \| results: $P/results/.*-$a ====="
    shown "$a" '===== job .* ends'
  done
  dir=$(folder "$cnn")
  check "tests before the training" logged "$cnn" '^1 passed, 0 failed'
  check "cnn's results, code and commit" there "$dir"/{metrics.json,best.pt,log.csv,curves.png,commit,code/tests.py}
  dir=$(folder "$resnet")
  check "resnet18's results of two regimes" there "$dir"/{comparison.md,commit,code/resnet18.py} \
    "$dir"/{linear_probe,partial_unfreeze}/metrics.json
  check "metrics.json names the commit" grep -q "\"git_commit\": \"$(cat "$dir/commit")\"" \
    "$dir/linear_probe/metrics.json"
  # finished, and requeued by someone: ends at once, results untouched
  a=$(find "$dir" "$(folder "$cnn")" -type f ! -name '.lock' -printf '%p %T@\n' | sort | sha256sum)
  for b in $cnn $resnet; do as scontrol requeue "$b" && restart "$b" && finish "$b"; done
  b=$(find "$dir" "$(folder "$cnn")" -type f ! -name '.lock' -printf '%p %T@\n' | sort | sha256sum)
  check "requeued after its end: completed again" is "$cnn" COMPLETED && is "$resnet" COMPLETED
  equal "... in the same folder, no file changed" "$a" "$b"
  check "... no tests, no training again" times "$cnn" '^(1 passed|epoch  1/2)' 2
  check "... and says so" logged "$resnet" '^all is done'
  # failing tests stop the job
  a=$(FAIL=1 submit run_cnn.sbatch --dataset digits)
  finish "$a"
  equal "failing tests: exit status 1, no training" "1 0" "$(exit_status "$a") $(log "$a" | grep -c '^epoch')"
}

point_2() { # the node vanishes in the middle of an epoch
  local whole broken node
  whole=$(submit --nodelist=g2-b run_resnet.sbatch "${slow[@]}" --epochs 6)
  broken=$(submit run_resnet.sbatch "${slow[@]}" --epochs 6)
  wait_for 90 "the first node" is "$broken" RUNNING # SLURM takes g2-a, the first in its list
  wait_for 240 "the second epoch" logged "$broken" '^epoch  1/6' || return
  sleep 1 # into the epoch; where exactly does not matter
  node=$(field "$broken" NodeList)
  power_off "$node"
  down "$node"
  check "no footer: there was no signal" times "$broken" '=====.* ends' 0
  restart "$broken" # on the other node, as this one is down
  finish "$broken"
  check "requeued on the other node" [ "$node" != "$(field "$broken" NodeList)" ]
  check "resumed from a checkpoint" logged "$broken" '^linear_probe: continuing in epoch [2-9], after step'
  shown "$broken" 'continuing in'
  equal "completed in one folder, with one log" "1 2" \
    "$(folder "$broken" | wc -l) $(log "$broken" | grep -c '=====.* starts')"
  power_on "$node"
  finish "$whole"
  equal "the run to compare with was undisturbed" 0,g2-a "$(field "$whole" Restarts),$node"
  check "final weights and log.csv bit-identical to an undisturbed run's" \
    same_weights "$(folder "$whole")" "$(folder "$broken")"
}

point_3() { # the time limit
  local real quick again dir
  # SLURM looks at time limits every half minute and warns as much earlier: between the seconds 60 and 90
  real=$(MAX_RESTARTS=1 submit --time=2 --signal=B:USR1@30 run_resnet.sbatch "${endless[@]}")
  quick=$(submit run_resnet.sbatch "${slow[@]}" --epochs 2)
  wait_for 240 "a checkpoint" training "$quick" && as scancel --signal=USR1 --batch "$quick"
  wait_for 180 "saving" logged "$quick" 'everything is saved' && restart "$quick" && finish "$quick"
  equal "warned: saved, requeued, resumed, finished" "0 4" "$(exit_status "$quick") $(
    log "$quick" | grep -cE '^(time limit near|stopped: every|unfinished: requeued|.*continuing in)'
  )"
  shown "$quick" 'requeued'
  wait_for 240 "the time limit's warning" logged "$real" '^time limit near'
  check "the real time limit's warning: saved" wait_for 90 "saving" logged "$real" 'everything is saved'
  restart "$real"
  wait_for 240 "going on after the time limit" logged "$real" 'continuing in' && shown "$real" 'continuing in'
  # a second time, with MAX_RESTARTS=1; SLURM's signal now comes from hand
  wait_for 180 "its training" logged "$real" "continuing in" && sleep 1 && as scancel --signal=USR1 --batch "$real"
  finish "$real"
  equal "MAX_RESTARTS=1: ends, exit status 75, not requeued" "FAILED 75 1" \
    "$(field "$real" JobState) $(exit_status "$real") $(field "$real" Restarts)"
  shown "$real" 'MAX_RESTARTS'
  # an exit status alone requeues nothing
  again=$(submit run_resnet.sbatch --regimes nonsense)
  finish "$again"
  equal "bad arguments: exit status 2, not requeued" "2 0" "$(exit_status "$again") $(field "$again" Restarts)"
  # an earlier job's folder, given by name
  dir=$(folder "$quick")
  again=$(OUT_DIR=$dir submit run_resnet.sbatch "${slow[@]}" --epochs 2)
  finish "$again"
  check "OUT_DIR continues in an earlier job's folder" logged "$again" '^all is done'
}

point_4() { # scancel, and a machine that shuts down in good order
  local cnn resnet again p
  resnet=$(submit --nodelist=g2-a run_resnet.sbatch "${endless[@]}")
  cnn=$(submit --nodelist=g2-b run_cnn.sbatch --dataset digits --epochs 100000)
  wait_for 240 "a checkpoint" training "$resnet"
  wait_for 240 "cnn's training" logged "$cnn" '^epoch'
  as scancel "$resnet" "$cnn"
  finish "$resnet" && finish "$cnn"
  again=$(OUT_DIR=$(folder "$cnn") submit run_cnn.sbatch --dataset digits --epochs 100000)
  check "saved before the end" logged "$resnet" 'everything is saved'
  check "footer" logged "$resnet" '===== job .* ends .*exit status 143'
  check "resnet18's checkpoint is readable" python - "$(folder "$resnet")/linear_probe/last.pt" <<'PY'
import sys, torch
print("      | epoch %(epoch)d, step %(step)d" % torch.load(sys.argv[1], weights_only=True))
PY
  check "cnn's folder is not that of a finished run" [ ! -e "$(folder "$cnn")/metrics.json" ]
  check "... and a job there trains from the start" wait_for 240 "the first epoch" logged "$again" '^epoch +1/'
  # by now a job that requeues itself would be back
  equal "both cancelled, and stay so" "CANCELLED CANCELLED 0" \
    "$(field "$resnet" JobState) $(field "$cnn" JobState) $(field "$resnet" Restarts)"
  as scancel "$again"
  finish "$again"
  # a shutdown sends TERM, too, but SLURM does not know: a job that ended now would not be restarted
  again=$(OUT_DIR=$(folder "$resnet") submit --nodelist=g2-a run_resnet.sbatch "${endless[@]}")
  wait_for 240 "going on" logged "$again" 'continuing in'
  for p in $(processes "SLURM_JOB_ID=$again"); do kill -TERM "$p" 2>/dev/null; done
  check "a shutdown's TERM: saved" wait_for 90 "saving" logged "$again" 'stopped from outside'
  check "... and the job stays until the machine is gone" is "$again" RUNNING
  power_off g2-a
  down g2-a
  check "... so that SLURM restarts it" wait_for 90 "the requeue" requeued "$again"
  as scancel "$again"
  finish "$again"
  power_on g2-a
  exec 8>>"$P/.git/jobs.lock" && flock 8 # as another job that pulls: this one waits before its work
  again=$(submit --nodelist=g2-a run_cnn.sbatch --dataset digits)
  wait_for 90 "its set-up" pgrep -u "$uid" -x flock >/dev/null
  for p in $(processes "SLURM_JOB_ID=$again"); do kill -TERM "$p" 2>/dev/null; done
  check "a shutdown before the work begins" wait_for 30 "the stop" logged "$again" 'stopped from outside'
  check "... the job stays, too" is "$again" RUNNING
  exec 8>&-
  as scancel "$again"
  finish "$again"
}

point_5() { # two jobs at once, one overlay
  local a b
  a=$(submit --nodelist=g2-a run_cnn.sbatch --dataset digits --epochs 100000)
  b=$(submit --nodelist=g2-b run_cnn.sbatch --dataset digits --epochs 100000)
  check "both train, on two nodes" wait_for 240 "both" both_train "$a" "$b"
  check "... while the set-up says that the overlay is held" held
  as scancel "$a" "$b"
  finish "$a" && finish "$b"
}
both_train() { logged "$1" '^epoch' && logged "$2" '^epoch' && is "$1" RUNNING && is "$2" RUNNING; }
held() {
  local said
  said=$(as ./setup_env.sh --container 2>&1) && return 1
  tail -n 1 <<<"$said" | sed 's/^/      | /'
  grep -q 'in use by' <<<"$said"
}

point_6() { # two nodes, srun and torchrun
  local one two run=("${tiny[@]}" --regimes linear_probe)
  one=$(submit run_resnet.sbatch "${run[@]}")
  two=$(submit --nodes=2 run_resnet.sbatch "${run[@]}")
  finish "$one" && finish "$two"
  check "two processes on two nodes" logged "$two" 'torch .*processes: 2'
  check "equal to one process" python - "$(folder "$one")" "$(folder "$two")" <<'PY'
import json, sys, torch
m = [json.load(open(f"{d}/linear_probe/metrics.json")) for d in sys.argv[1:]]
a, b = (torch.load(f"{d}/linear_probe/best.pt", weights_only=True)["model"]["fc.weight"] for d in sys.argv[1:])
apart, points = float((a - b).norm() / a.norm()), 100 * abs(m[0]["test_accuracy"] - m[1]["test_accuracy"])
print(f"      | test accuracy {m[0]['test_accuracy']:.2%} and {m[1]['test_accuracy']:.2%}, weights {apart:.1e} apart")
sys.exit(points > 0.1 or apart > 1e-3)
PY
  two=$(submit --gres=gpu:2 run_resnet.sbatch "${run[@]}" --epochs 2)
  finish "$two"
  check "--gres=gpu:2: two processes on one node" logged "$two" 'torch .*processes: 2'
  # a job of higher priority takes one of the nodes, after a grace period
  two=$(submit --partition=grace --nodes=2 run_resnet.sbatch "${endless[@]}")
  wait_for 240 "a checkpoint" training "$two"
  one=$(as sbatch --parsable --partition=high --nodelist=g2-b --exclusive --mem=1G --output=/dev/null --wrap "sleep 1")
  check "preempted with a grace period: saved" wait_for 120 "saving" logged "$two" 'everything is saved'
  finish "$one"
  restart "$two" && check "... requeued, resumed" wait_for 240 "going on" logged "$two" 'continuing in'
  as scancel "$two"
  finish "$two"
  # the second node vanishes, and nobody tells SLURM
  two=$(submit --nodes=2 run_resnet.sbatch "${endless[@]}")
  wait_for 240 "a checkpoint" training "$two"
  power_off g2-b
  check "a lost node: requeued, no hang" wait_for 240 "the requeue" requeued "$two"
  down g2-b
  sleep 2 # a job that starts again within a second of its end has its credentials refused
  power_on g2-b
  restart "$two" && check "... resumed on two nodes" wait_for 240 "going on" logged "$two" 'continuing in'
  shown "$two" 'continuing in'
  as scancel --signal=USR1 --batch "$two"
  check "the time limit's warning reaches both: saved, requeued" \
    wait_for 180 "the second requeue" logged "$two" '^unfinished: requeued, restart 2'
  as scancel "$two"
  finish "$two"
}

point_7() { # the array and the merge
  local job regime dirs first
  job=$(submit --array=0-3 run_resnet.sbatch "${tiny[@]}" --limit 60 --epochs 1 --batch-size 32)
  finish "$job"
  for regime in linear_probe partial_unfreeze full gradual; do
    check "$regime" there "$P"/results/resnet18-*-"${job}_"?"/$regime/metrics.json"
  done
  dirs=("$P"/results/resnet18-*-"${job}"_*)
  python resnet18.py --out results/compared --compare "${dirs[@]}" >"$W/compared.log" 2>&1
  equal "one comparison of all four" 4 \
    "$(grep -cE '^\| (linear_probe|partial_unfreeze|full|gradual) ' "$P/results/compared/comparison.md")"
  # the last task's SLURM_JOB_ID is the array's: near its time limit it must requeue itself alone
  job=$(submit --array=0,3 run_resnet.sbatch "${endless[@]}")
  wait_for 240 "both tasks' checkpoints" two_train
  first=$(field "${job}_0" JobId)
  as scancel --signal=USR1 --batch "${job}_3"
  check "the last task near its time limit: requeued" wait_for 90 "the requeue" requeued "${job}_3"
  equal "... the other one goes on" "RUNNING 0" "$(field "$first" JobState) $(field "$first" Restarts)"
  as scancel "$job"
  finish "$job"
  check "... cancelled, it says how to go on" \
    logged "$first" "^if .* continue with: OUT_DIR=.*${job}_0 sbatch --array=0 run_resnet.sbatch --dataset digits"
  shown "$first" 'continue with'
}
two_train() { [ "$(compgen -G "$P/results/resnet18-*-${job}_*/*/last.pt.prev" | wc -l)" = 2 ]; }

point_8() { # what can be missing
  local job elsewhere seconds file log
  expect() { # expect JOB WHAT LINE
    finish "$1"
    check "$2: exit status 2" [ "$(exit_status "$1")" = 2 ]
    seconds=$(($(date -d "$(field "$1" EndTime)" +%s) - $(date -d "$(field "$1" StartTime)" +%s)))
    check "... at once ($seconds s)" [ "$seconds" -le 10 ] # 0 or 1 on a machine that has nothing else to do
    check "... one line" times "$1" '^error: ' 1
    check "... that says why" logged "$1" "^error: $3"
    shown "$1" '^error'
  }
  expect "$(IMAGE=/nowhere/x.sif submit run_cnn.sbatch)" "no image" 'no image /nowhere/x.sif'
  expect "$(OVERLAY=/nowhere/x.ext3 submit run_resnet.sbatch)" "no overlay" 'no overlay /nowhere/x.ext3'
  expect "$(OVERLAY=$W/empty.ext3 submit run_resnet.sbatch)" "no environment" "no environment .*$W/empty.ext3"
  expect "$(OUT_DIR=/proc/results submit run_cnn.sbatch)" "results can't be written" "can't write to /proc/results"
  expect "$(OUT_DIR=results/lr:1 submit run_resnet.sbatch)" "a folder with a colon" "Singularity can't bind .*lr:1"
  elsewhere=$W/home/elsewhere
  as mkdir -p "$elsewhere"
  file=$P/run_resnet.sbatch log=$P/resnet_training_%j
  job=$(P=$elsewhere submit --output="$log.out" --error="$log.err" "$file")
  expect "$job" "not the project's folder" "no resnet18.py in $elsewhere"
  job=$(as sbatch --partition=nowhere run_cnn.sbatch 2>&1)
  check "bad partition: sbatch refuses" [ $? != 0 ]
  echo "      | $job"
  job=$(submit --array=7 run_resnet.sbatch)
  finish "$job"
  check "an array task without a regime: exit status 2" [ "$(exit_status "$job")" = 2 ]
  # at a restart, what is missing may only be out of reach for a while
  ln -s full.ext3 "$W/link.ext3"
  job=$(OVERLAY=$W/link.ext3 submit run_resnet.sbatch "${tiny[@]}" --dry-run)
  finish "$job" && rm "$W/link.ext3" && as scontrol requeue "$job" && restart "$job"
  check "no overlay at a restart: requeued" wait_for 90 "the requeue" logged "$job" '^unfinished: requeued, restart 2'
  ln -s full.ext3 "$W/link.ext3"
  exec 8>>"$(folder "$job")/.lock" && flock 8 # as its first start, on a machine that SLURM has lost sight of
  restart "$job"
  check "its folder in use: requeued" wait_for 120 "the requeue" logged "$job" '^unfinished: requeued, restart 3'
  exec 8>&-
  restart "$job" && finish "$job"
  check "... and completed once all is there" is "$job" COMPLETED
}

point_9() { # the pull
  local other=$W/home/other P=$W/home job commit
  as git clone -q --bare upstream.git pull.git && as git clone -q pull.git other
  # what is pulled does not matter here: a stand-in for resnet18.py that needs no time
  P=$other
  cat >"$P/resnet18.py" <<'PY'
import pathlib, sys, time
print("this is version 1", flush=True)
while "--wait" in sys.argv and not pathlib.Path("go").exists():
    time.sleep(0.1)
PY
  as git commit -qam 1 && as git push -q
  P=$W/home && as git clone -q pull.git pulling && P=$W/home/pulling
  upstream 2
  GIT_PULL=0 pulls "GIT_PULL=0" 1 "not pulled: GIT_PULL=0"
  echo "# mine" >>"$P/cnn_from_scratch.py"
  pulls "a changed file" 1 'not pulled: changed files .cnn_from_scratch.py.'
  check "... is still changed" grep -q '# mine' "$P/cnn_from_scratch.py"
  as git checkout -q -- .
  as git branch -q --unset-upstream
  pulls "no upstream" 1 "not pulled: no upstream"
  as git branch -q -u origin/main
  mv "$W/home/pull.git" "$W/home/moved.git"
  pulls "upstream out of reach" 1 "not pulled: upstream can't be reached"
  mv "$W/home/moved.git" "$W/home/pull.git"
  mount --bind /dev/null "$(command -v git)"
  job=$(submit run_resnet.sbatch)
  finish "$job"
  umount "$(type -P git || echo /usr/bin/git)"
  check "no git: the commit is known all the same" \
    logged "$job" "^code:     commit $(as git rev-parse --short=7 HEAD), not pulled: no git"
  commit=$(as git rev-parse HEAD)
  as git commit -q --allow-empty -m mine
  pulls "diverged" 1 "not pulled: this branch and upstream have diverged"
  as git reset -q --hard "$commit"
  job=$(submit run_resnet.sbatch --wait)
  wait_for 90 "its start" logged "$job" '^this is version'
  check "behind upstream: fast-forward" logged "$job" '^this is version 2'
  # neither a later job's pull nor a requeue changes the code under it
  upstream 3
  pulls "a later job pulls again" 3 "up to date with upstream"
  upstream 4
  commit=$(as git rev-parse HEAD)
  as scontrol requeue "$job" && restart "$job"
  wait_for 90 "its restart" logged "$job" 'restart 1'
  as touch go
  finish "$job"
  check "requeued: runs the code of its first start" times "$job" '^this is version 2' 2
  equal "... and pulls nothing" "$commit 1" \
    "$(as git rev-parse HEAD) $(log "$job" | grep -c '^code:.*as at the first start')"
}
upstream() { # upstream N: a new version there
  (P=$other && as sed -i "s/version [0-9]*/version $1/" resnet18.py && as git commit -qam "$1" && as git push -q)
}
pulls() { # pulls WHAT VERSION LINE: a job, the version that it should run, and what it should say
  local job commit
  commit=$(as git rev-parse HEAD)
  job=$(submit run_resnet.sbatch)
  finish "$job"
  equal "$1: runs version $2" "0,this is version $2" "$(exit_status "$job"),$(log "$job" | grep '^this is')"
  check "... and says so" logged "$job" "^code:     commit [0-9a-f+a-z]*, $3"
  shown "$job" '^code:'
  [ "$2" != 1 ] || check "... the checkout's commit stays" [ "$commit" = "$(as git rev-parse HEAD)" ]
}

point_10() { # the files
  local f own=(run_cnn.sbatch run_resnet.sbatch setup_env.sh)
  check "shellcheck" as shellcheck "${own[@]}" .ci/cluster.sh
  equal "no account, no absolute home path" "" \
    "$(grep -nE -- '#SBATCH.*account|/home/|/root|/Users/' "$P"/run_*.sbatch)"
  equal "the user's name only as a variable" "" "$(grep -nE '/scratch/[^$]' "$P"/run_*.sbatch)"
  for f in run_cnn run_resnet; do
    sed -n '/^# -* from here/,/^# -* end of/p' "$P/$f.sbatch" >"$W/$f.common"
  done
  check "what both files share is the same ($(wc -l <"$W/run_cnn.common") lines)" \
    cmp -s "$W/run_cnn.common" "$W/run_resnet.common"
  equal "they never add, commit, merge or push" "" \
    "$(grep -nE 'git.* (add|commit|merge|push|rebase|reset|stash|checkout) ' "$P"/run_*.sbatch)"
}

point_11() { # setup_env.sh --container, with small requirements and a packed overlay
  local base public=$W/home/public P=$W/home/setup
  # as on the cluster: image and packed overlay in a public folder; the requirement is a package made here
  install -d -o "$uid" -g "$uid" "$P" "$public"
  cp "$repo/setup_env.sh" "$P" && cp "$IMAGE" "$public/real.sif"
  gzip -c "$W/new.ext3" >"$public/new.ext3.gz"
  python - "$P" <<'PY'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1] + "/tiny-1.0-py3-none-any.whl", "w") as f:
    f.writestr("tiny.py", "answer = 42\n")
    f.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    f.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    f.writestr("tiny-1.0.dist-info/RECORD", "")
PY
  echo "$P/tiny-1.0-py3-none-any.whl" >"$P/requirements.txt"
  chown -R "$uid:$uid" "$P" "$public"
  base=$("$VENV/bin/python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
  local -x PUBLIC=$public IMAGE=$W/home/scratch/real.sif OVERLAY=$W/home/scratch/new.ext3
  local -x TORCH_INDEX_URL=PyPI PIP_NO_INDEX=1
  if [ "$base" = /usr ]; then
    sets_up "with the image's python3" 0 "ready: /ext3/env"
  else # the image's is taken away, and "Miniforge" is an installer that links to the machine's
    local -x APPTAINER_BIND=$APPTAINER_BIND,/dev/null:/usr/bin/python3 MINIFORGE_URL=file://$W/home/miniforge.sh
    echo "mkdir -p \$3/bin && ln -s $base/bin/python3 \$3/bin/" >"$W/home/miniforge.sh"
    sets_up "without python3 in the image: Miniforge's" 0 "using Miniforge's"
  fi
  answers
  sets_up "again: nothing to do" 0 "ready: /ext3/env"
  as timeout -s KILL 1.2 ./setup_env.sh --container >/dev/null 2>&1
  sleep 1
  pkill -KILL -u "$uid" fuse2fs # killed while it starts, a container leaves this behind, and it keeps the overlay
  sleep 1
  as sed -i 's/$/ /' requirements.txt
  sets_up "killed in the middle, and other requirements: made good" 0 "ready: /ext3/env"
  answers
  as sed -i 's/tiny-1/tiny-2/' requirements.txt
  sets_up "a package that is not there: one error, nothing on the host" 1 "ERROR"
  answers # what was there before is still used
  check "... and that is all" [ "$(as ./setup_env.sh --container 2>&1 | grep -cE 'no .* found|ready')" = 0 ] &&
    check "... and the host has no environment" [ ! -e "$P/.venv" ]
  IMAGE=$W/home/none.sif sets_up "no image anywhere" 1 "no none.sif in $public: copy one"
  OVERLAY=$W/home/none.ext3 sets_up "no overlay anywhere" 1 "no none.ext3 in $public"
  ENVIRONMENT=BATCH sets_up "from a job: refused" 1 "is for a shell"
  as sbatch --wait --output="$P/job.out" --wrap "cd '$P' && ./setup_env.sh --container" >/dev/null
  check "... as in a real one" grep -q "is for a shell" "$P/job.out"
}
sets_up() { # sets_up WHAT STATUS LINE
  local said status
  said=$(as ./setup_env.sh --container 2>&1)
  status=$?
  check "$1" [ "$status $(grep -c -e "$3" <<<"$said")" = "$2 1" ]
  { grep -e "$3" <<<"$said" || echo "$said"; } | sed 's/^/      | /'
}
answers() {
  check "... and a read-only job finds it" [ "$(as singularity -q exec --overlay "$OVERLAY:ro" "$IMAGE" \
    bash -c '. /ext3/env.sh && python -c "import tiny; print(tiny.answer)"' 2>&1)" = 42 ]
}

# ---------------------------------------------------------------------------------------------- main

mount --make-rprivate /
mount --bind "$W" /mnt && W=/mnt # so that the logs show the same short paths each time
# one address beside 127.0.0.1, without which SLURM finds no network
ip link set lo up && ip address add 10.77.0.1/32 dev lo
mkdir "$W/logs"
chmod 711 "$W"
export PATH=$TOOLS/usr/bin:$PATH IMAGE=$W/image.sif OVERLAY=$W/full.ext3 OMP_NUM_THREADS=1
VENV=$(readlink -f "$VENV")
base=$("$VENV/bin/python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
private_files
case $base in
  /usr) reachable "$VENV" "$TOOLS" ;;
  *) reachable "$VENV" "$TOOLS" "$base" && bind_base=,$base ;;
esac
export APPTAINER_BIND=/usr:/usr:ro,$VENV${bind_base:-}
{ make_image && make_checkout && start_slurm; } || { tail -n 5 "$W"/build.log "$W"/slurm/log/* && exit 1; }
# whatever python3 the machine has: can an ordinary user run it in the container?
as singularity -q exec --overlay "$OVERLAY:ro" "$IMAGE" bash -c '. /ext3/env.sh && python -c "import torch"' ||
  skip "an ordinary user can't use $VENV" >"$W/result"

passed=0 bad=0
for point in "${points[@]}"; do
  failed=0 start=$SECONDS
  echo "point $point: $(sed -n "s/^point_$point() { # //p" "$here")"
  "point_$point"
  if ((failed)); then ((++bad)); else ((++passed)); fi
  ((!failed)) || { squeue && sinfo -N -o '%N %T' && tail -n 3 "$P"/*_training_*.err; } 2>/dev/null
  scancel --user=$user
  wait_for 180 "the queue to empty" empty
  echo "point $point: $( ((failed)) && echo failed || echo passed) in $((SECONDS - start)) s"
done
cp -p "$P"/*_training_* "$W"/slurm/log/* "$W/logs/" 2>/dev/null
(cd "$P" && ls -l --time-style=long-iso ./*_training_*) >"$W/logs/files.txt" 2>/dev/null
scontrol shutdown 2>/dev/null
echo "cluster: $passed passed, $bad failed, 0 skipped" >"$W/result"
exit $((bad > 0))
