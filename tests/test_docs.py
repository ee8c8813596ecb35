"""What the documentation shows is run here: what is not run rots."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from policies.interface import Dispatch, Hold
from policies.testing import cluster, request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reproducibility_page_is_true() -> None:
    page = doctest.testfile(str(ROOT / "docs/reproducibility.md"), module_relative=False)
    assert page.attempted > 10
    assert page.failed == 0


def _policy_of_the_readme() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return str(code)


def test_the_readmes_policy_takes_the_shortest_queue_below_its_cap() -> None:
    scope: dict[str, object] = {}
    exec(_policy_of_the_readme(), scope)
    policy = scope["ShortQueue"](cap=2)  # type: ignore[operator]
    busy = {"inflight_requests": 2}
    assert policy.place(request(), cluster(r0=busy, r1={"inflight_requests": 1})) == Dispatch(
        "q", "r1"
    )
    assert policy.place(request(), cluster(r0=busy, r1=busy)) == Hold()


@pytest.mark.parametrize("command", ["check", "run"])
def test_the_readmes_policy_can_be_examined_and_run_as_the_readme_shows(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "short_queue.py").write_text(_policy_of_the_readme(), encoding="utf-8")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (line,) = re.findall(
        rf"^    viisim ({command} .*short_queue\.py.*)$", README, flags=re.MULTILINE
    )
    words = [sys.executable, "-m", "viisim", *shlex.split(line)]
    if command == "run":
        words += ["--set", "workload.requests=20"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_the_readme_names_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"(?:experiments|benchmarks|docs)/[\w./]+\.\w+", README)
    assert links
    assert [name for name in {*links, *named} if not (ROOT / name).exists()] == []


def test_every_experiment_opens_with_its_claim() -> None:
    files = sorted((ROOT / "experiments").glob("*.yaml"))
    assert len(files) >= 3
    assert [f.name for f in files if not f.read_text("utf-8").startswith("# Claim: ")] == []
