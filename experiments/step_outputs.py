"""The flags for files of a planned step."""

import pathlib

from absl import flags

JSON_OUTPUT = flags.DEFINE_string("json_output", None, "File for all figures.")
HTML_OUTPUT = flags.DEFINE_string("html_output", None, "File for a page that shows the step.")

STEP_OUTPUTS = (JSON_OUTPUT, HTML_OUTPUT)


@flags.validator("json_output", "its folder does not exist; create it first")
@flags.validator("html_output", "its folder does not exist; create it first")
def has_folder(path: str | None) -> bool:
    """Whether a file can be written at this path, if there is one."""
    return path is None or pathlib.Path(path).absolute().parent.is_dir()


@flags.validator("html_output", "it is a page for a browser; let it end in .html")
def _is_page(path: str | None) -> bool:
    return path is None or path.endswith(".html")
