"""Run the chapters and build the book. `make help` lists the commands; each is one function here.

    build.py book                 chapters, from the rows -> _build/stage -> _build/html
    build.py pages                the same, into the committed notebooks, in place
    build.py rows --chapter 02 --profile short [--budget SECONDS] [--cluster local]
    build.py smoke                every chapter trains its smallest profile into a throw-away folder

A chapter is `notebooks/[0-9][0-9]_*.ipynb`. Papermill runs it with `notebooks/` as its folder.

The repository's public address stands once, in `book/_config.yml` (`repository.url`, `.branch`).
What repeats it is written from there:

- launch buttons: by Jupyter Book;
- each chapter's "Open in Colab" link (in its first cell) and its Colab cell (its second):
  `stamp`, on every `make book` (in the staging tree) and every `make pages` (in place);
- README.md, CITATION.cff, pyproject.toml: `make pages` replaces the old address by the new one.

So a move is: edit `repository.url`, run `make pages`, commit. Inside GitHub Actions the staging
tree takes the address and the commit from the run itself, so a fork's pages point at the fork.
"""

import argparse
import base64
import builtins
import contextlib
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import papermill
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
STAGE = BUILD / "stage"
PROFILES = ("smoke", "short", "paper")
KEPT_METADATA = ("cellView", "mystnb", "tags")  # of a cell; everything else is dropped
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}

# The second cell of every chapter, exactly. {url} and {ref} are the book's address and version.
COLAB_CELL = """\
# @title On Colab: fetch the book and its library (Colab's own torch stays). Elsewhere: nothing.
import os
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/re-snip"):
        !git clone --quiet {url} /content/re-snip
        !git -C /content/re-snip checkout --quiet {ref}
        !pip install --quiet --no-deps --editable /content/re-snip
        !pip install --quiet safetensors seaborn tqdm "dask[distributed]"
    os.chdir("/content/re-snip/notebooks")
    sys.path.insert(0, "/content/re-snip")"""
COLAB_METADATA = {"cellView": "form", "tags": ["remove-input"]}
COLAB_LINK = re.compile(r"\[Open in Colab\]\([^)]*\)")
HEADLINE = re.compile(r"(<!-- verdict -->\n).*?(<!-- /verdict -->)", re.DOTALL)


class Refusal(Exception):
    """Something asked for does not exist: one sentence, exit status 2."""


class Failure(Exception):
    """A chapter or a tool failed: its message, exit status 1."""


# ------------------------------------------------------------------------------------- address


def committed_address():
    """Return (url, ref) of the book as `book/_config.yml` states them."""
    repository = yaml.safe_load((ROOT / "book/_config.yml").read_text())["repository"]
    return repository["url"].rstrip("/"), repository["branch"]


def page_address():
    """Return (url, ref) of the pages being built: the run's own inside GitHub Actions."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return committed_address()
    server, slug = os.environ["GITHUB_SERVER_URL"], os.environ["GITHUB_REPOSITORY"]
    return f"{server}/{slug}", os.environ["GITHUB_SHA"]


def slug(url):
    """Return OWNER/NAME of a repository's address."""
    return "/".join(url.split("/")[-2:])


def pages_url(url):
    """Return where GitHub Pages publishes the book of the repository at `url`."""
    owner, name = slug(url).split("/")
    return f"https://{owner.lower()}.github.io/{name}"


def colab_link(stem, url, ref):
    """Return the Markdown link that opens a chapter in Colab."""
    page = f"https://colab.research.google.com/github/{slug(url)}/blob/{ref}/notebooks/{stem}.ipynb"
    return f"[Open in Colab]({page})"


def stamp(notebook, stem, url, ref):
    """Write the address into a chapter's first two cells (Colab link, Colab cell)."""
    title, colab = notebook.cells[:2]
    if len(COLAB_LINK.findall(title.source)) != 1:
        raise Failure(f"{stem}: the first cell needs exactly one [Open in Colab](…) link.")
    if not colab.source.startswith(COLAB_CELL.splitlines()[0]):
        raise Failure(f"{stem}: the second cell must be the Colab cell (COLAB_CELL in build.py).")
    title.source = COLAB_LINK.sub(lambda _: colab_link(stem, url, ref), title.source)
    colab.source = COLAB_CELL.format(url=url, ref=ref)
    colab.metadata = nbformat.from_dict(COLAB_METADATA)


def move_address(text, old, new):
    """Replace one repository address by another, the address of its pages too."""
    return text.replace(slug(old), slug(new)).replace(pages_url(old), pages_url(new))


