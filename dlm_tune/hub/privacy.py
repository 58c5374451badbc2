"""What must not leave this machine with a checkpoint: secrets, and where files lie."""

import os
import re
from pathlib import Path
from typing import Any

REMOVED = "[removed]"

# Tokens of Hugging Face, OpenAI-like services, GitHub, AWS and Slack
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|(?:API|ACCESS|SECRET|PRIVATE)_?KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
# `eos_token` and its like are no secrets
_SECRET_KEY = re.compile(r"^hub_token$|^push_to_hub_token$|api_?key$|secret$|password$", re.IGNORECASE)
_SHORTEST_SECRET = 8
_ABSOLUTE = re.compile(r"(?:file://|(?:(?<=[\s=:,'\"(\[])|^)(?:~?/(?!/)|[A-Za-z]:[\\/](?!/)))[^\s'\",)\]]+")
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".yaml", ".yml", ".safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def known_secrets(*more: str | None) -> list[str]:
    """Values of environment variables that are named like secrets, and those given; longest first."""
    values = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)]
    found = {value for value in (*values, *more) if value and len(value) >= _SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def has_secret(text: str, secrets: list[str]) -> bool:
    """Whether a text holds one of the secrets, or what looks like a token."""
    return bool(_SECRET.search(text)) or any(secret in text for secret in secrets)


def redact(text: str, secrets: list[str]) -> str:
    """The text with every secret, and all that looks like a token, replaced."""
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    return _SECRET.sub(REMOVED, text)


def is_hub_name(name: Any) -> bool:
    """Whether a string can name a repository of the Hub and is no local path."""
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        return False
    return not name.endswith(_DATA_SUFFIXES) and not Path(name).exists()


def without_local_paths(value: Any) -> Any:
    """The value with each path, relative or absolute, cut to its last part; lists and dicts are gone through."""
    if isinstance(value, dict):
        return {key: without_local_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if _is_relative_path(value):
        return last_part(value)
    return _ABSOLUTE.sub(lambda match: last_part(match[0]), value)


def last_part(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _is_relative_path(text: str) -> bool:
    if "/" not in text or "://" in text or text.startswith(("/", "~")) or re.search(r"[\s{}<>]", text):
        return False
    return text.startswith(".") or not is_hub_name(text)


def shareable_settings(values: dict[str, Any], secrets: list[str]) -> dict[str, Any]:
    """A recipe's keys without secrets and local paths."""
    kept = {key: value for key, value in values.items() if not _SECRET_KEY.search(key)}
    return _redact_all(without_local_paths(kept), secrets)


def _redact_all(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact_all(part, secrets) for key, part in value.items()}
    if isinstance(value, list):
        return [_redact_all(part, secrets) for part in value]
    return redact(value, secrets) if isinstance(value, str) else value
