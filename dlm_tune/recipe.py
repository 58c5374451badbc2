"""Strict recipes: a flat YAML file and command-line flags become the dataclasses of a verb.

The keys are the fields of the dataclasses, as with TRL's parser. Unlike there, every fault carries file and line,
values are checked against the field's type, and all faults are raised at once.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from typing import Any, NoReturn, get_type_hints

from dlm_tune.recipe_types import accepts_dict, accepts_list, convert, describe, is_bool, parse_flag
from dlm_tune.recipe_yaml import dump_yaml, read_yaml
from dlm_tune.shipped import find_yaml

# Keys of older libraries or of other tools, with what to write instead.
RENAMED_KEYS = {
    "dataset": "write dataset_name",
    "dataset_mixture": "write datasets, a list of {path, split, fraction, ...}",
    "dataset_mixer": "write datasets, a list of {path, split, fraction, ...}",
    "evaluation_strategy": "write eval_strategy",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "lora_rank": "write lora_r",
    "max_seq_length": "write max_length",
    "no_cuda": "write use_cpu",
    "save_safetensors": "remove it: checkpoints are always safetensors",
    "torch_dtype": "write dtype",
    "load_in_4_bit": "write load_in_4bit",
    "warmup_ratio": "write warmup_steps with a value below 1, the share of all steps (0.03)",
    "logging_dir": "remove it: each tracker of report_to has its own setting",
}


class RecipeError(ValueError):
    """One or more faults of a recipe or of the command line, all in one message."""

    def __init__(self, faults: Iterable[str], title: str = "recipe"):
        self.faults = list(faults)
        plural = "s" if len(self.faults) > 1 else ""
        lines = "\n".join("  " + fault.replace("\n", "\n    ") for fault in self.faults)
        super().__init__(f"{len(self.faults)} problem{plural} in {title}:\n{lines}")


@dataclass(frozen=True)
class Key:
    """A key of a verb: one field of one of its dataclasses."""

    name: str
    hint: Any
    owner: type
    definition: Field

    @property
    def choices(self) -> list[Any] | None:
        """Values that are allowed, where the field lists them."""
        return self.definition.metadata.get("choices")

    @property
    def default(self) -> Any:
        """Default value; `dataclasses.MISSING` for a required key."""
        factory = self.definition.default_factory
        return self.definition.default if factory is MISSING else factory()


@dataclass(frozen=True)
class Setting:
    """A value with the place it was written at."""

    value: Any
    place: str
    is_flag: bool
    is_automatic: bool = False


def keys_of(classes: Iterable[type]) -> dict[str, Key]:
    """All keys of some dataclasses, in their order; a name that two of them share belongs to both."""
    keys: dict[str, Key] = {}
    for owner in classes:
        hints = get_type_hints(owner)
        for definition in fields(owner):
            if definition.init and definition.name not in keys:
                keys[definition.name] = Key(definition.name, hints[definition.name], owner, definition)
    return keys


class Recipe:
    """The settings of one run: checked keys and values, not yet the objects.

    Args:
        classes: dataclasses of the verb.
        settings: key -> `Setting`; flags have already replaced the file's values.
        title: how messages name the recipe.
    """

    def __init__(self, classes: tuple[type, ...], settings: dict[str, Setting], title: str = "recipe"):
        self.classes = classes
        self.settings = settings
        self.title = title

    def __contains__(self, key: str) -> bool:
        return key in self.settings

    def get(self, key: str, default: Any = None) -> Any:
        """Value as written, or `default` for a key that is not written."""
        return self.settings[key].value if key in self.settings else default

    def set(self, key: str, value: Any, place: str) -> None:
        """Set a key on the command's own account; it is not part of `to_yaml`."""
        self.settings[key] = Setting(value, place, is_flag=False, is_automatic=True)

    def build(self) -> tuple[Any, ...]:
        """Build one object per dataclass.

        Raises:
            RecipeError: the faults that the dataclasses themselves find, of all of them.
        """
        built, faults = [], []
        for owner in self.classes:
            names = [definition.name for definition in fields(owner) if definition.init]
            try:
                built.append(owner(**{name: self.settings[name].value for name in names if name in self.settings}))
            except (ValueError, TypeError, ImportError) as error:
                faults.append(str(error))
        if faults:
            raise RecipeError(faults, self.title)
        return tuple(built)

    def to_yaml(self, header: str = "") -> str:
        """The resolved recipe, flags included, as a file that the same verb reads."""
        order = keys_of(self.classes)
        written = {name: setting.value for name, setting in self.settings.items() if not setting.is_automatic}
        values = {name: written[name] for name in order if name in written}
        return dump_yaml(values, header)