def move_committed_address(new):
    """Rewrite the files that repeat the address, when `book/_config.yml` has a new one."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    old = citation["repository-code"]
    if old == new:
        return
    for name in ("README.md", "pyproject.toml", "CITATION.cff"):
        path = ROOT / name
        replace_file(path, move_address(path.read_text(), old, new))
    print(f"address: {old} -> {new}")


# ------------------------------------------------------------------------------------ chapters


def chapters(prefix=""):
    """Return the paths of the chapters whose name starts with `prefix`, in order."""
    found = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in found if path.stem.startswith(prefix)]
    if not chosen:
        names = ", ".join(path.stem for path in found) or "none"
        raise Refusal(f"No chapter's name starts with {prefix!r}; the chapters are: {names}.")
    return chosen


def declared(chapter):
    """Return the names of a chapter's parameters."""
    return set(papermill.inspect_notebook(str(chapter)))


def execute(chapter, live=False, **parameters):
    """Run a chapter in a fresh kernel and return the executed notebook.

    Papermill only warns of a parameter that the chapter does not declare; here it is refused.
    With `live`, what the kernel prints (progress bars on stderr included) shows at once.
    """
    unknown = set(parameters) - declared(chapter)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise Refusal(f"{chapter.stem} has no parameter {names}; nothing was run.")
    # What a kernel and its client log while it stops is noise to the reader; what fails in a chapter is raised.
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)
    try:
        return papermill.execute_notebook(
            str(chapter),
            None,
            parameters=parameters,
            kernel_name="python3",
            cwd=str(ROOT / "notebooks"),
            progress_bar=False,
            stdout_file=sys.stdout if live else None,
            stderr_file=sys.stderr if live else None,
            extra_arguments=["--IPKernelApp.log_level=50"],
        )
    except papermill.PapermillExecutionError as error:
        kind = getattr(builtins, error.ename, Exception)
        told = issubclass(kind, (ValueError, OSError, RuntimeError, MemoryError))  # the library's own sentences
        raise Failure(f"{chapter.stem} failed: {error.evalue if live and told else error}") from None


def side_by_side(work, *arguments):
    """Call `work` on every chapter, on each core one: a chapter by itself leaves most of them idle."""
    paths = sorted(chapters(), key=lambda path: -path.stat().st_size)  # the longest are not left for the end
    cores = len(psutil.Process().cpu_affinity()) if psutil.LINUX else psutil.cpu_count()
    n_workers = min(cores, len(paths))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // n_workers))  # more threads than cores wait for each other
    ignored = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is the first process's to answer: `stop` ends the others
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), signal.signal, ignored) as pool:
        futures = [pool.submit(work, path, *arguments) for path in paths]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def clean(notebook):
    """Drop what a run leaves behind: injected cells, times, absolute paths, split streams."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT_METADATA if cell.metadata.get(key)})
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
    return notebook


def join_streams(outputs):
    """Merge neighbouring pieces of one stream: where a kernel cuts them depends on timing."""
    joined = []
    for output in outputs:
        before = joined[-1] if joined else None
        if output.output_type == "stream" and before and before.get("name") == output.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def replace_file(path, text):
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def render(chapter, folder, url, ref):
    """Run a chapter with its default parameters and write the cleaned, stamped page into `folder`."""
    start = time.monotonic()
    notebook = clean(execute(chapter))
    stamp(notebook, chapter.stem, url, ref)
    nbformat.validate(notebook)
    replace_file(folder / chapter.name, nbformat.writes(notebook) + "\n")
    print(f"{chapter.stem}: {time.monotonic() - start:.1f} s", flush=True)


# ------------------------------------------------------------------------------------ commands


def claims_markdown(form):
    """Return the verdicts computed from the committed rows: `summary` (table) or `headline` (lines)."""
    import snip_lib.claims

    with contextlib.chdir(ROOT / "notebooks"):  # the rows are looked up from there
        return getattr(snip_lib.claims, f"{form}_markdown")().strip() + "\n"


def with_headline(readme):
    """Return the README's text with the verdicts of the rows between its two markers."""
    text, count = HEADLINE.subn(lambda match: match[1] + claims_markdown("headline") + match[2], readme)
    if count != 1:
        raise Failure("README.md needs one <!-- verdict --> … <!-- /verdict --> pair.")
    return text


