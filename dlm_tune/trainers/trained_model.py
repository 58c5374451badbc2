"""The model that a trainer is given: loaded, checked, and with the layers of its new adapter named."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel
from torch import nn

from dlm_tune.models import load_model
from dlm_tune.models.adapters import complete_peft_config
from dlm_tune.models.quantization import is_quantized, steady_quantized_layers
from dlm_tune.trainers.checks import check_model
from dlm_tune.trainers.diffusion_config import DiffusionConfig


def prepare_model(
    model: Any, args: DiffusionConfig, peft_config: PeftConfig | None, quantization: Any = None
) -> tuple[Any, Any, PeftConfig | None]:
    """Return the model to train, the model below its adapter, and the complete configuration of a new adapter.

    Args:
        model: a model of `load_model`, possibly with an adapter, or a path or Hub name.
        args: the trainer's; of a path, `model_init_kwargs` are the arguments of `load_model`.
        peft_config: of a new adapter.
        quantization: of a path; see `load_model`.

    Raises:
        TypeError: the model is not one of `load_model`.
        ValueError: names of layers that do not exist, or quantised weights that would be trained themselves.
    """
    if isinstance(model, str):
        model = load_model(model, quantization=quantization, **(args.model_init_kwargs or {}))
        args.model_init_kwargs = None
    elif quantization is not None:
        raise ValueError("quantization_config has no effect on a model that is loaded: give it to load_model")
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_model(base_model, args)
    steady_quantized_layers(base_model)
    if peft_config is not None:
        if model is not base_model:
            raise ValueError(
                "the model has an adapter already, and peft_config asks for a new one. Go on with the one it has "
                "(load_model(BASE, adapter=..., is_trainable=True) and no peft_config), or merge it first."
            )
        _check_dora(peft_config, base_model)
        peft_config = complete_peft_config(peft_config, base_model)
    elif model is base_model and is_quantized(model):
        raise ValueError(
            "the model is quantised and has no adapter: weights in 4 or 8 bits cannot be trained. Give peft_config "
            "(LoraConfig(); in a recipe use_peft: true), or load the model without quantisation."
        )
    return model, base_model, peft_config


def _check_dora(peft_config: PeftConfig, model: Any) -> None:
    """Refuse DoRA on 8-bit weights on a CPU: where PEFT reads them there, it loses their scales."""
    is_8bit = getattr(model, "is_loaded_in_8bit", False)
    if getattr(peft_config, "use_dora", False) and is_8bit and model.device.type == "cpu":
        raise ValueError(
            "use_dora=True does not work on 8-bit weights on the CPU (PEFT loses their scales). Use 4 bits, plain "
            "LoRA, or a GPU."
        )


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where no weight of a model is trained, as in an adapter that was loaded for inference."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no weight of the model is trained: its adapter was loaded for inference. To train on from it, load it "
            "with load_model(BASE, adapter=..., is_trainable=True)."
        )


def forget_evaluation(trainer: Any) -> None:
    """Let `train` prepare a model that an evaluation has prepared before it.

    accelerate marks what it has prepared, for evaluation too, and hands it back as it is when training asks: without
    DistributedDataParallel around it, so that every process would train on its own rows alone, unnoticed.
    """
    accelerator, model = trainer.accelerator, trainer.model
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # prepared alike for both
    if is_sharded or trainer.model_wrapped is not model or not getattr(model, "_is_accelerate_prepared", False):
        return
    extract_model_from_parallel(model, keep_fp32_wrapper=False)  # takes autocast off `forward`, which comes again
    model._is_accelerate_prepared = False
    accelerator._models[:] = [known for known in accelerator._models if known is not model]
