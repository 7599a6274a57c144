"""Typeset report/report.pdf from report/*.typ, the records, and the figures that report/figures.py draws.

The same text, figures and records give the same bytes. Typst comes with its fonts: nothing else is needed.
"""

import json
import sys
from pathlib import Path

import typst

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from runs import Parser, write_whole


def typeset() -> bytes:
    """The report as a PDF. Raises typst.TypstError where the text is wrong or a record is missing."""
    results = HERE.parent / "results"
    records = sorted(path.relative_to(results).as_posix() for path in results.rglob("*.json"))
    return typst.compile(
        str(HERE / "report.typ"),
        root=str(HERE.parent),
        ignore_system_fonts=True,
        sys_inputs={"records": json.dumps(records)},  # Typst cannot ask whether a file is there
    )


if __name__ == "__main__":
    Parser(__doc__).parse_args()
    write_whole(HERE / "report.pdf", typeset())
