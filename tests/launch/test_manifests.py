"""The manifests and command lines against what their projects publish: schemas and parsers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.conftest import LAUNCH

# A folder with the CustomResourceDefinitions of JobSet and Kueue: config/components/crd/bases of
# each project's repository.
DEFINITIONS = "COMPOSABLE_CRDS"
OWN_FAILURES = {1, 2}
RESTARTED = {75, 76}


def read_objects():
    """Return the Kubernetes objects of all manifests."""
    texts = [(LAUNCH / name).read_text() for name in ("jobset.yaml", "kueue.yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text)]


def read_schemas(folder):
    """Return the schema of each kind and version that the definitions in a folder have."""
    schemas = {}
    for path in Path(folder).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())["spec"]
        for version in definition["versions"]:
            name = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            schemas[name] = close(version["schema"]["openAPIV3Schema"])
    return schemas


def close(schema):
    """Return a schema of Kubernetes as one of JSON that refuses unknown fields, as servers do."""
    if isinstance(schema, list):
        return [close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close(part) for name, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed = {"type": ["integer", "string"]}
    is_object = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if is_object and not is_open:
        closed["additionalProperties"] = False
    return closed


@pytest.fixture(scope="module")
def schemas():
    folder = os.environ.get(DEFINITIONS)
    if folder is None:
        pytest.skip(f"no {DEFINITIONS}, the folder of the definitions of JobSet and Kueue")
    return read_schemas(folder)


@pytest.mark.parametrize("found", read_objects(), ids=lambda found: found["kind"])
def test_an_object_is_valid_by_its_definition(schemas, found):
    schema = schemas[found["apiVersion"], found["kind"]]
    # The metadata are those of every object, which the definitions leave to Kubernetes.
    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    jsonschema.Draft202012Validator(schema).validate(found)
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.Draft202012Validator(schema).validate({**found, "misspelt": 1})


def test_the_job_of_the_set_is_valid_by_the_schema_of_kubernetes(tools, tmp_path):
    (job,) = read_objects()[0]["spec"]["replicatedJobs"]
    name = {"name": "slice"}
    found = {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **job["template"]}
    run = validate(tools, tmp_path, found)
    assert run.returncode == 0, run.stdout + run.stderr
    found["spec"]["podFailurePolicy"]["rules"][0]["misspelt"] = 1
    assert validate(tools, tmp_path, found).returncode != 0


def test_the_job_of_parts_is_valid_by_the_schema_of_kubernetes(tools, tmp_path):
    found = yaml.safe_load((LAUNCH / "check-job.yaml").read_text())
    run = validate(tools, tmp_path, found)
    assert run.returncode == 0, run.stdout + run.stderr
    found["spec"]["backoffLimitPerIndexes"] = 1
    assert validate(tools, tmp_path, found).returncode != 0


def validate(tools, folder, found):
    """Run kubernetes-validate on an object."""
    file = folder / "object.yaml"
    file.write_text(yaml.safe_dump(found))
    command = [tools.parent / "kubernetes-validate", "--strict", file]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_set_is_valid_by_the_models_that_kubeflow_makes_of_its_interface(tools):
    program = (
        "import json, sys\n"
        "from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet\n"
        "print(JobsetV1alpha2JobSet.from_dict(json.load(sys.stdin)).to_json())\n"
    )
    found = read_objects()[0]
    run = subprocess.run(
        [tools, "-c", program], input=json.dumps(found), capture_output=True, text=True, check=True
    )
    # What the models do not know they drop.
    assert json.loads(run.stdout) == found


def test_pods_are_replaced_restarted_or_end_the_set_by_their_exit_code():
    """The rules of the Job, in order, as Kubernetes applies them."""
    (job,) = read_objects()[0]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]

    def action(code, *conditions):
        for rule in rules:
            codes = rule.get("onExitCodes")
            types = {condition["type"] for condition in rule.get("onPodConditions", ())}
            if types & set(conditions) or (codes and code in codes["values"]):
                return rule["action"]
        return "Count"

    assert {action(code) for code in OWN_FAILURES} == {"FailJob"}
    assert {action(code) for code in RESTARTED} == {"Ignore"}
    assert action(137) == "Count", "a signal fails the job, which restarts the set"
    assert action(1, "DisruptionTarget") == "Ignore"


def test_xpk_accepts_its_line(tools):
    text = re.sub(r"\\?\n#\s*", " ", (LAUNCH / "jobset.yaml").read_text())
    line = re.search(r"xpk (workload create .*?--command \"[^\"]*\")", text)
    program = (
        "import argparse, json, sys\n"
        "from xpk.parser.core import set_parser\n"
        "parser = argparse.ArgumentParser(prog='xpk')\n"
        "set_parser(parser=parser)\n"
        "found = vars(parser.parse_args(sys.argv[1:]))\n"
        "print(json.dumps({name: str(value) for name, value in found.items()}))\n"
    )
    run = subprocess.run(
        [tools, "-c", program, *shlex.split(line[1])], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["command"].startswith("composable train ")
    assert found["tpu_type"] == "v5litepod-16"
    assert {int(code) for code in found["restart_on_exit_codes"].split(",")} == RESTARTED


@pytest.mark.parametrize(
    ("name", "nodes", "accelerators"),
    [("skypilot.yaml", 2, {"H100": 8}), ("skypilot-tpu.yaml", 1, {"tpu-v5litepod-16": 1})],
)
def test_skypilot_reads_its_file(tools, tmp_path, name, nodes, accelerators):
    program = (
        "import json, sys, sky\n"
        "task = sky.Task.from_yaml(sys.argv[1])\n"
        "(wanted,) = task.resources\n"
        "print(json.dumps([task.num_nodes, wanted.accelerators, wanted.use_spot,"
        " wanted.job_recovery, task.run]))\n"
    )
    (tmp_path / "work").mkdir()
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("PYTHONPATH", None)
    run = subprocess.run(
        [tools, "-c", program, LAUNCH / name], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found[:3] == [nodes, accelerators, True]
    assert found[3]["recover_on_exit_codes"] == [75]
    assert found[4].startswith("composable train ")


@pytest.mark.parametrize("verb", ["create", "describe", "delete", "ssh"])
def test_every_option_is_one_of_gcloud(verb, tmp_path):
    """By its own help, which needs no account and asks no network."""
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("no gcloud; install the Google Cloud CLI")
    group = "tpu-vm" if verb == "ssh" else "queued-resources"
    text = (LAUNCH / "queued-resource.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^(?!#).*gcloud compute tpus {group} {verb} (.*)$", text, re.MULTILINE)
    line = line.partition(")")[0] if verb == "describe" else line
    used = {*re.findall(r"--[a-z-]+", line), "--project", "--zone"}
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0"}
    run = subprocess.run(
        [program, "compute", "tpus", group, verb, "--help"],
        env={**env, "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1", "PAGER": "cat"},
        capture_output=True,
        text=True,
        check=True,
    )
    known = set(re.findall(r"--[a-z-]+", re.sub(r".\x08", "", run.stdout)))
    assert used <= known


@pytest.mark.parametrize(
    "name", ["queued-resource.sh", "slurm.sbatch", "ssh.sh", "check-slurm.sbatch"]
)
def test_shellcheck_finds_nothing(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck; apt-get install shellcheck")
    subprocess.run(["shellcheck", LAUNCH / name], check=True)
