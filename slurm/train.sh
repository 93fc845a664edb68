#!/usr/bin/env bash
# Trains under Slurm and requeues the job as long as the run makes progress (see slurm/README.md). Submit it at the
# top of the checkout, with options of sbatch before the script's name and options of `train` after it:
#
#     sbatch slurm/train.sh
#     sbatch --gpus-per-node=4 --time=30 slurm/train.sh --epochs 100
#     sbatch --array=0-9%4 slurm/train.sh  # seeds 0 to 9, each in its own folder seed-N
#     sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh
#     CONTAINER_IMAGE=cifar10-job.sif sbatch slurm/train.sh
#
#SBATCH --job-name=cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
# Short jobs start sooner, and this job requeues itself at the limit.
#SBATCH --time=01:00:00
# Two minutes before the limit, Slurm signals the tasks. They save a checkpoint and exit with code 75.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# The script forwards no signals: Slurm itself signals the tasks, at the time limit and for scancel, preemption and
# scontrol requeue. The last three can end this script at once, but Slurm still waits for the tasks (KillWait).
log() { echo "$(date '+%F %T') slurm/train.sh: $*" >&2; }
refuse() { log "error: $*"; exit 2; }
# Reads Slurm's record of this job. Retries for a few minutes, because the controller may be restarting.
read_record() {
  local seconds
  for seconds in 0 5 30 120; do
    sleep "$seconds"
    record=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ") && return
  done
}
field() { [[ $record =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }
newest_step() {
  find "$output/checkpoints" -name '[0-9]*-step-*.npz' -printf '%f\n' 2> /dev/null |
    grep -oE 'step-[0-9]+' | sort | tail -n 1 | grep . || echo "the start"
}

# --- The job ---
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "not run by sbatch; submit it with: sbatch slurm/train.sh"
# A job submitted from within another job inherits variables that srun would interpret as its own options.
unset SLURM_GPUS SLURM_GPUS_PER_{NODE,SOCKET,TASK} SLURM_{CPUS,MEM,NTASKS}_PER_GPU SLURM_MEM_PER_CPU
unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_ARRAY_{JOB,TASK}_ID
options=("$@") && set --
# shellcheck source=/dev/null
[[ ! -e slurm/site.sh ]] || source slurm/site.sh
set +eu +o pipefail # site.sh may have set them
read_record || { log "error: Slurm has not answered, see above; submit the job again"; exit 75; }
[[ $(field BatchFlag) == 1 ]] || refuse "run by salloc or srun; submit it with: sbatch slurm/train.sh"
job=$SLURM_JOB_ID attempt=$(field Restarts) task=$(field ArrayTaskId)
output=$(realpath -ms -- "${JOB_OUTPUT_DIR:-output/slurm}") data=$(realpath -ms -- "${JOB_DATA_DIR:-data}")
if [[ -n $task ]]; then
  export SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID=$task JOB_SEED=$task
  SLURM_ARRAY_JOB_ID=$(field ArrayJobId)
  job=${SLURM_ARRAY_JOB_ID}_$task output+=/seed-$task
fi
[[ " ${options[*]} " != *" --"@(output|data)-dir* ]] ||
  refuse "received --output-dir or --data-dir; set JOB_OUTPUT_DIR or JOB_DATA_DIR instead"
[[ -z $task || " ${options[*]} " != *" --seed"* ]] ||
  refuse "received --seed in an array; remove it: the index of each task is its seed"

# --- The command that each task runs ---
image=${CONTAINER_IMAGE:-} python=${PYTHON:-.venv/bin/python}
case $image in
  '') runtime=none ;;
  *.sif) runtime=apptainer image=$(realpath -ms -- "$image") ;;
  *.sqsh) runtime=pyxis image=$(realpath -ms -- "$image") ;;
  *)
    runtime=${CONTAINER_RUNTIME:-}
    [[ $runtime == @(apptainer|pyxis) ]] ||
      refuse "received CONTAINER_RUNTIME '$runtime' for $image, expected apptainer or pyxis; set it, or use a" \
        ".sif or .sqsh file"
    ;;
esac
[[ $image != *.@(sif|sqsh) || -e $image ]] ||
  refuse "CONTAINER_IMAGE is $image, which does not exist on $(hostname);" \
    "use a file that every node can read"
export SLURM_RESTART_COUNT=$attempt JOB_OUTPUT_DIR=$output JOB_DATA_DIR=$data JOB_LOG_FORMAT=${JOB_LOG_FORMAT:-text}
if [[ $runtime != none ]]; then
  # By default an image requires one GPU; here the program requires the number that Slurm allocates to the job.
  export JOB_OUTPUT_DIR=/output JOB_DATA_DIR=/data JOB_REQUIRE_GPUS=${JOB_REQUIRE_GPUS:-0}
