#!/usr/bin/env bash
# Trains under Slurm and requeues itself until the run is done. At the top of the checkout, and never by srun:
#
#     sbatch slurm/train.sh
#     sbatch --gpus-per-node=4 --time=30 slurm/train.sh --epochs 100
#     sbatch --array=0-9%4 slurm/train.sh
#     sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh
#
# sbatch's options come before the script's name, those of `train` behind it. Each task of an array
# trains with its index as the seed, in a folder seed-INDEX of its own. With an image this file is all
# that is needed. Variables that it reads (slurm/README.md has recipes for sites):
#
#     JOB_…              options of `train`; JOB_OUTPUT_DIR is output/slurm by default, JOB_DATA_DIR data
#     CONTAINER_RUNTIME  pyxis, apptainer, podman, docker or none; auto is the first of them that has an
#                        image, or none with .venv
#     CONTAINER_IMAGE    image; by default cifar10-job.sqsh (pyxis) or cifar10-job.sif (Apptainer) where
#                        sbatch is called, or cifar10-job:VERSION on the node (podman, docker)
#     CONTAINER_ARGS     further options of the container runtime, separated by spaces
#     PYTHON             without a container: interpreter, .venv/bin/python by default
#     MAX_REQUEUES       how often the job requeues itself at most, 50 by default
#     SITE_SETUP         file that is sourced first, slurm/site.sh by default, if there is one
#
#SBATCH --job-name=cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
# Short jobs start sooner, and this one requeues itself at the limit; five minutes at least.
#SBATCH --time=01:00:00
# Two minutes before the limit Slurm sends USR1, with B: to this script alone.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# The log, slurm-JOB.out or in arrays slurm-JOB_TASK.out, keeps the attempts before this one.
#SBATCH --open-mode=append
set -uo pipefail
set +o posix # in which bash forgets a step's exit code once it was asked for

readonly IMAGE=cifar10-job:0.1.0
readonly MAX_EXCLUSIONS=3
readonly MAX_LOST_WORKERS=5
readonly CHECK='import job.commands.cli, importlib.util, sys; sys.exit(not importlib.util.find_spec("tensorflow"))'
readonly AGAIN="submit it again to go on from the last checkpoint"

say() { echo "$(date '+%F %T') slurm/train.sh: $*" >&2; }
refuse() {
  say "error: $*"
  exit 2
}

time_is_up='' terminated='' step_pid='' worker_lost='' without_gpu=''
# srun ends its step on TERM without a grace, but passes USR1 on, which asks the program for the same.
pass_on() { [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2> /dev/null; }
listen_to_signals() {
  trap 'time_is_up=yes; say "the time limit is near (SIGUSR1)"; pass_on' USR1
  trap 'terminated=yes; say "told to end (SIGTERM)"; pass_on' TERM
}

# sbatch within a job hands that job's variables on, and Slurm replaces some of them only. srun would take
# the others for options: GPUs that this job does not have, processors of another one.
forget_outer_job() {
  unset SLURM_GPUS SLURM_GPUS_PER_{NODE,SOCKET,TASK} SLURM_{CPUS,MEM,NTASKS}_PER_GPU SLURM_MEM_PER_CPU
  unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_STEP_@}"
}

# Sources the site's file, which sees the variables of this function, so that they have names of their own.
set_up_site() {
  local train_sh_site=${SITE_SETUP:-slurm/site.sh} train_sh_folder=$PWD train_sh_trap train_sh_options
  local IFS=$' \t\n'
  if [[ -e $train_sh_site ]]; then
    trap 'say "error: $train_sh_site has ended the script; have it say return instead of exit"; exit 2' EXIT
    train_sh_trap=$(trap -p EXIT) train_sh_options=$(set +o)
    set +u # not every site's modules know it
    # shellcheck source=/dev/null
    source "$train_sh_site" || say "warning: $train_sh_site ended with exit code $?"
    # With its -e this script would end at the first signal.
    eval "$train_sh_options"
    listen_to_signals
    [[ $(trap -p EXIT) != "$train_sh_trap" ]] || trap - EXIT
    cd -- "$train_sh_folder" || refuse "cannot go back to $train_sh_folder after $train_sh_site"
  elif [[ -n ${SITE_SETUP:-} ]]; then
    refuse "SITE_SETUP is $SITE_SETUP, which is not in $PWD; name a file"
  fi
}

