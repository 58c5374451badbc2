"""`dlm-tune report`: the curves of a run, or of several, in one HTML page and one PNG."""

from pathlib import Path

from dlm_tune.recipe import RecipeError

USAGE = "OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE.html]"
_TITLE = "the command line of `dlm-tune report`"


def run_report(arguments: list[str]) -> None:
    """Write the page and the picture beside it.

    Raises:
        RecipeError: a wrong command line.
        ValueError: a folder without a run, or with a file that cannot be read.
    """
    folders, output = parse_arguments(arguments)
    # reading first: drawing imports matplotlib
    from dlm_tune.commands.report_panels import MAX_RUNS, make_panels
    from dlm_tune.commands.report_run import read_runs

    if len(folders) > MAX_RUNS:
        raise RecipeError([f"{len(folders)} runs cannot be told apart in one plot: give {MAX_RUNS} at most."], _TITLE)
    runs = read_runs(folders)
    panels = make_panels(runs)
    if not panels:
        raise ValueError(
            f"{', '.join(map(str, folders))}: the log has none of the quantities of a dlm-tune run. A run of fewer "
            "steps than logging_steps logs nothing: give it a smaller one."
        )
    from dlm_tune.commands.report_figures import panels_png
    from dlm_tune.commands.report_page import render_page

    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    page = render_page(runs, panels, title)
    picture = panels_png(panels, title, [run.name for run in runs])
    output.write_text(page, encoding="utf-8")
    output.with_suffix(".png").write_bytes(picture)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}")
    print(f"{output}\n{output.with_suffix('.png')}")


def parse_arguments(arguments: list[str]) -> tuple[list[Path], Path]:
    """Folders of the runs, and the page's file: `OUTPUT_DIR/report.html` for one run, `--output` for several.

    Raises:
        RecipeError: all faults at once.
    """
    folders: list[Path] = []
    outputs: list[str] = []
    faults = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--output":
            value = value if equals else next(rest, "")
            outputs.append(value)
            if Path(value).suffix != ".html":
                faults.append(f"--output {value or '(nothing)'}: give a file that ends in .html.")
            elif not Path(value).parent.is_dir():
                faults.append(f"--output {value}: the folder {Path(value).parent} does not exist.")
        elif argument.startswith("-"):
            faults.append(f"'{argument}': only --output FILE.html is known.")
        elif Path(argument) in folders:
            faults.append(f"'{argument}' is given twice.")
        else:
            folders.append(Path(argument))
    if not folders:
        faults.append("no run: give the output_dir of one or more training runs.")
    if len(outputs) > 1:
        faults.append("--output is given twice.")
    if len(folders) > 1 and not outputs:
        faults.append("several runs make one page: say where it goes with --output FILE.html.")
    if faults:
        raise RecipeError(faults, f"{_TITLE} {USAGE}")
    return folders, Path(outputs[0]) if outputs else folders[0] / "report.html"
