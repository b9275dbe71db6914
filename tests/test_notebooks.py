"""What every committed chapter looks like; that its outputs are still true is nbval's part."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT

CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MOST_CELLS, MOST_LINES = 14, 12
LOOPS = ("backward", "step", "zero_grad")  # calls that make a loop a training loop

pytestmark = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem, scope="module")


@pytest.fixture(scope="module")
def notebook(chapter):
    """Return a chapter as committed."""
    return nbformat.read(chapter, as_version=4)


@pytest.fixture(scope="module")
def code(notebook):
    """Return a chapter's code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(cell):
    """Return the syntax tree of a cell, shell lines left out."""
    lines = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in cell.source.splitlines()]
    return ast.walk(ast.parse("\n".join(lines)))


def pictures(cell):
    """Return whether a cell shows an image."""
    return any(key.startswith("image/") for output in cell.outputs for key in output.get("data", ()))


def test_notebook_is_valid_and_its_metadata_clean(build, notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == build.NOTEBOOK_METADATA
    for cell in notebook.cells:
        assert set(cell.metadata) <= set(build.KEPT_METADATA), cell.id


def test_outputs_and_counts_are_committed(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    counts = [output.execution_count for cell in code for output in cell.outputs if "execution_count" in output]
    assert None not in counts
    assert any(cell.outputs for cell in code)


def test_nothing_went_wrong_and_nothing_is_hidden_from_nbval(notebook, code):
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
    assert not {tag for tag in tags if tag.startswith("nbval") or tag == "raises-exception"}
    assert "NBVAL" not in "".join(cell.source for cell in code)
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


def test_outputs_name_no_folder_of_a_machine(code):
    for cell in code:
        assert str(ROOT) not in str(cell.outputs), cell.id
        assert not re.search(r"/home/|/root/|/tmp/|C:\\\\", str(cell.outputs)), cell.id


def test_no_line_of_a_text_begins_like_a_comment(notebook):
    """MyST drops a line that begins with ``%``: of "at 98\\n% a network" half a sentence would be left."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"^\s*%", cell.source, re.MULTILINE), cell.id


def test_cell_ids_are_unique_in_the_book(chapter, notebook):
    elsewhere = {cell.id for path in CHAPTERS if path != chapter for cell in nbformat.read(path, as_version=4).cells}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert not elsewhere & set(ids)


def test_a_chapter_is_short(code):
    assert len(code) <= MOST_CELLS
    for cell in code:
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.id


def test_a_chapter_defines_no_class_and_trains_nothing_itself(code):
    for cell in code:
        for node in python(cell):
            assert not isinstance(node, ast.ClassDef), cell.id
            if isinstance(node, ast.For | ast.While):
                called = {call.func.attr for call in ast.walk(node) if is_method(call)}
                assert not called & set(LOOPS), cell.id


def is_method(node):
    """Return whether a node of the syntax tree calls a method."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def test_it_opens_with_title_colab_link_and_colab_cell(build, chapter, notebook):
    url, ref = build.committed_address()
    title, colab = notebook.cells[:2]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert build.colab_link(chapter.stem, url, ref) in title.source
    assert colab.cell_type == "code"
    assert colab.source == build.COLAB_CELL.format(url=url, ref=ref)
    assert colab.metadata == build.COLAB_METADATA
    assert not colab.outputs


def test_parameters_are_tagged_typed_and_commented(notebook, code):
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) <= 1
    for cell in tagged:
        for line in cell.source.splitlines():
            assert re.fullmatch(r"[a-z_]+: [\w.\[\]| ]+ = .+  # \S.*", line) or line.startswith("#"), line


def test_figures_have_alt_text_and_a_caption(code):
    for cell in filter(pictures, code):
        meta = cell.metadata.get("mystnb", {})
        assert len(meta.get("image", {}).get("alt", "")) > 20, cell.id
        assert len(meta.get("figure", {}).get("caption", "")) > 20, cell.id
        assert meta["figure"].get("name", "").startswith("fig-"), cell.id


def test_pictures_are_png(code):
    for cell in filter(pictures, code):
        kinds = {key for output in cell.outputs for key in output.get("data", ()) if key.startswith("image/")}
        assert kinds == {"image/png"}, cell.id


def test_the_contents_list_it(chapter, root):
    assert f"file: notebooks/{chapter.stem}\n" in (root / "book/_toc.yml").read_text()
