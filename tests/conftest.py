"""What the tests share: where the project is, its build script, and the published book."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # more threads than cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# No test asserts a time, and a failure must come back at the next run.
hypothesis.settings.register_profile("laws", deadline=None, derandomize=True)
hypothesis.settings.load_profile("laws")

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"


@pytest.fixture(scope="session")
def root():
    """Return the folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def build():
    """Return `book/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def newest(*folders):
    """Return the time of the latest change to a source file of the book."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return max(path.stat().st_mtime for path in files if "__pycache__" not in path.parts)


@pytest.fixture(scope="session")
def html():
    """Return the folder of the built book; build it unless it is newer than its sources."""
    index = HTML / "index.html"
    if not index.exists() or index.stat().st_mtime < newest("book", "notebooks", "snip_lib"):
        done = subprocess.run([sys.executable, ROOT / "book" / "build.py", "book"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return HTML
