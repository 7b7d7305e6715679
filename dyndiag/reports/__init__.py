"""A run explained in one HTML file: verdict, findings with their evidence, every chart, the facts.

Needs no torch. `contents` gives the same as plain data, `verdict` its first sentence.
"""

from __future__ import annotations

from pathlib import Path

from dyndiag.errors import DyndiagError
from dyndiag.reports.contents import Contents, contents
from dyndiag.reports.verdict import verdict
from dyndiag.store import Run


def report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the run's report and return its path; `<run>/report.html` unless told otherwise.

    The file stands alone: no request, no third-party code, below 3 MB. Detectors are replayed over
    the stored series with the settings they had. A run that is still going may be reported.
    Raises DyndiagError if `run` is no run's folder, or where the page cannot be written.
    """
    from dyndiag.reports.page import page  # jinja2 is needed for nothing else

    source = Run(run)
    target = Path(output) if output is not None else source.folder / "report.html"
    text = page(contents(source))
    if target.is_dir():
        raise DyndiagError(
            f"the report is one file, but {target} is a folder: give a file, as in "
            f"{target / 'report.html'}"
        )
    beside = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        beside.replace(target)  # a reader never sees half a page
    except OSError as error:
        raise DyndiagError(
            f"the report cannot be written to {target} ({error.strerror or error}): give another "
            "file as output"
        ) from error
    return target


__all__ = ["Contents", "contents", "report", "verdict"]
