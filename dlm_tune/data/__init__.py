"""From a recipe's data section to batches: loading, checking and collating rows.

The names are imported on first use: the command line reads `DatasetArguments` without paying for torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC_NAMES = {
    "DatasetArguments": "dlm_tune.data.arguments",
    "DatasetEntry": "dlm_tune.data.arguments",
    "DiffusionCollator": "dlm_tune.data.collator",
    "PackedRows": "dlm_tune.data.packing",
    "StreamSampler": "dlm_tune.data.unpaired",
    "UnpairedMixture": "dlm_tune.data.unpaired",
    "answers_without_prompts": "dlm_tune.data.unpaired",
    "check_raw_rows": "dlm_tune.data.formats",
    "check_rows": "dlm_tune.data.rows",
    "document_ids": "dlm_tune.data.packing",
    "find_format": "dlm_tune.data.formats",
    "load_datasets": "dlm_tune.data.loading",
    "load_unpaired": "dlm_tune.data.loading",
    "plan_packing": "dlm_tune.data.packing",
    "to_sequences": "dlm_tune.data.packing",
}

__all__ = list(_PUBLIC_NAMES)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(import_module(_PUBLIC_NAMES[name]), name)
    raise AttributeError(f"module 'dlm_tune.data' has no attribute '{name}'; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