# Sets job, attempt and nodes, their number.
identify_job() {
  local command answer
  [[ -n ${SLURM_JOB_ID:-} ]] || refuse "not started by Slurm; say sbatch slurm/train.sh"
  for command in srun scontrol sinfo; do
    command -v "$command" > /dev/null || refuse "there is no $command on $(hostname); load Slurm's" \
      "module in slurm/site.sh"
  done
  job=$SLURM_JOB_ID
  answer=$(ask_for "$job" | grep "^JobId=$job ") # which may be the number of a whole array
  if [[ $answer == *" ArrayTaskId="* ]]; then
    SLURM_ARRAY_JOB_ID=$(field ArrayJobId) SLURM_ARRAY_TASK_ID=$(field ArrayTaskId)
    export SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
  elif [[ -n $answer ]]; then
    unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID # of a task that has submitted this job
  fi
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  [[ $(field BatchFlag) != 0 ]] || refuse "started by srun or salloc; say sbatch slurm/train.sh"
  [[ $(field TimeLimit) != 00:0[0-4]:* ]] || say "warning: the time limit is $(field TimeLimit)," \
    "expected 5 minutes at least: Slurm may tell the job to stop before it has got anything done"
  attempt=$(field Restarts) || attempt=${SLURM_RESTART_COUNT:-0}
  export SLURM_RESTART_COUNT=$attempt
  nodes=${SLURM_JOB_NUM_NODES:-1}
}

# Checks the arguments of `train` and the variables, and sets output, data and record.
read_settings() {
  local argument task=${SLURM_ARRAY_TASK_ID:-}
  [[ ${MAX_REQUEUES:=50} =~ ^(0|[1-9][0-9]*)$ ]] ||
    refuse "MAX_REQUEUES is $MAX_REQUEUES, expected a number"
  for argument; do
    case ${argument%%=*} in
      --output-dir) refuse "received --output-dir; say JOB_OUTPUT_DIR=FOLDER sbatch slurm/train.sh" ;;
      --data-dir) refuse "received --data-dir; say JOB_DATA_DIR=FOLDER sbatch slurm/train.sh" ;;
      -[a-zA-Z]* | --account | --array | --begin | --chdir | --comment | --constraint | --cpus* | \
        --dependency | --error | --exclude | --exclusive | --export | --gpus* | --gres | --job-name | \
        --mail-* | --mem* | --no-requeue | --nodelist | --nodes | --ntasks* | --output | --partition | \
        --qos | --requeue | --reservation | --signal | --test-only | --time*)
        refuse "received ${argument%%=*}, an option of sbatch; say it before slurm/train.sh"
        ;;
      --seed)
        [[ -z $task ]] || refuse "received --seed in an array, whose indices are the seeds;" \
          "say --array=SEED,SEED"
        ;;
    esac
  done
  output=$(realpath -ms -- "${JOB_OUTPUT_DIR:-output/slurm}")
  data=$(realpath -ms -- "${JOB_DATA_DIR:-data}")
  if [[ -n $task ]]; then
    [[ -z ${JOB_SEED:-} ]] || refuse "JOB_SEED is $JOB_SEED in an array, whose indices are the" \
      "seeds; unset it"
    export JOB_SEED=$task
    output+=/seed-$task
  fi
  # People read the log. Where machines do, say JOB_LOG_FORMAT=json.
  export JOB_LOG_FORMAT=${JOB_LOG_FORMAT:-text}
  # A line for each time that this job has requeued itself, and for each task that has failed.
  record=$output/.slurm-$job
  endings=$record-endings
}

