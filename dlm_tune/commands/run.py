"""From a verb's command line to its function."""

from collections.abc import Mapping

from dlm_tune.commands.arguments import verb_classes, verbs_of_key
from dlm_tune.commands.console import say
from dlm_tune.commands.effects import ineffective_keys
from dlm_tune.recipe import Key, Recipe, Setting, parse_recipe
from dlm_tune.shipped import resolve_path

# Keys that may name a shipped file or folder
_PATH_KEYS = (
    "model_name_or_path",
    "adapter",
    "tokenizer_name_or_path",
    "dataset_name",
    "eval_dataset_name",
    "prompts_file",
    "chat_template_path",
)


def read_arguments(verb: str, arguments: list[str]) -> Recipe:
    """Parse and check a verb's recipe and flags, and resolve its paths.

    Raises:
        RecipeError: all faults at once.
    """

    def ineffective(recipe: Recipe, keys: Mapping[str, Key]) -> list[str]:
        return ineffective_keys(verb, recipe, keys)

    recipe = parse_recipe(
        verb_classes(verb),
        arguments,
        verb=verb,
        verb_of_key=lambda key: verbs_of_key(key, excluded=verb),
        ineffective=ineffective,
    )
    resolve_paths(recipe)
    return recipe


def resolve_paths(recipe: Recipe) -> None:
    """Replace relative paths that exist only among the shipped files."""
    for name in _PATH_KEYS:
        if isinstance(recipe.get(name), str):
            old = recipe.settings[name]
            recipe.settings[name] = Setting(resolve_path(old.value), old.place, old.is_flag)
    if recipe.get("datasets"):
        old = recipe.settings["datasets"]
        entries = [
            {**entry, "path": resolve_path(entry["path"])} if isinstance(entry, dict) and "path" in entry else entry
            for entry in old.value
        ]
        recipe.settings["datasets"] = Setting(entries, old.place, old.is_flag)


def run(verb: str, recipe: Recipe) -> None:
    """Run a verb with its recipe."""
    if verb == "push":  # no device is needed
        from dlm_tune.commands.push import run_push

        run_push(recipe)
        return
    if verb == "merge":
        from dlm_tune.commands.merge import run_merge

        run_merge(recipe)
        return
    if verb == "convert":
        from dlm_tune.commands.convert import run_convert

        run_convert(recipe)
        return
    choose_device(recipe)
    if verb in ("pretrain", "sft"):
        from dlm_tune.commands.train import run_training

        run_training(verb, recipe)
    elif verb == "generate":
        from dlm_tune.commands.generate import run_generate

        run_generate(recipe)
    elif verb == "chat":
        from dlm_tune.commands.chat import run_chat_command

        run_chat_command(recipe)
    elif verb == "eval":
        from dlm_tune.commands.evaluate import run_eval

        run_eval(recipe)
    else:
        from dlm_tune.commands.inspect_batch import run_inspect

        run_inspect(recipe)


def choose_device(recipe: Recipe) -> None:
    """Say so, and set `use_cpu`, where there is no accelerator."""
    import torch

    if "use_cpu" not in recipe and not torch.accelerator.is_available():
        recipe.set("use_cpu", True, place="no accelerator found")
        say("No accelerator found: running on the CPU.")
