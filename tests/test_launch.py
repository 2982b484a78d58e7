"""launch/tpu_vm.sh: what it would do, what it does when the TPU is preempted, and what it says to mistakes.

No test reaches a cloud: in those that are not dry runs a stand-in for gcloud comes first on the PATH.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = PROJECT / "launch" / "tpu_vm.sh"
ARGUMENTS = {
    "--zone": "us-west4-a",
    "--accelerator": "v5litepod-8",
    "--config": "mine.py",
    "--workdir": "gs://bucket/run",
}


def words(arguments: dict[str, str]) -> list[str]:
    return [word for pair in arguments.items() for word in pair]


def launch(folder: Path, *extra: str, arguments: dict[str, str] | None = None, path: str | None = None):
    (folder / "mine.py").write_text("def config(): ...\n")
    environment = os.environ | ({} if path is None else {"PATH": path})
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(SCRIPT), *words(ARGUMENTS if arguments is None else arguments), *extra],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def commands(output: str) -> list[str]:
    return [line for line in output.splitlines() if not line.startswith("#")]


def test_a_dry_run_prints_the_whole_life_of_a_tpu_in_order_and_needs_no_gcloud(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sed", "dirname", "basename", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = launch(tmp_path, "--dry-run", "--project", "p", "--", "--seed", "1", "--name", "two words", path=str(tools))
    assert done.returncode == 0, done.stderr
    build, create, describe, clean, copy, install, run, delete = commands(done.stdout)
    assert "pip wheel" in build
    assert create == (
        "gcloud compute tpus queued-resources create allmrec --node-id allmrec --accelerator-type v5litepod-8"
        " --runtime-version v2-alpha-tpuv5-lite --spot --zone us-west4-a --project p"
    )
    assert describe.startswith("gcloud compute tpus queued-resources describe allmrec --format 'value(state.state)'")
    ssh = "gcloud compute tpus tpu-vm ssh allmrec --zone us-west4-a --project p --worker all --command "
    assert all(line.startswith(ssh) for line in (clean, install, run))
    assert "mine.py allmrec:allmrec-files/" in copy
    assert "constraints/py312.txt" in copy
    assert copy.endswith("--worker all")
    assert "[tpu]" in install
    assert "allmrec run --config allmrec-files/mine.py --workdir allmrec-run --seed 1 --name " in run
    assert "two words" in run
    assert delete == "gcloud compute tpus queued-resources delete allmrec --force --quiet --zone us-west4-a --project p"


def test_on_demand_names_no_tier_and_a_shipped_config_is_not_copied(tmp_path):
    shipped = sorted((PROJECT / "configs").glob("*.py"))[0].stem
    done = launch(tmp_path, "--dry-run", "--on-demand", "--keep", arguments=ARGUMENTS | {"--config": shipped})
    assert done.returncode == 0, done.stderr
    assert "--spot" not in done.stdout
    assert f"allmrec run --config {shipped} " in done.stdout
    assert " delete " not in "\n".join(commands(done.stdout))


@pytest.mark.parametrize("missing", ARGUMENTS)
def test_a_missing_argument_is_one_line_that_names_it(tmp_path, missing):
    rest = {name: value for name, value in ARGUMENTS.items() if name != missing}
    done = launch(tmp_path, "--dry-run", arguments=rest)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"{missing} is required" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"--workdir": "/tmp/here"}, "gs://"),
        ({"--config": "absent.py"}, "no config file 'absent.py'"),
        ({"--config": "no_such_config"}, "no shipped config"),
        ({"--accelerator": "v99-8"}, "--runtime-version"),
        ({"--accelerator": "v6e-16"}, "several hosts"),
        ({"--accelerator": "v6e"}, "number"),
        ({"--max-restarts": "many"}, "whole number"),
        ({"--colour": "blue"}, "unknown argument '--colour'"),
        ({"--zone": "--dry-run"}, "--zone needs a value"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_to_do(tmp_path, wrong, said):
    done = launch(tmp_path, "--dry-run", arguments=ARGUMENTS | wrong)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_help_names_every_option(tmp_path):
    done = launch(tmp_path, "--help", arguments={})
    assert done.returncode == 0
    for option in (*ARGUMENTS, "--dry-run", "--spot", "--on-demand", "--keep", "--max-restarts", "--project", "--name"):
        assert option in done.stdout


STAND_IN = """#!/usr/bin/env bash
# Writes down what it is asked, and answers `allmrec run` with the next status of the file `statuses`.
here="$(dirname "$0")"
echo "$*" >> "$here/asked"
case "$*" in
  *"queued-resources describe"*) echo ACTIVE ;;
  *"tpu-vm describe"*) cat "$here/node" ;;
  *"allmrec run"*)
    status="$(head -n 1 "$here/statuses")"
    sed -i.before 1d "$here/statuses"
    exit "$status" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A function of the exit statuses that `allmrec run` will have: the finished launch, and what gcloud was asked."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    for name, text in {"gcloud": STAND_IN, "no-wheel": "#!/bin/sh\nexit 0\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    # Building the wheel is test_packaging's business.
    script = tmp_path / "checkout" / "launch" / "tpu_vm.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    (script.parent.parent / "allmrec_jax").mkdir()
    shutil.copy(PROJECT / "allmrec_jax" / "__init__.py", script.parent.parent / "allmrec_jax")
    python = script.parent.parent / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(folder / "no-wheel")
    (tmp_path / "mine.py").write_text("")

    def start(statuses: list[int], *extra: str, node: str = "READY"):
        (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        (folder / "node").write_text(node)
        (folder / "asked").write_text("")
        done = subprocess.run(
            ["bash", str(script), *words(ARGUMENTS), "--poll", "0", *extra],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        brief = {"queued-resources create": "create", "allmrec run": "run", "queued-resources delete": "delete"}
        asked = (folder / "asked").read_text().splitlines()
        return done, [word for line in asked for text, word in brief.items() if text in line]

    return start


def test_a_preempted_run_gets_a_new_tpu_and_every_tpu_is_deleted(cloud):
    done, asked = cloud([75, 75, 0])
    assert done.returncode == 0, done.stderr
    assert asked == ["create", "run", "delete"] * 3


def test_a_failure_on_a_healthy_tpu_is_not_tried_again(cloud):
    done, asked = cloud([3])
    assert done.returncode == 3
    assert "exit status 3" in done.stderr
    assert asked == ["create", "run", "delete"]


def test_a_failure_because_the_tpu_is_gone_counts_as_preemption(cloud):
    done, asked = cloud([255, 0], node="PREEMPTED")
    assert done.returncode == 0, done.stderr
    assert asked == ["create", "run", "delete"] * 2


def test_preemptions_have_a_limit(cloud):
    done, asked = cloud([75, 75, 0], "--max-restarts", "1")
    assert done.returncode == 1
    assert asked == ["create", "run", "delete"] * 2


def test_keep_keeps_the_tpu_and_says_how_to_delete_it(cloud):
    done, asked = cloud([0], "--keep")
    assert done.returncode == 0, done.stderr
    assert asked == ["create", "run"]
    assert "queued-resources delete allmrec" in done.stdout


def test_the_documented_dry_run_works():
    (line,) = (
        line
        for line in (PROJECT / "docs" / "launch" / "tpu_vm.md").read_text().splitlines()
        if line.startswith("launch/tpu_vm.sh --dry-run")
    )
    done = subprocess.run(["bash", *line.split()], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "queued-resources create" in done.stdout


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; `make env` brings it")
    done = subprocess.run([shellcheck, SCRIPT, PROJECT / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
