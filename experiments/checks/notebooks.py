"""Runs all notebooks as they are, and shows them in a browser: to be looked at.

python -m experiments.checks.notebooks [--out=runs/notebooks/html] [--only=01,04]    needs nbconvert and Chromium

Each is executed from its first cell to its last, converted to HTML and opened in headless Chromium, which writes what
it shows to a PNG beside it. Pictures that it could draw are counted in the browser's own document. Exit code 1 where a
cell fails, or the browser draws fewer than the notebook has.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

from absl import flags

from experiments import common
from meta_attention_jax.console import say
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole

ROOT = pathlib.Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COUNT = """<script>window.addEventListener('load', () => {
  const drawn = [...document.images].filter((one) => one.naturalWidth > 0).length;
  document.title = `drawn=${drawn} height=${document.documentElement.scrollHeight}`;
});</script></body>"""
"""In the page that is looked at: what the browser could draw, said where `--dump-dom` shows it."""
WIDTH, MOST = 1100, 16_000  # Pixels of a page; a longer one is cut.


def main() -> None:
    paths = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))
    with common.user_mistakes():
        names = [path.stem for path in paths]
        unknown = [one for one in ONLY.value if not any(name.startswith(one) for name in names)]
        expect(not unknown, "only", f"beginnings of {', '.join(names)}", ", ".join(unknown))
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        expect(browser, "browser", f"one of {', '.join(BROWSERS)}", "none")
        try:
            import nbconvert  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("notebooks: expected the package nbconvert, got none; pip install nbconvert.") from None
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    wrong = [path.stem for path in paths
             if path.stem.startswith(tuple(ONLY.value) or "") and not shown(path, out, browser)]
    if wrong:
        raise SystemExit(f"error: notebooks that do not show what they should: {', '.join(wrong)}")


def shown(path: pathlib.Path, out: pathlib.Path, browser: str) -> bool:
    """Whether a notebook ran, and the browser drew all of its pictures."""
    import jupytext
    import nbclient
    import nbconvert

    notebook = jupytext.read(path)
    try:
        nbclient.NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
        ).execute()
    except nbclient.exceptions.CellExecutionError as error:
        say(f"{path.stem}: {error}")
        return False
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    page, picture = (out / f"{path.stem}{end}" for end in (".html", ".png"))
    write_whole(page, html)
    wanted = sum("image/png" in output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code"
                 for output in cell.outputs)
    counted = html.replace("</body>", COUNT)
    write_whole(looked := out / f".{path.stem}.html", counted)
    said = _browse(browser, "--dump-dom", looked)
    title = re.search(r"drawn=(\d+) height=(\d+)", said)
    looked.unlink()
    drawn, height = (int(part) for part in title.groups()) if title else (0, MOST)
    _browse(browser, f"--screenshot={picture.resolve()}", page, height=min(height, MOST))
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    say(f"{path.stem}: {cells} cells ran, {drawn} of {wanted} pictures drawn, {height} pixels high: {picture}")
    return drawn >= wanted and picture.is_file()


def _browse(browser: str, what: str, page: pathlib.Path, height: int = 400) -> str:
    """What the browser prints of a page, of which it fetches nothing from elsewhere."""
    return subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", f"--window-size={WIDTH},{height}",
         what, page.resolve().as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout


if __name__ == "__main__":
    OUT = common.define_path("out", "runs/notebooks/html", "Where pages and pictures go.")
    ONLY = flags.DEFINE_list("only", [], "Beginnings of names; all where there are none.")
    common.run(main, prints=True)
