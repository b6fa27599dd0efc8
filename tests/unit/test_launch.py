"""Files of `launch/`: each is read by its own tool or schema, and all start the same command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import ray
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray.config.schema import RunConfig
from opd_ray.main import conf_dir, to_run_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")])


def composed_command(words: list[str], scale: str, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The config of ``PYTHON -m opd_ray.main ...`` where OPD_SCALE is `scale`."""
    at = words.index("opd_ray.main")
    assert words[at - 1] == "-m"
    monkeypatch.setenv("OPD_SCALE", scale)
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_run_config(compose("run", words[at + 1 :]))


def loaded(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian, Ubuntu: apt-get install shellcheck)")
    found = subprocess.run(["shellcheck", "--shell=bash", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# ---- ray up -------------------------------------------------------------------------------------------------


def test_rays_own_validator_takes_the_cluster_file() -> None:
    import jsonschema  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = loaded("ray_cluster.yaml")
    prepared = prepare_config(dict(config))
    validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "head_start_ray_command": []})


def test_shells_of_the_cluster_know_the_environment_and_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set-up commands run twice in an empty home folder, and a login shell afterwards."""
    (tmp_path / ".bashrc").write_text("return\n")
    commands = [line for line in loaded("ray_cluster.yaml")["setup_commands"] if "bashrc" in line or "_env" in line]
    assert len(commands) == 2
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for command in commands * 2:
        subprocess.run(["bash", "-c", command], env=env, check=True)
    assert (tmp_path / ".bashrc").read_text().count(".opd_ray_env") == 1
    shown = '. ~/.bashrc; printf \'%s\\n\' "$OPD_SCALE" "$RAY_AUTH_MODE" "$PATH"'
    out = subprocess.run(["bash", "-c", shown], env=env, check=True, capture_output=True, text=True).stdout
    scale, auth, path = out.splitlines()
    assert auth == "token" and path.startswith(f"{tmp_path}/opd_ray/.venv/bin:")
    assert composed_command(["-m", "opd_ray.main", "+experiment=lsm_block64"], scale, monkeypatch).scale == scale


# ---- KubeRay ------------------------------------------------------------------------------------------------

# KubeRay's schema of a RayJob comes with no package: these are the fields of its v1 API that the file uses.
RAYJOB_FIELDS = {
    "entrypoint",
    "submissionMode",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "runtimeEnvYAML",
    "rayClusterSpec",
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_the_rayjobs_own_fields() -> None:
    job = loaded("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) == RAYJOB_FIELDS
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["rayVersion"] == ray.__version__ and cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == GROUP_FIELDS and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kubernetes_takes_the_pods() -> None:
    cluster = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
        pod["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_rayjob_runs_the_command_at_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = loaded("rayjob.yaml")["spec"]
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in env.values())
    cfg = composed_command(shlex.split(spec["entrypoint"]), env["OPD_SCALE"], monkeypatch)
    assert (cfg.experiment, cfg.scale) == ("lsm_block64", env["OPD_SCALE"])
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert cfg.runs_dir in [mount["mountPath"] for mount in head["volumeMounts"]]
    (worker,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    engines = cfg.rollout.num_engines * cfg.rollout.num_gpus
    ranks = cfg.learner.num_ranks * cfg.learner.num_gpus
    assert engines + ranks + cfg.teacher.num_workers * cfg.teacher.num_gpus <= gpus * worker["replicas"]


# ---- ray job submit -----------------------------------------------------------------------------------------


def submitted(tmp_path: Path, *arguments: str, **env: str) -> tuple[dict[str, Any], list[str]]:
    """What `submit.sh` tells Ray: the runtime environment and the entrypoint."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        f'#!/bin/bash\nif [[ $1 == - ]]; then exec {sys.executable} "$@"; fi\nprintf \'%s\\n\' "$@" > {tmp_path}/said\n'
    )
    fake.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in ("OPD_SCALE", "RUNS_DIR", "CLUSTER_PYTHON")}
    subprocess.run(["bash", str(LAUNCH / "submit.sh"), *arguments], env=clean | {"PYTHON": str(fake)} | env, check=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:5] == ["-m", "ray.scripts.scripts", "job", "submit", "--working-dir"] and said[5] == str(ROOT)
    at = said.index("--")
    return json.loads(said[said.index("--runtime-env-json") + 1]), said[at + 1 :]


def test_a_submitted_job_is_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_env, words = submitted(tmp_path, "seed=3", "evaluation.path=''", OPD_SCALE="smollm2")
    assert runtime_env["env_vars"]["OPD_SCALE"] == "smollm2"
    assert runtime_env["env_vars"]["PATH"] == f"{tmp_path}/bin:${{PATH}}"
    assert words[0] == f"{tmp_path}/bin/python"
    cfg = composed_command(words, "smollm2", monkeypatch)
    assert (cfg.experiment, cfg.scale, cfg.seed, cfg.evaluation.path) == ("lsm_block64", "smollm2", 3, "")
    # The job runs in a copy of the checkout that Ray removes: run folders must not lie there.
    assert cfg.runs_dir == str(ROOT / "runs")


def test_where_a_submitted_job_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_env, words = submitted(
        tmp_path, "+experiment=opd", "runs_dir=/there", CLUSTER_PYTHON="python3", RUNS_DIR="/shared/runs"
    )
    assert "OPD_SCALE" not in runtime_env["env_vars"] and "PATH" not in runtime_env["env_vars"]
    assert words[0] == "python3" and "runs_dir=/shared/runs" in words
    assert composed_command([w for w in words if w != "runs_dir=/there"], "tiny", monkeypatch).experiment == "opd"
    with pytest.raises(subprocess.CalledProcessError):
        submitted(tmp_path, RUNS_DIR="runs")


def test_the_sent_checkout_is_enough_to_run(tmp_path: Path) -> None:
    """Nothing that a run needs is left out, and nothing big is sent."""
    from ray._private.runtime_env import packaging

    runtime_env, _ = submitted(tmp_path)
    sent: list[str] = []
    packaging._dir_travel(
        ROOT,
        [packaging._get_excludes(ROOT, runtime_env["excludes"])],
        lambda path: sent.append(str(path.relative_to(ROOT))),
        include_gitignore=True,
    )
    tracked = [p for folder in ("opd_ray", "conf") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")]
    assert {str(path.relative_to(ROOT)) for path in tracked} <= set(sent)
    assert "opd_ray/tiny/assets/student/model.safetensors" in sent
    assert not [path for path in sent if re.match(r"(tests|benchmarks|runs|models|\.git|\.venv)(/|$)", path)]
    assert sum((ROOT / path).stat().st_size for path in sent if (ROOT / path).is_file()) < 20e6


# ---- Slurm --------------------------------------------------------------------------------------------------


def test_the_slurm_script_says_what_is_missing(tmp_path: Path) -> None:
    script = LAUNCH / "slurm.sbatch"
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    found = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr == (
        f"error: {tmp_path} is not the checkout: call sbatch from its top folder\n"
    )
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "/nowhere/python"}
    found = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: /nowhere/python is not there: run launch/environment.sh")
