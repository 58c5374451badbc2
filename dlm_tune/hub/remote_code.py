"""Where the authors' modelling code lies, so that people without dlm_tune can load a fine-tuned checkpoint.

`auto_map` in config.json tells transformers which code to run. `FILE.CLASS` means a file beside the weights, which a
checkpoint written here does not have; `REPOSITORY--FILE.CLASS` means a file of another repository.
"""

from typing import Any

# Repositories with the code of an architecture: its class, and the `auto_map` of their config.json
_PUBLISHED = {
    "LLaDAModelLM": (
        "GSAI-ML/LLaDA-8B-Base",
        {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
    ),
    "DreamModel": (
        "Dream-org/Dream-v0-Base-7B",
        {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    ),
}


def remote_code_map(config: dict[str, Any], base_model: str | None) -> dict[str, str] | None:
    """The `auto_map` for a checkpoint that is pushed without code, None where no repository has its code.

    Args:
        config: content of config.json.
        base_model: Hub name of the base, whose repository holds the code that its `auto_map` names.
    """
    architecture = (config.get("architectures") or [""])[0]
    repository, published = _PUBLISHED.get(architecture, (None, {}))
    own: dict[str, str] = config.get("auto_map") or {}
    if own and base_model is not None:
        repository = base_model
    entries = own or published
    if not entries or (repository is None and not all("--" in entry for entry in entries.values())):
        return None
    return {name: entry if "--" in entry else f"{repository}--{entry}" for name, entry in entries.items()}
