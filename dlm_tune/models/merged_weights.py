"""The weights of a base model with an adapter merged in, each made when it is asked for.

The model is laid out without memory for its weights, and PEFT puts the adapter on it as always. To merge a layer, its
weights are read from the files, PEFT's own `merge` adds the adapter's, and they are let go.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dlm_tune.models.adapters import put_adapters
from dlm_tune.models.families import FAMILIES
from dlm_tune.models.llada import to_native_name
from dlm_tune.models.loading import check_loading_report, load_model, model_class
from dlm_tune.models.tokenizer import embedding_rows
from dlm_tune.models.weight_files import WeightFiles, round_to_4bit

# Initialisations of LoRA that leave the base's weights alone; others (PiSSA, OLoRA, ...) train on changed ones.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# Settings of LoRA that reach beyond a layer
_WIDE_SETTINGS = ("layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config")
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def can_stream(peft_config: PeftConfig) -> bool:
    """Whether an adapter is LoRA, or one of its kin that change each layer by itself."""
    return (
        peft_config.peft_type == PeftType.LORA
        and getattr(peft_config, "init_lora_weights", True) in _PLAIN_INITIALISATIONS
        and not any(getattr(peft_config, name, None) for name in _WIDE_SETTINGS)
    )


class StreamedWeights:
    """Merged weights by name, in float32, with no more than one layer in memory beside the adapter.

    Args:
        base: name of the base, for messages.
        base_directory: its files.
        adapter_directory: the adapter's.
        config: of the base; the merged model's is `self.config`.
        base_quantization: "4bit" rounds the linear layers first.

    Attributes:
        shapes: name in memory -> shape, of all weights, tied ones once.
        config: of the merged model.

    Raises:
        ValueError: files and config of the base disagree, or the adapter is not one of this base.
    """

    def __init__(
        self,
        base: str,
        base_directory: Path,
        adapter_directory: Path,
        config: PreTrainedConfig,
        base_quantization: str | None,
    ) -> None:
        self._files = WeightFiles(base_directory, to_native_name if config.model_type == "llada" else str)
        stored = _stored_shapes(adapter_directory)
        model = _outline(_resized(config, stored))
        model.name_or_path = base
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        layers = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self._rounded = layers - {_HEAD} if base_quantization == "4bit" else set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in stored:  # PEFT loads it into the model itself
                parameter.data = torch.zeros(parameter.shape)
        self._model = put_adapters(model, adapter_directory).get_base_model()
        _let_go_of_unread(self._model, stored)
        self._owners = _adapted_modules(self._model)
        self._latest: dict[str, Tensor] = {}
        self.config = self._model.config
        self._source_of_head = _TABLE if self.config.tie_word_embeddings else _HEAD
        self._check_files(base_directory)
        if self.config.tie_word_embeddings and self._is_untied_by_the_adapter():
            self.config.tie_word_embeddings = False
            self.shapes[_HEAD] = self.shapes[_TABLE]

    @property
    def base_dtype(self) -> torch.dtype:
        """Floating-point type of the base's files."""
        return self._files.dtype()

    @property
    def num_merged(self) -> int:
        """How many weights the adapter holds or changes."""
        return sum(self._is_adapted(name) for name in self.shapes)

    def merged(self, name: str) -> Tensor:
        """One weight, merged."""
        owner = self._owner(name)
        if owner is None:
            own = self._own(name)
            return self._read(name) if own is None else own
        if name not in self._latest:
            self._latest = self._merge(owner)
        return self._latest.pop(name)

    def _merge(self, owner: str) -> dict[str, Tensor]:
        module = self._owners[owner]
        if isinstance(module, ModulesToSaveWrapper):
            [copied] = module.modules_to_save.values()
            return {f"{owner}.{name}": parameter.data for name, parameter in copied.named_parameters()}
        layer: Any = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        parameters = dict(layer.get_base_layer().named_parameters())
        outlines = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            if not _has_memory(parameter):
                parameter.data = self._read(f"{owner}.{name}")
        try:
            layer.merge(safe_merge=True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the adapter cannot be merged into {owner}: {error}") from error
        merged = {f"{owner}.{name}": parameter.data for name, parameter in parameters.items()}
        layer.merged_adapters.clear()
        for name, parameter in parameters.items():
            parameter.data = outlines[name]
        return merged

    def _read(self, name: str) -> Tensor:
        """The base's weight in float32; a tied head's is the table's."""
        weight = self._files.read(self._source_of_head if name == _HEAD else name)
        return (round_to_4bit(weight) if name in self._rounded else weight).float()

    def _owner(self, name: str) -> str | None:
        while name := name.rpartition(".")[0]:
            if name in self._owners:
                return name
        return None

    def _own(self, name: str) -> Tensor | None:
        """A weight outside adapted modules that came with the adapter."""
        parameter = self._model.get_parameter(name)
        return parameter.data if _has_memory(parameter) else None

    def _is_adapted(self, name: str) -> bool:
        return self._owner(name) is not None or self._own(name) is not None

    def _is_untied_by_the_adapter(self) -> bool:
        if not (self._is_adapted(_TABLE) or self._is_adapted(_HEAD)):
            return False
        table, head = self.merged(_TABLE), self.merged(_HEAD)
        if table.shape != head.shape:
            raise ValueError(
                f"the adapter brings an embedding table of {len(table)} rows, and the head, no longer tied to it, has "
                f"the base's {len(head)}; a larger vocabulary needs table and head in the adapter (modules_to_save)"
            )
        return not torch.equal(table, head)

    def _check_files(self, directory: Path) -> None:
        """Check that what is to be read from the base is there in the right shapes."""
        from_adapter = {
            name
            for name in self.shapes
            if ((owner := self._owner(name)) and isinstance(self._owners[owner], ModulesToSaveWrapper))
            or (owner is None and self._own(name) is not None)
        }
        needed, found = self.shapes.keys() - from_adapter, set(self._files.names)
        wrong = [name for name in needed & found if self._files.shape(name) != list(self.shapes[name])]
        unknown = {name for name in found - self.shapes.keys() if "rotary_emb" not in name} - {_HEAD}
        report = {
            "missing_keys": needed - found,
            "unexpected_keys": unknown,
            "mismatched_keys": [(name, self._files.shape(name), self.shapes[name]) for name in wrong],
        }
        check_loading_report(report, directory, FAMILIES[self.config.model_type])


class WholeModelWeights:
    """Merged weights of an adapter that cannot be merged layer by layer: the model is loaded whole, in float32.

    Raises:
        ValueError: the adapter's method has nothing to merge.
    """

    def __init__(self, base_directory: Path, adapter_directory: Path, base_quantization: str | None) -> None:
        model = load_model(base_directory, dtype=torch.float32, adapter=adapter_directory)
        method = model.peft_config["default"].peft_type.value
        is_quantised = getattr(model.config, "quantization_config", None) is not None
        if base_quantization is not None or is_quantised:
            raise ValueError(
                f"adapters of {method} are merged into weights of full precision only: leave base_quantization out "
                "and give the base that was quantised"
            )
        if not isinstance(model.base_model, BaseTuner):
            raise ValueError(f"an adapter of {method} adds inputs and no weights: there is nothing to merge")
        adapted = tuple(f"{name}." for name in _adapted_modules(model.get_base_model()))
        if model.config.tie_word_embeddings and any(name.startswith(adapted) for name in (_TABLE, _HEAD)):
            raise ValueError(
                f"an adapter of {method} on tied embeddings cannot be merged: head and table would differ"
            )
        names = [name for name, _ in model.get_base_model().named_parameters()]
        self.num_merged = sum(name.startswith(adapted) and "base_layer" in name for name in names)
        merged = model.merge_and_unload(safe_merge=True)
        self._parameters = dict(merged.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self.config = merged.config
        self.base_dtype = WeightFiles(base_directory, str).dtype()

    def merged(self, name: str) -> Tensor:
        """One weight, merged."""
        return self._parameters[name].data


def _adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost modules that PEFT put in the place of the model's own."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_inner:
            found[name] = module
    return found


def _stored_shapes(adapter_directory: Path) -> dict[str, list[int]]:
    """Shapes of the adapter's tensors under the names that the model's own weights have."""
    with safe_open(adapter_directory / "adapter_model.safetensors", framework="pt") as file:
        return {
            key.removeprefix("base_model.model.").replace(".base_layer.", "."): file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118
        }


def _resized(config: PreTrainedConfig, stored: dict[str, list[int]]) -> PreTrainedConfig:
    """The config with as many embedding rows as the adapter brings along."""
    brought = {name: stored[name][0] for name in (_TABLE, _HEAD) if name in stored}
    rows = embedding_rows(config)
    if set(brought.values()) <= {rows}:
        return config
    missing = {_TABLE, *(() if config.tie_word_embeddings else (_HEAD,))} - brought.keys()
    if missing or len(set(brought.values())) > 1 or min(brought.values()) < rows:
        found = ", ".join(f"{name} with {number}" for name, number in brought.items())
        raise ValueError(
            f"the adapter brings {found} rows and the base has {rows}: a larger vocabulary needs table and head of "
            "the same number of rows in the adapter (modules_to_save), and a smaller one is that of another base"
        )
    config = copy.deepcopy(config)
    config.vocab_size = max(brought.values())
    if getattr(config, "embedding_size", None):
        config.embedding_size = config.vocab_size
    return config


def _outline(config: PreTrainedConfig) -> Any:
    """A model on the CPU whose weights have shapes and take no memory: every one is a single zero, expanded."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = model_class(config)(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            outline = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, nn.Parameter(outline, requires_grad=False))
    model.tie_weights()
    return model.eval()


def _let_go_of_unread(model: nn.Module, stored: Collection[str]) -> None:
    """Take back the memory of what PEFT read into a copy that it trains whole, not into the model's own weight.

    A tied weight is the other module's too, whose values are the base's and not zeros.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    read = {id(parameter) for name, parameter in named if name.replace(".base_layer.", ".") in stored}
    for name, parameter in named:
        if ".original_module." in f".{name}" and id(parameter) not in read:
            parameter.data = torch.zeros(()).expand(parameter.shape)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