def picture(chapter):
    """Return the first figure of a rendered chapter as PNG bytes."""
    cells = nbformat.read(chapter, as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return base64.b64decode(next(data["image/png"] for data in outputs if "image/png" in data))


def book():
    """Run every chapter into the staging tree and build the pages from there."""
    url, ref = page_address()
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("*.py", "__*"))
    (STAGE / "notebooks").mkdir()
    side_by_side(render, STAGE / "notebooks", url, ref)
    (STAGE / "book/_generated").mkdir(exist_ok=True)
    (STAGE / "book/_generated/verdicts.md").write_text(claims_markdown("summary"), encoding="utf-8")
    address = committed_address()[0]
    for page in STAGE.glob("book/**/*.md"):
        page.write_text(move_address(page.read_text(), address, url), encoding="utf-8")
    config = yaml.safe_load((STAGE / "book/_config.yml").read_text())
    config["repository"] |= {"url": url, "branch": ref}
    (STAGE / "book/_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True))
    shutil.rmtree(BUILD / "html", ignore_errors=True)
    jupyter_book = [Path(sys.executable).with_name("jupyter-book"), "build", STAGE, "--all"]
    options = ["--config", STAGE / "book/_config.yml", "--toc", STAGE / "book/_toc.yml"]
    options += ["-W", "--keep-going", "--quiet", "--path-output", ROOT]
    if subprocess.run([*jupyter_book, *options], cwd=STAGE).returncode:
        raise Failure("jupyter-book failed; the reason stands above.")
    print(f"Open {BUILD / 'html/index.html'}")


def pages():
    """Run the committed chapters again in place, and write the README's verdicts and picture."""
    if os.environ.get("SNIP_RESULTS"):
        raise Refusal(
            "The committed pages show the committed rows: unset SNIP_RESULTS, or look at others by make book."
        )
    url, ref = committed_address()
    side_by_side(render, ROOT / "notebooks", url, ref)
    figure = picture(ROOT / "notebooks/02_lenet_sweeps.ipynb")
    (ROOT / "book/_static/lenet-sweeps.png").write_bytes(figure)
    readme = ROOT / "README.md"
    replace_file(readme, with_headline(readme.read_text(encoding="utf-8")))
    move_committed_address(url)


def rows(chapter, profile, budget, cluster):
    """Train what is missing in the chapters chosen; the rows stay, the output is thrown away."""
    if not chapter:
        raise Refusal("Say which chapter: make rows CHAPTER=02 PROFILE=short.")
    if not profile:
        raise Refusal("Say which profile: PROFILE=smoke, short or paper.")
    if profile not in PROFILES:
        raise Refusal(f"There is no profile {profile!r}; the profiles are: {', '.join(PROFILES)}.")
    parameters = {"profile": profile, "train_missing": True}
    if budget:
        try:
            parameters["budget_s"] = float(budget)
        except ValueError:
            raise Refusal(f"BUDGET is a number of seconds, not {budget!r}.") from None
    if cluster:
        parameters["cluster"] = cluster
    chosen = chapters(chapter)
    for path in chosen:
        start = time.monotonic()
        execute(path, live=True, **parameters)
        print(f"{path.stem}: {time.monotonic() - start:.1f} s", flush=True)


def smoke():
    """Run every chapter with the `smoke` profile, training into a folder deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="snip-smoke-") as folder:
        side_by_side(smoke_one, Path(folder))


def smoke_one(chapter, folder):
    """Run one chapter with the `smoke` profile, in a folder of its own: chapters share runs, and train at once."""
    own = folder / chapter.stem
    os.environ |= {"SNIP_RESULTS": str(own), "SNIP_CACHE": str(own / "cache")}
    start, names = time.monotonic(), declared(chapter)
    wanted = {"profile": "smoke", "train_missing": True}
    execute(chapter, **{name: value for name, value in wanted.items() if name in names})
    note = "" if "train_missing" in names else " (trains nothing)"
    print(f"smoke {chapter.stem}: {time.monotonic() - start:.1f} s{note}", flush=True)


def stop(number, frame):
    """End at once on a signal: the kernel and all its workers go too."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        process.terminate()
    for process in psutil.wait_procs(family, timeout=1)[1]:
        process.kill()
    print("\nStopped; finished rows are kept, and long runs lose a minute at most.", file=sys.stderr, flush=True)
    os._exit(128 + number)


def main():
    """Read the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (book, pages, smoke):
        commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
    training = commands.add_parser("rows", help=rows.__doc__.splitlines()[0])
    for name in ("--chapter", "--profile", "--budget", "--cluster"):
        training.add_argument(name, default="")
    options = vars(parser.parse_args())
    for name in ("SNIP_DATA", "SNIP_RESULTS", "SNIP_CACHE"):
        if os.environ.get(name):  # a kernel starts in another folder
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        globals()[options.pop("command")](**options)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