make_folders() {
  local folder
  for folder in "$output" "$data"; do
    mkdir -p -- "$folder" || refuse "cannot make the folder $folder; set JOB_OUTPUT_DIR and" \
      "JOB_DATA_DIR to folders that $(id -un) may write"
  done
  ((attempt)) || rm -f -- "$record" # of an older job with this number
}

# Whether a runtime is on this node.
is_here() {
  case $1 in
    pyxis) [[ $(srun --help 2>&1) == *--container-image* ]] ;;
    apptainer) command -v apptainer singularity > /dev/null ;;
    podman | docker) command -v "$1" > /dev/null ;;
    none) command -v "$python" > /dev/null ;;
  esac
}

# Prints the image for a runtime as that runtime spells it; fails where there is none for it.
image_for() {
  local runtime=$1 image=${CONTAINER_IMAGE:-} registry
  if [[ -z $image ]]; then
    case $runtime in
      pyxis) image=cifar10-job.sqsh ;;
      apptainer) image=cifar10-job.sif ;;
      podman | docker) image=$IMAGE && "$runtime" image inspect "$image" &> /dev/null || return ;;
      none) return 0 ;;
    esac
    [[ $runtime == podman || $runtime == docker || -e $image ]] || return
  fi
  case $image in
    *.sqsh) [[ $runtime == pyxis ]] && realpath -ms -- "$image" && return ;;
    *.sif) [[ $runtime == apptainer ]] && realpath -ms -- "$image" && return ;;
  esac
  case $runtime:$image in
    *.sqsh | *.sif | none:*) return 1 ;;
    apptainer:*://* | apptainer:/*) echo "$image" ;;
    apptainer:*) echo "docker://$image" ;;
    pyxis:dockerd://* | pyxis:podman://*) echo "$image" ;;
    pyxis:*)
      image=${image#docker://} registry=${image%%/*}
      # What Docker takes for the name of a registry, enroot wants before a #.
      [[ $image != */* || $registry != *[.:]* || $registry == *#* ]] || image=$registry#${image#*/}
      echo "$image"
      ;;
    *) echo "${image#docker://}" ;;
  esac
}

# Sets runtime, and image or python.
choose_runtime() {
  local here
  here=$(hostname)
  python=${PYTHON:-.venv/bin/python}
  runtime=${CONTAINER_RUNTIME:-auto}
  case ${CONTAINER_IMAGE:-} in
    *://*) ;;
    *.sqsh | *.sif)
      [[ -e $CONTAINER_IMAGE ]] || refuse "CONTAINER_IMAGE is $CONTAINER_IMAGE, which is not on $here" \
        "in $PWD; name a file that is on every node"
      ;;
  esac
  case $runtime in
    auto)
      for runtime in pyxis apptainer podman docker none; do
        is_here "$runtime" && image=$(image_for "$runtime") && return
      done
      [[ -z ${CONTAINER_IMAGE:-} ]] || refuse "nothing on $here runs the image $CONTAINER_IMAGE:" \
        "expected pyxis for a .sqsh, Apptainer for a .sif, any of them, podman or docker for a name"
      refuse_python_of_elsewhere
      refuse "received neither an image nor $python in $PWD; submit at the top of the checkout or with" \
        "--chdir=CHECKOUT, after make install LOCK=gpu, or set CONTAINER_IMAGE (slurm/README.md)"
      ;;
    none)
      [[ -z ${CONTAINER_IMAGE:-} ]] || refuse "CONTAINER_RUNTIME is none and CONTAINER_IMAGE" \
        "$CONTAINER_IMAGE; unset one"
      image=''
      is_here none && return
      refuse_python_of_elsewhere
      refuse "there is no $python in $PWD; submit at the top of the checkout or with" \
        "--chdir=CHECKOUT, after make install LOCK=gpu, or set PYTHON"
      ;;
    pyxis | apptainer | podman | docker)
      is_here "$runtime" || refuse "CONTAINER_RUNTIME is $runtime, which $here does not have; load its" \
        "module in slurm/site.sh, or name another"
      image=$(image_for "$runtime") || refuse "CONTAINER_RUNTIME is $runtime, which has no image" \
        "${CONTAINER_IMAGE:-by default} on $here; see slurm/README.md, Container runtimes"
      ;;
    *) refuse "CONTAINER_RUNTIME is $runtime, expected auto, pyxis, apptainer, podman, docker or none" ;;
  esac
}

