"""The flags for files of a planned step."""

from absl import flags

from experiments.chosen_layers import layers_title
from experiments.json_output import JSON_OUTPUT, has_folder
from experiments.predicted_step import PredictedStep

HTML_OUTPUT = flags.DEFINE_string("html_output", None, "File for a page that shows the step.")

STEP_OUTPUTS = (JSON_OUTPUT, HTML_OUTPUT)


flags.register_validator("html_output", has_folder, "its folder does not exist; create it first")


def write_page(step: PredictedStep, strategy: str) -> None:
    """Writes a page of the step of a strategy to --html_output, if it is given."""
    if HTML_OUTPUT.value is not None:
        title = f"{layers_title()}, {strategy}, predicted"
        step.timeline.save(HTML_OUTPUT.value, plan=step.plan, title=title)


@flags.validator("html_output", "it is a page for a browser; let it end in .html")
def _is_page(path: str | None) -> bool:
    return path is None or path.endswith(".html")
