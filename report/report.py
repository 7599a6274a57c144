"""Typeset report/report.pdf from report/*.typ, the figures under report/figures/report and the records under results/.

python report/report.py            draw the figures (report/figures.py), then write report/report.pdf
python report/report.py --check    exit status 1 if report/report.pdf is not what text, figures and records give

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


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="exit status 1 if it is not what records and figures give")
    path = HERE / "report.pdf"
    if parser.parse_args().check:
        current = path.exists() and path.read_bytes() == typeset()
        if not current:
            print("report/report.pdf is not what its text and the records say: run `make report`", file=sys.stderr)
        return int(not current)
    import figures  # here: it brings Matplotlib and PyTorch along, which the check does not need

    figures.draw_all()
    write_whole(path, typeset())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
