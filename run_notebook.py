"""Run hw2-q3.ipynb from the shell, and make a page of it that needs no network.

    python run_notebook.py                              # what `make q3` does
    python run_notebook.py -p preset homework -p seed 7 # parameters, as papermill takes them
    python run_notebook.py -y '{overrides: {epochs: 2}}'

It leaves hw2-q3.ipynb with its outputs and hw2-q3.html under runs/q3 (-out names another folder), and prints what the
notebook prints. Exit status 2 and one line for parameters and data that cannot be used.
"""

import argparse
import re
import sys
from pathlib import Path

from runs import InputError, Parser, one_line, read_json, run_script, write_whole

NOTEBOOK = Path(__file__).parent / "hw2-q3.ipynb"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    parser.add_argument("-y", action="append", default=[], metavar="YAML", help="parameters as a YAML mapping")
    parser.add_argument("-out", type=Path, default=Path("runs/q3"), metavar="FOLDER", help="default: %(default)s")
    return parser.parse_args(arguments)


def read_parameters(args: argparse.Namespace) -> dict:
    """The parameters by name. Raises InputError for names that the notebook does not have, and for bad YAML."""
    import yaml

    try:
        given = {name: yaml.safe_load(value) for name, value in args.p}
        for text in args.y:
            given |= dict(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"-p NAME VALUE and -y '{{NAME: VALUE}}' take YAML: {one_line(error)}") from None
    cells = read_json(NOTEBOOK, "a notebook")["cells"]
    (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    known = re.findall(r"^(\w+) =", "".join(cell["source"]), re.MULTILINE)
    if unknown := set(given) - set(known):
        raise InputError(f"no parameter is called {', '.join(map(str, unknown))}: there are {', '.join(known)}")
    return given


def with_mathml(text: str) -> str:
    """Markdown with its formulas as MathML, which browsers draw themselves. Code is left alone."""
    from latex2mathml.converter import convert

    def formula(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        display = "block" if found["block"] else "inline"
        return convert(" ".join((found["block"] or found["inline"]).split()), display=display)

    return re.sub(
        r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", formula, text, flags=re.DOTALL
    )


def write_page(notebook, path: Path) -> None:
    """Write an executed notebook as an HTML page that loads nothing from elsewhere."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", widget_renderer_url="")
    page, _ = exporter.from_notebook_node(notebook)
    page = re.sub(r'<script[^>]*\bsrc="[^"]*"[^>]*>\s*</script>', "", page)
    write_whole(path, page.encode())


def run(args: argparse.Namespace) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    given, result = read_parameters(args), args.out / NOTEBOOK.name
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"kernel_name": "python3", "progress_bar": False, "cwd": NOTEBOOK.parent, "stdout_file": sys.stdout}
    # Of the kernel: while it shuts down, it may complain of child processes that have just ended.
    options["extra_arguments"] = ["--log-level=CRITICAL"]
    try:
        notebook = papermill.execute_notebook(NOTEBOOK, result, given, **options)
    except PapermillExecutionError as error:
        name = "" if error.ename in ("InputError", "MissingPackage") else f"{error.ename} in {result}: "
        raise InputError(f"{name}{one_line(error.evalue)}") from None
    write_page(notebook, result.with_suffix(".html"))
    print(f"open {result.with_suffix('.html')}: curves, tables, alignments, transcripts")


def main(arguments: list[str] | None = None) -> int:
    return run_script(
        "run_notebook.py", parse_arguments, run, arguments, "stopped; the same command goes on from the last epoch"
    )


if __name__ == "__main__":
    sys.exit(main())
