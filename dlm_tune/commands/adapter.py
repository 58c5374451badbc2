"""The adapter of a training run: a new one as the recipe says, or an earlier one to go on from."""

from pathlib import Path

from peft import PeftConfig
from trl import ModelConfig, get_peft_config

from dlm_tune.models.checkpoint_files import checkpoint_directory, is_adapter_directory
from dlm_tune.recipe import Recipe, RecipeError

# Key of a recipe -> field of PEFT's configuration
_LORA_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def earlier_adapter(model_arguments: ModelConfig) -> Path | None:
    """The directory of the adapter that `model_name_or_path` names; None where it names a model.

    Of a Hub repository everything but the weights is fetched.

    Raises:
        ValueError: no such checkpoint.
    """
    if not model_arguments.model_name_or_path:
        return None
    directory = checkpoint_directory(
        model_arguments.model_name_or_path, model_arguments.model_revision, with_weights=False
    )
    return directory if is_adapter_directory(directory) else None


def adapter_config(model_arguments: ModelConfig) -> PeftConfig | None:
    """PEFT's configuration of the adapter that is trained; None where all weights are."""
    directory = earlier_adapter(model_arguments)
    if directory is None:
        return get_peft_config(model_arguments)
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = False
    return config


def check_earlier_adapter(recipe: Recipe, directory: Path) -> None:
    """Refuse keys that describe a new adapter where training goes on from an earlier one.

    Keys of a file are let through where a flag names the adapter and they describe it as it is.

    Raises:
        RecipeError: naming each key with both values.
    """
    config = PeftConfig.from_pretrained(str(directory))
    by_flag = recipe.settings["model_name_or_path"].is_flag
    faults = []
    for key, field in _LORA_KEYS.items():
        setting = recipe.settings.get(key)
        if setting is None or setting.value is None:
            continue
        own = getattr(config, field)
        if _plain(setting.value) != _plain(own):
            faults.append(
                f"{setting.place}: {key} = {setting.value!r}, but the adapter {directory} that training goes on from "
                f"has {field} = {_plain(own)!r}. Remove {key}, or start a new adapter on the base model."
            )
        elif setting.is_flag or not by_flag:
            faults.append(
                f"{setting.place}: {key} has no effect where training goes on from the adapter {directory}, which has "
                "its own. Remove it."
            )
    if recipe.get("use_peft") is False:
        faults.append(
            f"{recipe.settings['use_peft'].place}: use_peft = False, but model_name_or_path = {directory} is an "
            "adapter, and training goes on from it. Remove use_peft; to train all weights, merge the adapter first."
        )
    if faults:
        raise RecipeError(faults, recipe.title)


def _plain(value: object) -> object:
    """A setting in a form that compares: names in order, whether list or set, one or several."""
    if isinstance(value, list | set | tuple):
        return sorted(value)
    return [value] if isinstance(value, str) and value != "all-linear" else value