fi
passed='(job|slurm|slurmd|tf|nccl)_.*|cuda_visible_devices|(https?|no|all)_proxy|tz'
case $runtime in
  none)
    PYTHONSAFEPATH=1 "$python" -c 'import job.commands.cli' ||
      refuse "PYTHON is $python, which cannot import the program; submit at the top of the checkout" \
        "after make install LOCK=gpu, or set CONTAINER_IMAGE"
    command=(env PYTHONSAFEPATH=1 "$python" -m job train) # do not import files of the current folder
    ;;
  apptainer)
    # Apptainer sets NAME in the container from APPTAINERENV_NAME. The task exports these, because the values differ
    # between tasks. exec lets Apptainer receive the task's signals.
    # shellcheck disable=SC2016
    prepare='for name in $(compgen -e | grep -Eix "$0"); do export "APPTAINERENV_$name=${!name}"; done; exec "$@"'
    command=(bash -c "$prepare" "$passed" apptainer exec --nv --cleanenv --no-home --no-mount cwd --pwd /app
      --bind "$output:/output" --bind "$data:/data" "$image" python -m job train)
    ;;
  pyxis)
    # pyxis passes all variables. Those in --container-env override the image's own.
    unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME
    command=("--container-image=$image" "--container-mounts=$output:/output,$data:/data" --container-workdir=/app
      --no-container-mount-home --no-container-remap-root --no-container-entrypoint
      "--container-env=$(compgen -e | grep -Eix "$passed" | paste -sd,)" python -m job train)
    ;;
esac

# --- One task per node, with all of the job's GPUs there; the first task runs on the same node as this script ---
mkdir -p -- "$output" "$data" || refuse "cannot create $output or $data; set JOB_OUTPUT_DIR and JOB_DATA_DIR"
# The steps that the attempts of this job started from, one per line.
progress=$output/.slurm-$job
[[ $attempt != 0 && -e $progress ]] || newest_step > "$progress" || refuse "cannot write $progress"
log "job $job, attempt $attempt on $SLURM_JOB_NODELIST: ${image:-$python}, GPUs per node: ${SLURM_GPUS_ON_NODE:-0}," \
  "output $output, data $data"
code=0 gpus=()
# With --exclusive the job gets all GPUs of its node, but a step by default only those that sbatch requested.
((SLURM_JOB_NUM_NODES > 1 || ${SLURM_GPUS_ON_NODE:-0} == 0)) || gpus=("--gpus=$SLURM_GPUS_ON_NODE")
# With --export=ALL the tasks get all variables, even if sbatch --export lists only some.
srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --distribution=block \
  ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  "${gpus[@]}" --kill-on-bad-exit=1 --export=ALL "${command[@]}" "${options[@]}" || code=$?

# --- Requeue the job? ---
finish() { rm -f -- "$progress"; log "job $job: exit code $code, $*"; exit "$code"; }
((code != 0)) || finish "done"
((code != 2)) || finish "not requeued; the error above states what to change"
# Leave the decision to Slurm if it has ended this attempt, or has given up this node and started the job elsewhere.
read_record
[[ $(field JobState) == RUNNING && $(field Restarts) == "$attempt" ]] ||
  { log "job $job: exit code $code; Slurm has ended this attempt, or does not answer"; exit "$code"; }
step=$(newest_step) seen=$(grep -cxF -- "$step" "$progress")
((${seen:-0} < 2)) ||
  finish "not requeued; two attempts in a row made no progress after $step, see the errors above"
echo "$step" >> "$progress" || finish "not requeued; cannot write $progress"
if ((code == 3)); then # a GPU is missing here; another node may have it
  excluded=$(field ExcNodeList) excluded=${excluded#'(null)'} excluded+=${excluded:+,}$SLURM_JOB_NODELIST
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
    grep -cvxFf <(scontrol show hostnames "$excluded"))
  [[ $(field ReqNodeList) == '(null)' ]] || others=0
  ((others >= SLURM_JOB_NUM_NODES)) ||
    finish "not requeued; a GPU is missing on $SLURM_JOB_NODELIST, and the job cannot run on other nodes"
fi
log "job $job: exit code $code, requeueing from $step${excluded:+, not on $excluded};" \
  "Slurm reports this attempt as cancelled"
trap '' TERM # Slurm now ends this script with SIGTERM
scontrol requeue Incomplete "$job" || finish "not requeued because of Slurm's error above; submit it again to resume"
# Slurm changes a job's excluded nodes only while the job is pending.
((code != 3)) || scontrol update "JobId=$job" "ExcNodeList=$excluded"
exit "$code"
