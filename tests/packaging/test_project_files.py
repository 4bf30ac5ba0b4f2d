"""Workflows, hooks and changelog: they parse, and name what is there."""

import re
import subprocess
from pathlib import Path

import yaml

from genft_kernels import __version__

ROOT = Path(__file__).parents[2]


def commands_of(workflow: str) -> list[str]:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_continuous_integration_runs_what_a_change_must_pass():
    assert ".ci/run" in commands_of("ci.yml")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_a_release_builds_both_wheels_of_the_version_it_is_tagged_with():
    commands = commands_of("release.yml")
    wheels = [command for command in commands if "pip wheel" in command]
    assert [command.startswith("GENFT_PREBUILD=1 ") for command in wheels] == [False, True]
    (check,) = [command for command in commands if "_version.py" in command]
    for tag, status in ((f"v{__version__}", 0), ("v0.0.1", 1)):
        assert subprocess.run(check, shell=True, cwd=ROOT, env={"GITHUB_REF_NAME": tag}).returncode == status


def test_hooks_run_the_programs_that_the_environment_has():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "clang-format"]
    style = yaml.safe_load((ROOT / ".clang-format").read_text())
    assert style["ColumnLimit"] == 120  # as ruff's line-length


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == __version__ and all(date != "unreleased" for _, date in versions[1:])
