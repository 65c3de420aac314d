"""The Dockerfile and the Kubernetes manifest: held against the API's schema, and against what they start."""

import os
import re
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from kubernetes.client import V1ConfigMap, V1Job, V1Service

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "launch" / "kubernetes" / "train.yaml"
KINDS = {"Service": V1Service, "ConfigMap": V1ConfigMap, "Job": V1Job}


@pytest.fixture(scope="module")
def parts() -> dict[str, dict]:
    """The manifest's objects by kind."""
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text())}


def check(part: dict) -> None:
    """Validate an object by the client's classes, which are generated from the API's schema and forbid other keys."""
    KINDS[part["kind"]].model_validate(part)


def test_the_manifest_is_what_the_api_takes(parts):
    assert set(parts) == set(KINDS)
    for part in parts.values():
        check(part)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda job: job["spec"].update(completionsMode="Indexed"), "completionsMode"),
        (lambda job: job["spec"].update(completions="2"), "completions"),
        (lambda job: job["spec"].pop("template"), "template"),
        (lambda job: job["spec"]["template"]["spec"]["containers"][0].pop("name"), "name"),
    ],
)
def test_the_check_of_the_manifest_finds_faults(parts, spoil, told):
    job = deepcopy(parts["Job"])
    spoil(job)
    with pytest.raises(ValueError, match=told):
        check(job)


def test_the_pods_are_those_of_the_hostfile_and_find_each_other(parts):
    job, name = parts["Job"]["spec"], parts["Job"]["metadata"]["name"]
    pod = job["template"]["spec"]
    lines = parts["ConfigMap"]["data"]["hostfile"].splitlines()
    assert job["completions"] == job["parallelism"] == len(lines)
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert lines == [f"{name}-{index} slots={gpus}" for index in range(len(lines))]
    assert pod["subdomain"] == parts["Service"]["metadata"]["name"] and parts["Service"]["spec"]["clusterIP"] == "None"
    assert parts["Service"]["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert f"--master_addr={name}-0.{pod['subdomain']}" in pod["containers"][0]["args"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.slow
def test_the_pods_command_passes_the_launch_scripts_checks(parts, tmp_path):
    """The manifest's command goes as far as starting the ranks, on a machine that its hostfile names."""
    container = parts["Job"]["spec"]["template"]["spec"]["containers"][0]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(parts["ConfigMap"]["data"]["hostfile"].replace("sorsa-train-0 ", f"{socket.gethostname()} "))
    started = tmp_path / "torchrun"
    started.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\necho 0 > "$SORSA_EXIT_FILE"\n')
    started.chmod(0o755)
    (tmp_path / "deepspeed").symlink_to(started)
    words = [f"--hostfile={hostfile}" if word.startswith("--hostfile=") else word for word in container["args"]]
    words += ["model=smollm2-135m-instruct", "data.path=word-problems"]  # what needs no hub

    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*container["command"], *words],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "words").read_text()
    assert (
        "--nnodes 2 --nproc_per_node 8 --master_addr sorsa-train-0.sorsa-train --master_port 29500 --node_rank 0"
        in said
    )
    assert "--resume=auto output.folder=/data/runs output.name=llama3-70b" in said


def test_the_image_has_torchs_cuda_and_runs_as_an_ordinary_user(parts):
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    words = dict(line.split(maxsplit=1) for line in lines if re.match(r"[A-Z]+ ", line))
    [torch] = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert torch == "torch==2.13.0"  # whose wheels on PyPI are built for CUDA 13.0
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", words["FROM"])
    assert words["USER"] == "sorsa"
    assert lines.index("USER sorsa") < next(i for i, line in enumerate(lines) if line.startswith("COPY"))
    [uid] = re.findall(r"--uid (\d+) sorsa", "\n".join(lines))
    pod = parts["Job"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == int(uid)
