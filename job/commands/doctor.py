"""Checks of a machine before a run: versions, GPUs, test computations, folders."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow as tf

from job import log
from job.cluster.devices import Devices, graph_function, open_visible_devices
from job.cluster.gpus import (
    ExpectedGpus,
    check_expected_gpus,
    cuda_libraries,
    expected_gpus,
    visible_gpus,
    xla_tools,
)
from job.commands.terminal import write_lines
from job.config import ExitCode, JobError, TrainConfig
from job.environment import remedy
from job.log import plural
from job.run.folder import free_bytes
from job.run.manifest import versions
from job.run.stop import Watchdog

TEST_SECONDS = 300.0
"""Time limit for all test computations together, including compilation."""


def print_examination(
    folders: Iterable[tuple[str, Path]], require_gpus: int, startup_lines: list[str]
) -> ExitCode:
    """Check this machine and print the findings, as a JSON object or as text.

    Args:
        folders: Pairs of option name and folder to check.
        require_gpus: GPUs that must be visible.
        startup_lines: Lines that TensorFlow printed while it detected GPUs.

    Returns:
        GPU_MISSING if an expected or required GPU cannot be used, otherwise DONE.
    """
    visible = len(visible_gpus())
    gpu_findings = []
    expected = ExpectedGpus(0, "nothing")
    try:
        expected = expected_gpus(os.environ)
        check_expected_gpus(expected, visible, require_gpus)
    except JobError as error:
        gpu_findings.append(str(error))
    devices = open_visible_devices(TrainConfig())
    # Broken collectives hang. That is a finding too, but nothing can be checked after it.
    watchdog = Watchdog(TEST_SECONDS, on_stall=lambda: os._exit(ExitCode.GPU_MISSING))
    with watchdog.watch("a test computation"):
        computations = [*_convolve_everywhere(devices), _all_reduce(devices)]
    gpu_findings += [result["problem"] for result in computations if result["problem"]]
    described = [_describe_folder(option, folder) for option, folder in folders]
    folder_findings = [
        f"{folder['option']} {folder['path']} {folder['problem']}"
        for folder in described
        if folder["problem"]
    ]
    build = tf.sysconfig.get_build_info()
    report = {
        "versions": versions()
        | {key: str(build[key]) for key in ("cuda_version", "cudnn_version") if key in build},
        "gpus": {
            "expected": expected.count,
            "expected_by": expected.source,
            "required": require_gpus,
            "visible": visible,
            "libraries": [{"name": n, "path": p} for n, p in cuda_libraries().items()],
            "tools": [{"name": n, "path": p} for n, p in xla_tools().items()],
            "tensorflow_says": startup_lines if visible < max(expected.count, require_gpus) else [],
        },
        "devices": [msgspec.to_builtins(device) for device in devices.descriptions],
        "precision": devices.precision,
        "computations": computations,
        "folders": described,
        "findings": [*gpu_findings, *folder_findings],
    }
    write_lines([json.dumps(report) if log.is_json() else as_text(report)])
    return ExitCode.GPU_MISSING if gpu_findings else ExitCode.DONE


def as_text(report: dict[str, Any]) -> str:
    """Format a report as text."""
    gpus = report["gpus"]
    lines = [
        "Versions     " + ", ".join(f"{name} {text}" for name, text in report["versions"].items()),
        f"GPUs         {gpus['visible']} visible, {gpus['expected']} expected "
        f"({gpus['expected_by']}), {gpus['required']} required",
    ]
    if gpus["visible"] or gpus["expected"] or gpus["required"]:
        for library in gpus["libraries"]:
            lines.append(f"  library    {library['name']}: {library['path'] or 'not found'}")
        for tool in gpus["tools"]:
            lines.append(f"  XLA tool   {tool['name']}: {tool['path'] or 'not found'}")
    for line in gpus["tensorflow_says"]:
        lines.append(f"  TensorFlow {line}")
    for device in report["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
        lines.append(f"Device       {device['name']}: {details}")
    lines.append(f"Precision    {report['precision']} with --precision auto")
    for result in report["computations"]:
        lines.append(f"Test         {result['what']}: {result['problem'] or 'ok'}")
    for folder in report["folders"]:
        free = f", {folder['free_gib']} GiB free" if folder["free_gib"] is not None else ""
        state = folder["problem"] or f"writable{free}"
        lines.append(f"Folder       {folder['option']} {folder['path']}: {state}")
    verdict = [f"Problem      {finding}" for finding in report["findings"]]
    return "\n".join([*lines, *(verdict or ["Result       ready to train"])])


def _convolve_everywhere(devices: Devices) -> list[dict[str, Any]]:
    # Use XLA if the training does: it needs additional libraries and tools.
    @graph_function(jit_compile=devices.compilation.network)
    def convolve(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d(images, kernel, strides=1, padding="VALID")

    results = []
    for description in devices.descriptions:
        name = description.name
        try:
            with tf.device(f"/{name}"):
                outputs = convolve(tf.ones([1, 8, 8, 3]), tf.ones([3, 3, 3, 4]))
            # 3x3 ones over 3 channels of ones.
            right = bool(np.all(outputs.numpy() == 27.0))
            problem = None if right else f"{name} computes a wrong result for a convolution"
        except tf.errors.OpError as error:
            problem = f"{name} cannot run a convolution: {error.message}"
        results.append({"what": f"convolution on {name}", "problem": problem})
    return results


def _all_reduce(devices: Devices) -> dict[str, Any]:
    expected = float(sum(range(1, devices.replicas + 1)))

    @graph_function
    def total() -> tf.Tensor:
        def contribute() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            share = tf.cast(context.replica_id_in_sync_group + 1, tf.float32)
            return context.all_reduce("SUM", share)

        return devices.strategy.reduce("MEAN", devices.strategy.run(contribute), axis=None)

    try:
        received = float(total())
        problem = (
            None if received == expected else f"all-reduce returned {received}, expected {expected}"
        )
    except tf.errors.OpError as error:
        problem = f"the devices cannot all-reduce: {error.message}"
    return {"what": f"all-reduce over {plural(devices.replicas, 'replica')}", "problem": problem}


def _describe_folder(option: str, folder: Path) -> dict[str, Any]:
    """Check whether a folder, or its nearest existing parent, can be written."""
    problem, free_gib = None, None
    try:
        candidates = (folder, *folder.absolute().parents)
        existing = next(candidate for candidate in candidates if candidate.exists())
        with tempfile.TemporaryFile(dir=existing):
            free = free_bytes(existing)
        free_gib = None if free is None else round(free / 2**30, 1)
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}; {remedy(error)}"
    return {"option": option, "path": str(folder), "free_gib": free_gib, "problem": problem}