def parse_recipe(
    classes: tuple[type, ...],
    arguments: list[str],
    *,
    verb: str = "sft",
    verb_of_key: Callable[[str], list[str]] = lambda key: [],
    ineffective: Callable[[Recipe, Mapping[str, Key]], list[str]] = lambda recipe, keys: [],
) -> Recipe:
    """Read `--config FILE` and the flags of a verb into a checked `Recipe`.

    Args:
        classes: dataclasses of the verb; their fields are the keys.
        arguments: command line after the verb.
        verb: name of the verb, for messages.
        verb_of_key: which other verbs know a key, asked for unknown keys only.
        ineffective: finds keys that are set but do nothing.

    Raises:
        RecipeError: all faults: unknown, renamed, misplaced, duplicate and ineffective keys, values of a wrong type.
    """
    keys = keys_of(classes)
    config, arguments, faults = _take_config(arguments)
    settings: dict[str, Setting] = {}
    title = f"the command line of `dlm-tune {verb}`"
    if config is not None:
        path = find_yaml(config, "recipes")
        title = str(path)
        entries, yaml_faults = read_yaml(path)
        faults += yaml_faults
        for name, value, line in entries:
            place = f"{path}:{line}"
            if name not in keys:
                faults.append(f"{place}: {_unknown(name, keys, verb, verb_of_key)}")
                continue
            faults += _checked(settings, keys[name], value, place, is_flag=False)
    faults += _read_flags(settings, keys, arguments, verb, verb_of_key)
    recipe = Recipe(classes, settings, title)
    faults += [] if faults else ineffective(recipe, keys)
    if faults:
        raise RecipeError(faults, title)
    return recipe


