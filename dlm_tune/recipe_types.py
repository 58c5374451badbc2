"""Values of recipes against the type hints of dataclass fields."""

from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from dlm_tune.recipe_yaml import parse_scalar


def alternatives(hint: Any) -> list[Any]:
    """The members of a union; the hint itself when it is none."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def is_bool(hint: Any) -> bool:
    """Whether a field is a switch (`bool` or `bool | None`)."""
    return [member for member in alternatives(hint) if member is not NoneType] == [bool]


def accepts_list(hint: Any) -> bool:
    """Whether a field takes a list."""
    return any(member is list or get_origin(member) is list for member in alternatives(hint))


def accepts_dict(hint: Any) -> bool:
    """Whether a field takes a mapping."""
    return any(member is dict or get_origin(member) is dict for member in alternatives(hint))


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the hint's type wants it.

    Raises:
        TypeError: the value has none of the hint's types. Strings never become numbers or truth values.
    """
    if hint is Any:
        return value
    members = alternatives(hint)
    if len(members) > 1:
        # An enumeration beside `str` (`SchedulerType | str`) means: a string out of this list.
        if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
            members = [member for member in members if member is not str]
        for member in members:
            try:
                return convert(value, member)
            except TypeError:
                continue
        raise TypeError(describe(hint))
    if _is_instance(value, hint):
        return [convert(item, get_args(hint)[0]) for item in value] if get_args(hint) and hint_is_list(hint) else value
    raise TypeError(describe(hint))


def hint_is_list(hint: Any) -> bool:
    """Whether a hint is `list[...]`."""
    return get_origin(hint) is list


def _is_instance(value: Any, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return value in get_args(hint)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if is_dataclass(origin):
        return isinstance(value, dict | origin)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value in [member.value for member in origin] if isinstance(value, str) else isinstance(value, origin)
    return isinstance(value, origin) if isinstance(origin, type) else False


def parse_flag(tokens: str | list[str], hint: Any) -> Any:
    """Value of a flag: text for a text field, otherwise what the same characters mean in a recipe."""
    if isinstance(tokens, list):
        item = next((get_args(m)[0] for m in alternatives(hint) if hint_is_list(m) and get_args(m)), Any)
        if tokens == ["null"]:
            return None
        if len(tokens) == 1 and tokens[0].startswith(("[", "{")):
            value = parse_scalar(tokens[0])
            is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
            if item is not str or is_texts:
                return value  # else a text that begins with a bracket
        values = [parse_flag(token, item) for token in tokens]
        return values[0] if len(values) == 1 and str in alternatives(hint) else values
    members = alternatives(hint)
    if hint is not Any and str in members and not (tokens == "null" and NoneType in members):
        for member in members:  # `int | str`: a number where it reads as one
            if member is not str and not isinstance(parse_scalar(tokens), str):
                try:
                    return convert(parse_scalar(tokens), hint)
                except TypeError:
                    break
        return tokens
    return parse_scalar(tokens)


_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    NoneType: "null",
}


def describe(hint: Any) -> str:
    """The hint in words, for messages and help."""
    members = alternatives(hint)
    enumerations = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enumerations:
        members = [member for member in members if member is not str]
    if len(members) > 1:
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    if hint in enumerations or enumerations:
        return "one of " + ", ".join(str(member.value) for member in enumerations[0])
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is list and get_args(hint):
        inner = get_args(hint)[0]
        return {str: "a list of texts", int: "a list of integers", float: "a list of numbers"}.get(inner, "a list")
    if origin in _NAMES:
        return _NAMES[origin]
    return "a mapping" if is_dataclass(origin) else getattr(origin, "__name__", str(origin))
