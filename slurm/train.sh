#!/usr/bin/env bash
# Trains under Slurm, and requeues the job as long as the run makes progress (slurm/README.md). Submit it at
# the top of the checkout, with options of sbatch before the script's name and options of `train` after it:
#
#     sbatch slurm/train.sh
#     sbatch --gpus-per-node=4 --time=30 slurm/train.sh --epochs 100
#     sbatch --array=0-9%4 slurm/train.sh  # seeds 0 to 9, each in a folder seed-N of its own
#     sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh
#     CONTAINER_IMAGE=cifar10-job.sif sbatch slurm/train.sh
#
#SBATCH --job-name=cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
# Short jobs start sooner, and this one requeues itself at the limit.
#SBATCH --time=01:00:00
# Two minutes before the limit Slurm signals the tasks. They save a checkpoint and end with exit code 75.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# No trap is needed: Slurm signals the tasks itself, at the time limit as well as for scancel, preemption and
# scontrol requeue. The last three may end this script at once; Slurm waits for the tasks all the same (KillWait).

log() { echo "$(date '+%F %T') slurm/train.sh: $*" >&2; }
refuse() { log "error: $*"; exit 2; }
# Prints one field of Slurm's record of this job, or nothing. Asks three times, as the controller may restart.
job_field() {
  local seconds record
  for seconds in 0 5 15; do
    sleep "$seconds"
    record=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ") || continue
    [[ $record =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"
    return
  done
}
# Prints the step of the newest checkpoint.
newest_step() {
  find "$output/checkpoints" -name '[0-9]*.npz' 2> /dev/null | grep -oE 'step-[0-9]+' | sort | tail -n 1 |
    grep . || echo none
}

# --- The job ---
[[ -n ${SLURM_JOB_ID:-} && $(job_field BatchFlag) == 1 ]] ||
  refuse "not run by sbatch; submit it with: sbatch slurm/train.sh"
# shellcheck source=/dev/null
[[ ! -e slurm/site.sh ]] || source slurm/site.sh
# A job submitted from within another job inherits variables that srun takes for its own options.
unset SLURM_GPUS SLURM_GPUS_PER_{NODE,SOCKET,TASK} SLURM_{CPUS,MEM,NTASKS}_PER_GPU SLURM_MEM_PER_CPU
unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_ARRAY_{JOB,TASK}_ID
job=$SLURM_JOB_ID attempt=$(job_field Restarts) task=$(job_field ArrayTaskId)
output=$(realpath -ms -- "${JOB_OUTPUT_DIR:-output/slurm}") data=$(realpath -ms -- "${JOB_DATA_DIR:-data}")
if [[ -n $task ]]; then
  export SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID=$task JOB_SEED=$task
  SLURM_ARRAY_JOB_ID=$(job_field ArrayJobId)
  job=${SLURM_ARRAY_JOB_ID}_$task output+=/seed-$task
fi
mkdir -p -- "$output" "$data" || refuse "cannot make these folders; set JOB_OUTPUT_DIR and JOB_DATA_DIR"

# --- The command of a task ---
image=${CONTAINER_IMAGE:-} python=${PYTHON:-.venv/bin/python}
case $image in
  '') runtime=none ;;
  *.sif) runtime=apptainer ;;
  *.sqsh) runtime=pyxis ;;
  *) runtime=${CONTAINER_RUNTIME:-} ;;
esac
[[ $image != *.@(sif|sqsh) ]] || image=$(realpath -ms -- "$image")
[[ $image != *.@(sif|sqsh) || -e $image ]] ||
  refuse "CONTAINER_IMAGE is $image, which is not on $(hostname); name a file that every node can read"
[[ " $* " != *" --"@(output-dir|data-dir${task:+|seed})* ]] || refuse "received $*; set JOB_OUTPUT_DIR or" \
  "JOB_DATA_DIR instead of --output-dir or --data-dir, and no --seed in an array, whose indices are the seeds"
export SLURM_RESTART_COUNT=$attempt JOB_OUTPUT_DIR=$output JOB_DATA_DIR=$data JOB_LOG_FORMAT=${JOB_LOG_FORMAT:-text}
if [[ $runtime != none ]]; then
  # An image requires one GPU by itself; here the number that Slurm gives to the job is required.
  export JOB_OUTPUT_DIR=/output JOB_DATA_DIR=/data JOB_REQUIRE_GPUS=${JOB_REQUIRE_GPUS:-0}
  # Not the user's home, which the image does not show, nor the node's /tmp, where they would stay.
  export MPLCONFIGDIR=/output/.cache KERAS_HOME=/output/.cache
