"""What CI, pre-commit and the workflows run.

Would catch: a tool of one version before a commit and of another in CI; a workflow that calls a
script that is not there.
"""

import re

import yaml
from pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_pre_commit_and_ci_have_the_same_versions():
    pins = re.findall(r"^[\w-]+==[\d.]+$", (ROOT / ".ci/lint.txt").read_text(), flags=re.M)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    in_hooks = {pin for hook in hooks for pin in hook.get("additional_dependencies", ())}
    # pyright needs the package and its libraries, and so comes from their environment.
    assert in_hooks == {pin for pin in pins if not pin.startswith("pyright")}
    assert "-r .ci/lint.txt" in (ROOT / ".ci/run").read_text()


def test_workflows_call_scripts_of_this_repository():
    assert len(WORKFLOWS) == 4
    scripts = set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                scripts |= set(re.findall(r"\.ci/\w+", step.get("run", "")))
    assert scripts == {".ci/run", ".ci/wheel", ".ci/versions"}
    assert all((ROOT / script).is_file() for script in scripts)