# Refuses an interpreter that is there and cannot run here.
refuse_python_of_elsewhere() {
  [[ ! -L $python && ! -e $python ]] || refuse "$PWD has $python, which $(id -un) cannot run on $here:" \
    "it leads to $(realpath -m -- "$python"); say make install LOCK=gpu with a Python that the nodes" \
    "have too, or set PYTHON"
}

# Sets step to the command that trains, with the arguments of `train`.
build_step() {
  # Without --export=ALL, what sbatch's --export leaves out would keep from the step what is set here.
  step=(srun "--nodes=$nodes" "--ntasks=$nodes" --export=ALL)
  # The first task, which alone writes the output folder, on this node; and none waits for one that failed.
  ((nodes == 1)) || step+=(--ntasks-per-node=1 --distribution=block --kill-on-bad-exit=1)
  ((nodes == 1)) || bypass_proxy
  # srun does not take this over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
  # Of a node that is the job's alone (--exclusive) it would take as many as were asked for.
  ((nodes > 1)) || [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || step+=("--gpus=$SLURM_GPUS_ON_NODE")
  if [[ $runtime == none ]]; then
    "$python" -c "$CHECK" || refuse "$python has not all that job/ in $PWD needs; submit at the top of" \
      "the checkout, when make install LOCK=gpu is done"
    export JOB_OUTPUT_DIR=$output JOB_DATA_DIR=$data
    step+=("$python" -m job train "$@")
    return
  fi

  [[ $output$data != *[:,]* ]] || refuse "received the folders $output and $data, expected neither" \
    "colon nor comma in them, which container runtimes separate by; name others"
  export JOB_OUTPUT_DIR=/output JOB_DATA_DIR=/data
  # The image asks for one GPU, which a job without any does not have. Where Slurm gives some, it is
  # what promises their number, and fewer are an error all the same.
  export JOB_REQUIRE_GPUS=${JOB_REQUIRE_GPUS:-0}
  # Neither caches nor packages from the user's home, which a runtime may mount.
  export PYTHONNOUSERSITE=1 MPLCONFIGDIR=/tmp/cifar10-job-$SLURM_JOB_ID
  export KERAS_HOME=$MPLCONFIGDIR
  local names arguments
  mapfile -t names < <(compgen -e | grep -E -i -x \
    '(job|slurm|slurmd|tf|nccl)_.*|(https?|no|all)_proxy|pythonnousersite|mplconfigdir|keras_home|tz')
  # By which the tasks find each other; srun sets them in each task.
  names+=(SLURM_STEP_NUM_TASKS SLURM_STEP_NODELIST SLURM_STEP_TASKS_PER_NODE)
  names+=(SLURM_PROCID SLURM_NODEID SLURM_LOCALID)
  mapfile -t names < <(printf '%s\n' "${names[@]}" | sort -u)
  read -r -d '' -a arguments <<< "${CONTAINER_ARGS:-}"
  case $runtime in
    pyxis) add_pyxis "$@" ;;
    apptainer) add_apptainer "$@" ;;
    podman) add_podman "$@" ;;
    docker) add_docker "$@" ;;
  esac
}

# Keeps gRPC from asking a proxy for the way to other nodes, where it would wait in vain.
bypass_proxy() {
  local hosts
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ,)
  no_proxy=${no_proxy:-${NO_PROXY:-}}
  export no_proxy=${no_proxy:+$no_proxy,}${hosts%,}
}