fi
# The variables that a container needs from outside.
needed='(job|slurm|slurmd|tf|nccl)_.*|cuda_visible_devices|mplconfigdir|keras_home|(https?|no|all)_proxy|tz'
case $runtime in
  none)
    "$python" -c 'import job.commands.cli' || refuse "$python cannot import job/ in $PWD; submit at the top of" \
      "the checkout after make install LOCK=gpu, or set CONTAINER_IMAGE"
    command=("$python" -m job train)
    ;;
  apptainer)
    # It lets in a variable NAME as APPTAINERENV_NAME, and each task has its own values. By exec it gets signals.
    # shellcheck disable=SC2016
    prepare='for name in $(compgen -e | grep -Eix "$0"); do export "APPTAINERENV_$name=${!name}"; done; exec "$@"'
    command=(bash -c "$prepare" "$needed" apptainer exec --nv --cleanenv --no-home --no-mount cwd --pwd /app
      --bind "$output:/output" --bind "$data:/data" "$image" python -m job train)
    ;;
  pyxis)
    # It lets in all variables. Those named here replace the image's own.
    unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME
    command=("--container-image=$image" "--container-mounts=$output:/output,$data:/data" --container-workdir=/app
      --no-container-mount-home --no-container-remap-root --no-container-entrypoint
      "--container-env=$(compgen -e | grep -Eix "$needed" | paste -sd,)" python -m job train)
    ;;
  *) refuse "CONTAINER_RUNTIME is '$runtime' for $image, expected apptainer or pyxis" ;;
esac

# --- One task on each node, with all of its GPUs, the first one beside this script ---
# The steps that the attempts of this job started from, a line each.
progress=$output/.slurm-$job
[[ $attempt != 0 && -e $progress ]] || newest_step > "$progress" || refuse "cannot write $progress"
log "job $job, attempt $attempt on $SLURM_JOB_NODELIST: ${image:-$python}, ${SLURM_GPUS_ON_NODE:-0} GPUs a node," \
  "output $output, data $data"
code=0
# With --export=ALL the tasks get all variables, even where sbatch --export names only some.
srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --distribution=block \
  ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  ${SLURM_GPUS_ON_NODE:+"--gpus=$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))"} \
  --kill-on-bad-exit=1 --export=ALL "${command[@]}" "$@" || code=$?

# --- Requeue the job? ---
finish() { rm -f -- "$progress"; log "job $job: exit code $code, $*"; exit "$code"; }
((code != 0)) || finish "done"
((code != 2)) || finish "not requeued; the error above states what to change"
# Slurm decides where it has ended this attempt, or has given up this node and started the job elsewhere.
[[ $(job_field JobState) == RUNNING && $(job_field Restarts) == "$attempt" ]] || exit "$code"
step=$(newest_step)
(($(grep -cxF -- "$step" "$progress") < 2)) ||
  finish "not requeued; two attempts in a row ended at the same checkpoint ($step), see the errors above"
echo "$step" >> "$progress"
excluded=$(job_field ExcNodeList) excluded=${excluded#'(null)'}
if ((code == 3)); then # a GPU is missing, which another node may have
  excluded+=${excluded:+,}$SLURM_JOB_NODELIST
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
    grep -cvxFf <(scontrol show hostnames "$excluded"))
  [[ $(job_field ReqNodeList) == '(null)' ]] || others=0
  ((others >= SLURM_JOB_NUM_NODES)) || finish "not requeued; a GPU is missing on $excluded, and the job has" \
    "no other nodes to go to"
  # Slurm lets only a waiting job exclude nodes, and ends this script before it waits.
  trap '' TERM
fi
log "job $job: exit code $code, requeued from $step${excluded:+, not on $excluded};" \
  "Slurm reports this attempt as cancelled"
if ((code == 3)); then
  scontrol requeuehold Incomplete "$job" && scontrol update "JobId=$job" "ExcNodeList=$excluded" &&
    scontrol release "$job"
else
  scontrol requeue Incomplete "$job"
fi && exit "$code"
finish "not requeued, or held, for Slurm's reason above; submit the job again to resume"
