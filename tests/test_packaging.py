"""One truth in one place: versions, pins, the public address, the commands."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml

import snip_lib

HEAVY = ("torchvision", "seaborn", "scipy", "dask", "distributed", "matplotlib")


@pytest.fixture(scope="module")
def project(root):
    """Return the `[project]` table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def committed(root):
    """Return the text files of the project that git knows, or would."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git checkout, so there is no list of its files")
    paths = [root / name for name in done.stdout.splitlines() if "_extra/" not in name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def test_the_version_is_the_same_everywhere(root, project):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert project["version"] == str(citation["version"]) == importlib.metadata.version("snip-lib")
    assert snip_lib.__version__ == project["version"]


def test_environment_yml_repeats_the_pins(root, project):
    conda = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    *pins, last = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pins == project["optional-dependencies"]["book"]
    assert last == "--editable ."


def test_every_pin_is_exact(project):
    for pin in project["optional-dependencies"]["book"]:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?==[0-9][0-9a-z.]*", pin), pin


def test_every_dependency_has_a_range_and_a_pin(project):
    pins = {pin.split("==")[0] for pin in project["optional-dependencies"]["book"]}
    for dependency in project["dependencies"]:
        name, separator, _ = dependency.partition(">=")
        assert separator and name in pins, dependency


def test_what_colab_adds_is_a_dependency(build, project):
    names = {dependency.split(">=")[0] for dependency in project["dependencies"]}
    added = build.COLAB_CELL.split("pip install --quiet safetensors")[1].splitlines()[0]
    assert {"safetensors", *added.replace('"', "").split()} <= names


def test_every_choice_is_marked_in_the_library(root):
    """One `# choice:` and one heading for each place where the paper is silent, by the heading's anchor."""
    text = (root / "book" / "choices.md").read_text("utf-8").split("\n## Verdicts\n")[0]
    headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^### (.+)$", text, re.M)}
    sources = "".join(file.read_text("utf-8") for file in (root / "snip_lib").glob("*.py"))
    marks = {mark.removeprefix("book/choices.md#") for mark in re.findall(r"# choice: *(.*)", sources)}
    assert marks == headings - {"other-choices-tried"}


def test_importing_the_library_loads_nothing_heavy():
    code = f"import snip_lib, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_one_repository_address(root, build):
    url, _ = build.committed_address()
    name = build.slug(url).split("/")[1]
    others = re.compile(rf"[\w.-]+(?:/|\.github\.io/){name}(?![\w-])")
    allowed = {build.slug(url), build.pages_url(url).removeprefix("https://"), f"content/{name}"}
    for path in committed(root):
        found = {match.lower() for match in others.findall(path.read_text(encoding="utf-8"))}
        assert found <= {text.lower() for text in allowed}, path


def test_the_address_comes_from_the_run_inside_github_actions(build, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "somebody/fork")
    monkeypatch.setenv("GITHUB_SHA", "0123abc")
    assert build.page_address() == ("https://github.com/somebody/fork", "0123abc")
    moved = build.move_address(
        "https://github.com/Old/Name https://old.github.io/Name",
        "https://github.com/Old/Name",
        "https://github.com/somebody/fork",
    )
    assert moved == "https://github.com/somebody/fork https://somebody.github.io/fork"


def test_the_readme_says_what_the_rows_say(root, build):
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert readme == build.with_headline(readme), "run `make pages`"


def test_make_help_lists_every_command(root):
    makefile = (root / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    done = subprocess.run(["make", "--no-print-directory"], cwd=root, capture_output=True, text=True)
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert list(listed) == phony
    assert all(listed.values())


def test_actions_are_pinned_to_a_commit(root):
    uses = [
        line.split("uses:")[1].strip()
        for path in (root / ".github/workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses
    for use in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


def test_workflows_may_only_read_unless_they_say_so(root):
    for path in (root / ".github/workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}, path


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--profile", "short"], "Say which chapter"),
        (["--chapter", "02"], "Say which profile: PROFILE=smoke, short or paper."),
        (["--chapter", "98", "--profile", "short"], "No chapter's name starts with '98'"),
        (["--chapter", "0", "--profile", "long"], "There is no profile 'long'"),
        (["--chapter", "0", "--profile", "smoke", "--budget", "much"], "BUDGET is a number"),
    ],
)
def test_rows_refuses_what_does_not_exist(root, arguments, sentence):
    command = [sys.executable, root / "book/build.py", "rows", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_what_a_chapter_refuses_is_one_sentence_without_a_traceback(root, tmp_path):
    command = [sys.executable, root / "book/build.py", "rows", "--chapter", "02", "--profile", "smoke"]
    environ = os.environ | {"SNIP_RESULTS": str(tmp_path / "rows"), "SNIP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--cluster", "locl"], capture_output=True, text=True, env=environ)
    assert done.returncode == 1 and not (tmp_path / "rows").exists()
    assert done.stderr.splitlines()[-1] == (
        '02_lenet_sweeps failed: cluster is "", "local" or the address of a scheduler, "tcp://...", not \'locl\'.'
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_committed_pages_are_not_made_from_other_rows(root, tmp_path):
    command = [sys.executable, root / "book/build.py", "pages"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SNIP_RESULTS": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("The committed pages show the committed rows") and done.stderr.count("\n") == 1


@pytest.mark.long
def test_chapters_show_what_is_not_run_yet_where_there_are_no_rows(build, tmp_path, monkeypatch):
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path))
    for path in build.chapters():
        shown = build.execute(path, **{"profile": "short"} if "profile" in build.declared(path) else {})
        told = "not run yet" in str([cell.get("outputs") for cell in shown.cells])
        assert told or path.stem == "01_method"  # which is live throughout


def test_a_parameter_that_a_chapter_lacks_is_refused(build):
    with pytest.raises(build.Refusal, match="has no parameter profil; nothing was run"):
        build.execute(build.chapters()[0], profil="smoke")


def test_the_readme_examples_prune_a_network(root, capsys):
    from snip_lib import mask_of, remove_mask, sparsity_of

    names = {}
    at_once, in_steps = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(at_once, names)
    assert sparsity_of(names["mask"]) == pytest.approx(0.95, abs=1e-5)
    for name in ("conv1", "layer4.1.conv2", "fc"):
        gone = names["model"].get_submodule(name).weight == 0
        assert gone.any() and (gone == ~names["mask"][f"{name}.weight"]).all()
    assert "fc.weight" in capsys.readouterr().out
    names["model"] = remove_mask(names["model"]).fc
    names["x"] = torch.randn(100, 512)
    exec(in_steps, names)
    assert sparsity_of(mask_of(names["model"])) == pytest.approx(0.99, abs=1e-4)