add_pyxis() {
  [[ $output$data =~ ^[[:alnum:]_./@+-]+$ ]] || refuse "received the folders $output and $data, expected" \
    "letters, digits and _./@+- in them for pyxis; name others"
  [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || names+=(CUDA_VISIBLE_DEVICES)
  # Every variable comes along, and the libraries of the host's modules are not the image's.
  unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME
  # Where both host and image have a variable, the host's wins if --container-env names it.
  step+=(
    "--container-image=$image" "--container-mounts=$output:/output,$data:/data"
    --container-workdir=/app --no-container-mount-home --no-container-remap-root
    --no-container-entrypoint "--container-env=$(IFS=, && echo "${names[*]}")"
    "${arguments[@]}" python -m job train "$@"
  )
}

add_apptainer() {
  local command=apptainer
  command -v apptainer > /dev/null || command=singularity
  names+=(CUDA_VISIBLE_DEVICES)
  in_each_task "$command"
  step+=(
    "$command" exec --nv --cleanenv --no-home --pwd /app
    --bind "$output:/output" --bind "$data:/data"
    "${arguments[@]}" "$image" python -m job train "$@"
  )
}

# Exports the variables in names under the names by which Apptainer lets them in.
# shellcheck disable=SC2329 # each task calls it
name_for_apptainer() {
  local name
  for name in "${names[@]}"; do
    [[ -z ${!name+set} ]] || export "${1^^}ENV_$name=${!name}"
  done
}

add_podman() {
  local options=()
  ((UID == 0)) || options+=(--userns keep-id)
  add_engine "$@"
}

add_docker() {
  local group options=()
  for group in $(id -G); do options+=(--group-add "$group"); done
  add_engine "$@"
}

# podman or docker, which each task gives the job's GPUs alone.
add_engine() {
  local name variables=()
  for name in "${names[@]}"; do variables+=(--env "$name"); done
  # In which the nodes' names and addresses hold. A runtime takes one network.
  ((nodes == 1)) || [[ " ${arguments[*]} " == *" --net"@(|work)[=\ ]* ]] || options+=(--network host)
  in_each_task "$runtime"
  step+=(
    "$runtime" run --rm --label "slurm-job=$SLURM_JOB_ID" --user "$(id -u):$(id -g)"
    --security-opt label=disable --shm-size 1g
    --volume "$output:/output" --volume "$data:/data"
    "${variables[@]}" "${options[@]}" "${arguments[@]}" "$image" train "$@"
  )
}

# Sets gpus to the options of podman or docker for the task's GPUs, which they number anew inside.
# shellcheck disable=SC2329 # each task calls it
choose_gpus() {
  local gpu list
  if [[ $1 == podman ]]; then
    for gpu in $(job_gpus); do gpus+=(--device "nvidia.com/gpu=$gpu"); done
    return
  fi
  list=$(job_gpus | tr '\n' ,)
  if [[ -n $list ]]; then
    gpus=(--gpus "\"device=${list%,}\"")
  else
    gpus=(--env NVIDIA_VISIBLE_DEVICES=void) # CUDA's images ask for all
  fi
}

# Prints the job's GPUs, one a line, for runtimes that Slurm does not confine. Slurm's numbers follow the
# device nodes and theirs the bus, so UUIDs are better, where they can be known to be the job's.
# shellcheck disable=SC2329 # each task calls it
job_gpus() {
  local uuids
  [[ -n ${SLURM_JOB_GPUS:-} ]] || return
  if [[ ${CUDA_VISIBLE_DEVICES:-} == @(GPU|MIG)-* ]]; then
    uuids=${CUDA_VISIBLE_DEVICES//,/$'\n'}
  else
    uuids=$(nvidia-smi --query-gpu=uuid --format=csv,noheader 2> /dev/null)
    (($(grep -c . <<< "$uuids") == ${SLURM_GPUS_ON_NODE:-0})) || uuids=''
  fi
  echo "${uuids:-${SLURM_JOB_GPUS//,/$'\n'}}"
}

# Adds to the step what each of its tasks does before it becomes the command that follows, in which
# variables and GPUs are of the task and its node. This file is not on every node.
in_each_task() {
  step+=(
    bash -c "$(declare -f become name_for_apptainer choose_gpus job_gpus run_engine); become \"\$@\""
    "$1" "$output" "$data" "${names[*]}"
  )
}

# In a task: becomes the command of a container runtime, or runs it.
# shellcheck disable=SC2329 # each task calls it
become() {
  local runtime=$0 gpus=() names
  mkdir -p -- "$1" "$2" || exit 2
  read -r -a names <<< "$3"
  shift 3
  case $runtime in
    podman | docker)
      export SLURM_JOB_GPUS=${SLURM_STEP_GPUS:-} # has come along from the first node
      choose_gpus "$runtime"
      run_engine "${gpus[@]}" "${@:3}"
      ;;
    *)
      name_for_apptainer "$runtime"
      exec "$@"
      ;;
  esac
}

