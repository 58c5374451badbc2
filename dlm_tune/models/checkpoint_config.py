"""Configs that are written back to config.json the way their authors wrote them."""

import copy
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class CheckpointConfigMixin:
    """Round trip of config.json: a key nobody changed since loading is written exactly as it was read.

    transformers normalises values on load (a null becomes a number, `rope_theta` moves into `rope_parameters`,
    generation settings are dropped), and the authors' own code reads the original keys only. So the dictionary that
    was read is kept, together with what an untouched config would write: keys that agree with the latter are written
    from the former, new keys appear only when they were set after loading, and `architectures` stays as published.
    """

    # The key under which the authors' files keep the weights' dtype, None where they keep none.
    dtype_key: ClassVar[str | None] = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from the content of a config.json, which is checked for missing structural keys first."""
        cls.check_source(config_dict)
        source = copy.deepcopy(config_dict)
        # Without kwargs: an override given to from_pretrained is a change and has to be written.
        untouched = super().from_dict(copy.deepcopy(source)).to_dict()  # type: ignore[misc]
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        config = result[0] if isinstance(result, tuple) else result
        config._source, config._untouched = source, untouched
        return result

    @classmethod
    def check_source(cls, config_dict: dict[str, Any]) -> None:
        """Raise ValueError when keys are missing whose defaults differ between the authors' code and ours."""

    @classmethod
    def default_logits_shift(cls, architectures: list[str] | None) -> bool:
        """Whether checkpoints of these architectures predict position i from the hidden state of position i - 1."""
        return False

    @property
    def logits_shift(self) -> bool:
        """True if position i is predicted by the hidden state of position i - 1; kept with the checkpoint."""
        return self._logits_shift

    @logits_shift.setter
    def logits_shift(self, value: bool) -> None:
        self._logits_shift = bool(value)

    @property
    def is_causal(self) -> bool:
        """Always False: attention is bidirectional."""
        return False

    @is_causal.setter
    def is_causal(self, value: bool) -> None:
        # transformers assigns and restores this around each forward; an instance attribute would reach config.json.
        pass

    def to_original_dict(self, native: dict[str, Any]) -> dict[str, Any]:
        """Translate the keys transformers writes to the ones the authors' code reads."""
        return native

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, in the original keys."""
        output = self.to_original_dict(super().to_dict())  # type: ignore[misc]
        for key in ("_source", "_untouched", "_logits_shift"):
            output.pop(key, None)
        source: dict[str, Any] = getattr(self, "_source", {})
        dtype = output.pop("dtype", None)
        dtype_key = next(
            (key for key in ("torch_dtype", "dtype") if key in source), None if source else self.dtype_key
        )
        if dtype_key is not None and dtype is not None:
            output[dtype_key] = dtype
        if source.get("architectures"):
            output["architectures"] = list(source["architectures"])
        if self.logits_shift != self.default_logits_shift(output.get("architectures")):
            output["logits_shift"] = self.logits_shift
        if source:
            self._restore_source(output, source)
        return output

    def _restore_source(self, output: dict[str, Any], source: dict[str, Any]) -> None:
        untouched: dict[str, Any] = getattr(self, "_untouched", {})
        for key in [*output]:
            added = key not in source and key not in ("transformers_version", "model_type", "logits_shift")
            if added and key in untouched and output[key] == untouched[key]:
                del output[key]
        for key, value in source.items():
            unchanged = output.get(key, value) == untouched.get(key, value)
            if key == "quantization_config" and key not in output:
                continue  # deleted when the weights were dequantised
            if key not in ("transformers_version", "logits_shift") and unchanged:
                output[key] = copy.deepcopy(value)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: all but transformers' own defaults, plus every key that was read."""
        defaults = PreTrainedConfig().to_dict()
        kept = {"transformers_version", *getattr(self, "_source", {})}
        return {
            key: value
            for key, value in self.to_dict().items()
            if key != "_name_or_path" and (key in kept or key not in defaults or value != defaults[key])
        }
