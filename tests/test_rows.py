"""Pages follow rows: change or delete a row, and the page that uses it is no longer the committed one."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

CHAPTER = "02_lenet_sweeps"


def texts(outputs):
    """Return what nbval compares of a cell's outputs: every text, no picture."""
    found = []
    for output in outputs:
        data = output.get("data", {}) if isinstance(output, dict) else output.data
        found += [str(data[kind]) for kind in ("text/plain", "text/markdown", "text/html") if kind in data]
    return found


def page(root):
    """Run the chapter's cells in this process and return the text outputs of each code cell."""
    main = sys.modules["__main__"]
    shell = InteractiveShell.instance()
    shell.reset(new_session=True)
    sys.modules["__main__"] = main  # the shell puts itself there, where a spawned process would look for ours
    plt.switch_backend("agg")
    shown = []
    for cell in nbformat.read(root / f"notebooks/{CHAPTER}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                shell.run_cell(cell.source).raise_error()
            shown.append([captured.stdout, *texts(captured.outputs)])
            plt.close("all")
    return shown


@pytest.fixture
def rows_folder(root, tmp_path, monkeypatch):
    """A copy of the committed rows that the chapter reads instead of them."""
    folder = tmp_path / "results"
    shutil.copytree(root / "notebooks/results", folder)
    monkeypatch.chdir(root / "notebooks")
    monkeypatch.setenv("SNIP_RESULTS", str(folder))
    return folder


def used_rows(folder):
    """Return the rows of the chapter's file: its page uses them all."""
    lines = (folder / f"{CHAPTER}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rewrite(folder, rows):
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    (folder / f"{CHAPTER}.jsonl").write_text(text)


def test_changing_the_error_of_any_row_changes_the_page(root, rows_folder):
    committed = page(root)
    assert page(root) == committed
    rows = used_rows(rows_folder)
    for i in random.Random(len(rows)).sample(range(len(rows)), 10):
        error = rows[i]["test_error"]
        rows[i]["test_error"] = round(error + 0.01, 4)  # one image of 10,000
        rewrite(rows_folder, rows)
        assert page(root) != committed, rows[i]["key"]
        rows[i]["test_error"] = error
    rewrite(rows_folder, rows)
    assert page(root) == committed


def test_a_changed_row_makes_nbval_fail(root, rows_folder):
    rows = used_rows(rows_folder)
    rows[len(rows) // 2]["test_error"] += 0.01
    rewrite(rows_folder, rows)
    nbval = ["--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *nbval, root / f"notebooks/{CHAPTER}.ipynb"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1 and "Cell outputs differ" in done.stdout


def test_deleted_rows_are_named_by_the_page(root, rows_folder):
    def missing():
        said = "\n".join(text for cell in page(root) for text in cell)
        counts = re.findall(r"(\d+) of 260 runs have no row yet", said)
        return said, int(counts[0]) if counts else 0

    rows = used_rows(rows_folder)
    gone = [row for row in rows if row["model"] == "lenet300" and row["sparsity"] == 0.1 and row["seed"] in (3, 4, 7)]
    _, before = missing()
    rewrite(rows_folder, [row for row in rows if row not in gone])
    said, after = missing()
    assert len(gone) == 3 and after == before + 3
    assert "lenet300 mnist snip 0.1, seeds 3-4, 7" in said


def test_without_any_row_the_page_still_says_so(root, rows_folder):
    rewrite(rows_folder, [])
    said = "\n".join(text for cell in page(root) for text in cell)
    assert "260 of 260 runs have no row yet" in said and "not tested (not run yet)" in said
    assert "reproduced:" not in said and "in part:" not in said