# In a task: podman or docker to the container's end. What Slurm sends to all processes of a step does not
# always get through them: podman passes it on by a process that it hits, too. So this tells the container,
# and again, because one that is just starting is deaf at first.
# shellcheck disable=SC2329 # each task calls it
run_engine() {
  local name=cifar10-job-$SLURM_JOB_ID-$$ told=''
  trap 'told=yes' INT TERM USR1
  "$runtime" run --name "$name" "$@" &
  while kill -0 $! 2> /dev/null; do
    [[ -z $told ]] || "$runtime" kill --signal USR1 "$name" &> /dev/null
    sleep 1
  done
  wait $!
}

# Runs the step to its end, whatever signals come meanwhile, and sets code.
run_step() {
  code=75
  [[ -z $time_is_up$terminated ]] || return
  if ((nodes == 1)); then
    "${step[@]}" &
    step_pid=$!
  else
    exec {log}> >(note_endings)
    filter_pid=$!
    "${step[@]}" 2>&"$log" &
    step_pid=$!
    exec {log}>&-
  fi
  # One that came in between.
  [[ -z $time_is_up$terminated ]] || pass_on
  # A trap ends wait, too.
  while kill -0 "$step_pid" 2> /dev/null; do wait "$step_pid"; done
  wait "$step_pid"
  code=$?
  step_pid=''
  if ((nodes > 1)); then
    while kill -0 "$filter_pid" 2> /dev/null; do wait "$filter_pid"; done
    weigh_endings
  fi
}

# Hands on what the step says, and notes what srun says of tasks that failed (exit code and nodes), and
# whether a task has missed another.
note_endings() {
  local line said='srun: error: ([^ ]+): tasks? [0-9,-]+: (.+)$' where how
  trap '' USR1 TERM # of which the last words are still to come
  export LC_ALL=C
  # Above all srun needs somebody to talk to.
  { : > "$endings"; } 2> /dev/null || endings=/dev/null
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line" >&2
    if [[ $line == *'cifar10-job: stopped: '@(lost|missing)' worker'* ]]; then
      echo worker
    elif [[ $line =~ $said ]]; then
      where=${BASH_REMATCH[1]} how=${BASH_REMATCH[2]}
      case $how in
        'Exited with exit code '*) echo "${how##* } $where" ;;
        'Illegal instruction'*) echo "132 $where" ;;
        Aborted*) echo "134 $where" ;;
        'Bus error'*) echo "135 $where" ;;
        'Floating point exception'*) echo "136 $where" ;;
        Killed* | 'Out Of Memory'*) echo "137 $where" ;;
        'User defined signal 1'*) echo "138 $where" ;;
        'Segmentation fault'*) echo "139 $where" ;;
        Terminated*) echo "143 $where" ;;
      esac
    fi
  done > "$endings"
}