def _take_config(arguments: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Split `--config FILE` or `--config=FILE` off the command line."""
    config, remaining, faults = None, [], []
    tokens = iter(arguments)
    for token in tokens:
        if token != "--config" and not token.startswith("--config="):
            remaining.append(token)
            continue
        value = token.removeprefix("--config=") if "=" in token else next(tokens, "")
        if not value or value.startswith("--"):
            faults.append("--config: needs a file or the name of a shipped recipe, for example llada-8b/sft/lora.")
        elif config is not None:
            faults.append(f"--config: given twice ('{config}' and '{value}'). One run has one recipe.")
        config = value
    return (config if not faults else None), remaining, faults


def _checked(settings: dict[str, Setting], key: Key, value: Any, place: str, is_flag: bool) -> list[str]:
    """Store a value that has its key's type; otherwise return the fault."""
    try:
        converted = convert(value, key.hint)
    except TypeError:
        if value is None:  # `null` takes a key back that cannot be null
            settings.pop(key.name, None)
            return []
        shown = json.dumps(value, default=str, ensure_ascii=False)
        return [f"{place}: {key.name} = {shown} has the wrong type: expected {describe(key.hint)}."]
    if key.choices and converted is not None and converted not in key.choices:
        near = get_close_matches(str(converted), map(str, key.choices), n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        choices = ", ".join(map(str, key.choices))
        return [f"{place}: {key.name} = {converted!r} is not one of: {choices}.{hint}"]
    settings[key.name] = Setting(converted, place, is_flag)
    return []


def _unknown(name: str, keys: Mapping[str, Key], verb: str, verb_of_key: Callable[[str], list[str]]) -> str:
    """Say what an unknown key could be: renamed, of another verb, or misspelt."""
    if name in RENAMED_KEYS:
        return f"unknown key '{name}': {RENAMED_KEYS[name]}."
    others = verb_of_key(name)
    if others:
        return f"'{name}' is a key of `dlm-tune {'`, `dlm-tune '.join(others)}`, not of `dlm-tune {verb}`. Remove it."
    near = get_close_matches(name, keys, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"`dlm-tune {verb} --help-all` lists all keys."
    return f"unknown key '{name}': {hint}"


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError([message], f"the command line of `{self.prog}`")


def _read_flags(
    settings: dict[str, Setting],
    keys: Mapping[str, Key],
    arguments: list[str],
    verb: str,
    verb_of_key: Callable[[str], list[str]],
) -> list[str]:
    """Read `--key value`, `--key=value`, `--switch`, `--no_switch`, `--list a b` and `--mapping.key value`."""
    parser = _FlagParser(f"dlm-tune {verb}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key in keys.values():
        names = dict.fromkeys((f"--{key.name}", f"--{key.name.replace('_', '-')}"))
        if is_bool(key.hint):
            parser.add_argument(*names, dest=key.name, nargs="?", const="true")
            negations = dict.fromkeys((f"--no_{key.name}", f"--no-{key.name.replace('_', '-')}"))
            parser.add_argument(*negations, dest=key.name, action="store_const", const="false")
        elif accepts_list(key.hint):
            parser.add_argument(*names, dest=key.name, nargs="+", action="extend")
        else:
            parser.add_argument(*names, dest=key.name)
    arguments, dotted, faults = _take_dotted(arguments, keys)
    given, unknown = parser.parse_known_args(arguments)
    for name, tokens in vars(given).items():
        value = parse_flag(tokens, keys[name].hint)
        faults += _checked(settings, keys[name], value, f"--{name}", is_flag=True)
    for name, inner, token in dotted:
        written = settings[name].value if name in settings and isinstance(settings[name].value, dict) else {}
        value = {**written, inner: parse_flag(token, Any)}
        faults += _checked(settings, keys[name], value, f"--{name}.{inner}", is_flag=True)
    for token in unknown:
        if token.startswith("--"):
            name = token[2:].split("=")[0].replace("-", "_")
            faults.append(f"--{name}: {_unknown(name, keys, verb, verb_of_key)}")
        elif not any(other.startswith("--") for other in unknown):  # else it is the unknown flag's value
            faults.append(f"'{token}' belongs to no flag: values follow a `--key`.")
    return faults


def _take_dotted(
    arguments: list[str], keys: Mapping[str, Key]
) -> tuple[list[str], list[tuple[str, str, str]], list[str]]:
    """Split `--mapping.key value` off the command line."""
    remaining, dotted, faults = [], [], []
    tokens = iter(arguments)
    for token in tokens:
        name, dot, inner = token.removeprefix("--").partition("=")[0].partition(".")
        name = name.replace("-", "_")
        if not (token.startswith("--") and dot and name in keys):
            remaining.append(token)
            continue
        if not accepts_dict(keys[name].hint):
            faults.append(f"--{name}.{inner}: {name} is not a mapping: expected {describe(keys[name].hint)}.")
        value = token.partition("=")[2] if "=" in token else next(tokens, None)
        if value is None:
            faults.append(f"--{name}.{inner}: needs a value.")
        elif accepts_dict(keys[name].hint):
            dotted.append((name, inner, value))
    return remaining, dotted, faults


def check_mapping(values: Mapping[str, Any], owner: type, name: str) -> tuple[dict[str, Any], list[str]]:
    """Check the inner keys of a mapping-valued key against a dataclass; returns its values and the faults."""
    keys = keys_of((owner,))
    settings: dict[str, Setting] = {}
    faults = []
    for inner, value in values.items():
        if inner in keys:
            faults += _checked(settings, keys[inner], value, name, is_flag=False)
        else:
            near = get_close_matches(str(inner), keys, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(keys)}."
            faults.append(f"{name}: unknown key '{inner}': {hint}")
    return {inner: setting.value for inner, setting in settings.items()}, faults
