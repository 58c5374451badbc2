"""`dlm-tune push`: share a checkpoint or adapter on the Hugging Face Hub."""

from dlm_tune.commands.console import say
from dlm_tune.hub import PushReport, push_to_hub
from dlm_tune.recipe import Recipe


def run_push(recipe: Recipe) -> None:
    """Push a folder, or with `dry_run` show what would be pushed."""
    (arguments,) = recipe.build()
    report = push_to_hub(
        arguments.model_name_or_path,
        arguments.hub_model_id,
        private=arguments.private,
        revision=arguments.revision,
        base_model=arguments.base_model,
        license=arguments.license,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        commit_message=arguments.commit_message,
    )
    print_report(report, private=arguments.private)


def print_report(report: PushReport, *, private: bool) -> None:
    """Print files with their sizes, what stays here, and the head of the card."""
    visibility = "private" if private else "public"
    done = "Would be pushed" if report.url is None else "Pushed"
    say(f"{done} to {report.repo_id} ({visibility} if it is new):")
    width = max(len(name) for name in report.sizes)
    say(*(f"  {name:{width}}  {_shown(size):>10}" for name, size in report.sizes.items()))
    say(f"  {'':{width}}  {_shown(sum(report.sizes.values())):>10}")
    if report.left_out:
        say("Stays here: " + ", ".join(report.left_out))
    say("", "Model card:", *(f"  {line}" for line in report.metadata.splitlines()))
    say(*(f"Note: {warning}" for warning in report.warnings))
    if report.url is None:
        say("", "Nothing was contacted (--dry_run).")
    else:
        say("", report.url, f'Load it with load_model("{report.repo_id}").')


def _shown(size: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} B"