# Sets code to the one among several that decides, which srun's, the highest, need not be; and worker_lost,
# and without_gpu, the nodes of tasks that ended with 3.
weigh_endings() {
  local ending where weight heaviest=0 killed=''
  [[ -f $endings ]] || return 0
  while read -r ending where; do
    case $ending in
      worker) worker_lost=yes weight=0 ;;
      2) weight=6 ;;
      3) weight=5 without_gpu+=${without_gpu:+,}$where ;;
      1) weight=4 ;;
      75)
        weight=1
        # Of a step with a killed task srun may drop the last words.
        [[ -z $killed ]] || worker_lost=yes
        ;;
      137 | 143)
        weight=0 # after another ending it is srun's doing
        ((heaviest)) || weight=2 killed=yes
        ;;
      *) if is_signal "$ending"; then weight=2; else weight=3; fi ;;
    esac
    if ((weight > heaviest)); then heaviest=$weight code=$ending; fi
  done < "$endings"
  rm -f -- "$endings"
}

# Whether an exit code tells of a signal. Apptainer and srun end with 255 where they fail themselves.
is_signal() { (($1 > 128 && $1 <= 128 + 64)); }

# Ends this script, and with it the job unless that is requeued.
finish() {
  local answer state restarts preempted
  [[ $runtime == none ]] || rm -rf -- "$MPLCONFIGDIR"
  answer=$(ask_for "$job")
  # First of all: where this node was taken for dead and the job goes on elsewhere, srun breaks off, and
  # its exit code says nothing of the training.
  if ! restarts=$(field Restarts); then
    say "exit code $code, not requeued, because Slurm says nothing of job $job; $AGAIN"
    exit "$code"
  elif ((restarts != attempt)); then
    say "attempt $attempt of job $job is over; Slurm has requeued the job as attempt $restarts"
    exit "$code"
  fi
  # Not before, since on a node that was taken for dead the training is to go on until it is replaced.
  [[ $runtime != @(podman|docker) ]] || end_containers
  state=$(field JobState)
  preempted=$(field PreemptTime) || preempted=None # without preemption there is no such field
  if ((code == 0)); then
    say "job $job is done"
  elif ((code == 2)); then
    say "exit code 2, not requeued: the error above says what to change"
  elif [[ $state != RUNNING ]]; then
    say "job $job was cancelled or ended from outside (Slurm: $state); $AGAIN"
  elif [[ -n $terminated && $preempted == None ]]; then
    say "stopped by SIGTERM, not requeued; $AGAIN"
  elif ((code == 3)); then
    replace_nodes
  elif ((code == 1)); then
    requeue defect 1 "exit code 1"
  elif [[ $preempted != None ]]; then
    # Slurm requeues what it preempts, unless it ends before its grace time does.
    requeue preemption "$MAX_REQUEUES" "preempted"
  elif [[ -n $time_is_up ]] && ((code == 75 || code == 128 + 10)); then # SIGUSR1, before it was heard
    requeue time "$MAX_REQUEUES" "stopped for the time limit"
  elif [[ -n $worker_lost ]] && { ((code == 75)) || is_signal "$code"; }; then
    requeue worker "$MAX_LOST_WORKERS" "a worker was lost or missing (exit code $code)"
  elif ((code == 75)); then
    say "exit code 75, not requeued: it was not Slurm's time limit that stopped it; $AGAIN"
  elif is_signal "$code"; then
    requeue defect 1 "killed by signal $((code - 128))"
  else
    say "exit code $code of srun or $runtime, not requeued: see the error above"
  fi
  rm -f -- "$record"
  exit "$code"
}

# Ends what podman or docker leave on this node when they are killed, with a checkpoint.
end_containers() {
  local containers
  mapfile -t containers < <("$runtime" ps --quiet --filter "label=slurm-job=$SLURM_JOB_ID")
  ((${#containers[@]} == 0)) || "$runtime" stop --time 20 "${containers[@]}" > /dev/null
}

# Prints what Slurm says of a job, in one line.
ask_for() { persist scontrol --oneliner show job "$1"; }

# Prints a field of the answer; fails where there is none.
field() { [[ $answer =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }

# Slurm's controller may be restarting.
persist() { "$@" || { sleep 5 && "$@"; } || { sleep 10 && "$@"; }; }

# Requeues the job, by a command if one is named, at most so many times for one cause and MAX_REQUEUES in
# all, and ends this script. Returns where that is not to be or fails. Incomplete keeps Slurm from requeueing
# a job that somebody has cancelled meanwhile.
requeue() {
  local cause=$1 limit=$2 reason=$3 of_cause in_all
  (($# > 3)) || set -- "$@" scontrol requeue Incomplete "$job"
  of_cause=$(grep -c -s "^$cause " "$record") in_all=$(grep -c -s . "$record")
  if [[ $(field Requeue) == 0 ]]; then
    say "$reason, not requeued: the job was submitted with --no-requeue; $AGAIN"
  elif ((of_cause >= limit || in_all >= MAX_REQUEUES)); then
    say "$reason, not requeued: the job has requeued itself ${in_all:-0} times (at most $MAX_REQUEUES)," \
      "${of_cause:-0} times for this cause (at most $limit); see the error above, if any, or $AGAIN"
  elif ! echo "$cause in attempt $attempt" >> "$record"; then
    say "$reason, not requeued, because $record cannot be written; $AGAIN"
  else
    say "$reason; requeueing ($((in_all + 1)) of at most $MAX_REQUEUES), which Slurm reports as cancelled"
    # Slurm ends this script, and whatever it has started, together with the attempt.
    trap '' TERM
    persist "${@:4}" && exit "$code"
    say "could not requeue by ${*:4}; $AGAIN"
  fi
}

# Requeues the job for other nodes than those that lack a GPU that Slurm has promised.
replace_nodes() {
  local node=$without_gpu excluded others=''
  ((nodes > 1)) || node=${SLURMD_NODENAME:-$(hostname)}
  if ((${SLURM_GPUS_ON_NODE:-0} == 0)); then
    say "exit code 3, not requeued: Slurm was asked for no GPU; say sbatch --gpus-per-node=1"
    return
  elif [[ -z $node ]]; then
    say "exit code 3, not requeued: srun has not said on which node; see the error above, then say" \
      "sbatch --exclude=NODE"
    return
  fi
  excluded=$(field ExcNodeList)
  excluded=${excluded/#'(null)'/}
  excluded+=${excluded:+,}$node
  if [[ $(field ReqNodeList) == '(null)' ]]; then
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N |
      grep -v -x -F -f <(scontrol show hostnames "$excluded"))
  fi
  if (($(grep -c . <<< "$others") < nodes)); then
    say "exit code 3, not requeued: a GPU is missing on node $node, and the job has no other to go to" \
      "than $excluded; have them examined, or say sbatch --gpus-per-node=0 to train on processors"
    return
  fi
  requeue gpu "$MAX_EXCLUSIONS" "exit code 3: a GPU is missing on node $node" hold_and_exclude
}

# Held until the node is excluded, which Slurm permits only while the job does not run.
# shellcheck disable=SC2329 # requeue calls it
hold_and_exclude() {
  scontrol requeuehold Incomplete "$job" || return
  if persist scontrol update "JobId=$job" "ExcNodeList=$excluded" && persist scontrol release "$job"; then
    say "it waits for another node than $excluded; squeue tells why it does not start"
  else
    say "job $job is held, because node $node could not be excluded; see to that node, then say" \
      "scontrol release $job"
  fi
}

listen_to_signals
forget_outer_job
set_up_site
identify_job
read_settings "$@"
choose_runtime
make_folders
build_step "$@"
place=${SLURMD_NODENAME:-$(hostname)}
((nodes == 1)) || place="$nodes nodes ${SLURM_JOB_NODELIST:-}"
say "job $job, attempt $attempt on $place: runtime $runtime${image:+ with $image}," \
  "output $output, data $data, ${SLURM_GPUS_ON_NODE:-0} GPU(s)"
run_step
finish
