"""The trainer of masked-diffusion language models: pretraining and prompt-preserving fine-tuning.

What is trained on is decided by the data: rows of plain text have every token as a target, prompt-completion rows and
conversations only their answers. Prompts are masked for the unconditional branch of guidance only.
"""

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from trl.data_utils import is_conversational

from dlm_tune.data import (
    DiffusionCollator,
    PackedRows,
    StreamSampler,
    UnpairedMixture,
    check_raw_rows,
    check_rows,
    to_sequences,
)
from dlm_tune.diffusion import noise_bank
from dlm_tune.models import (
    embedding_rows,
    end_of_turn_ids,
    guidance_keep_token_ids,
    load_tokenizer,
)
from dlm_tune.trainers.annealing import AnnealingWarning, annealing_figures
from dlm_tune.trainers.checks import check_arguments, check_row_index, is_prepared, read_first_row
from dlm_tune.trainers.diffusion_config import DiffusionConfig
from dlm_tune.trainers.distillation import make_teacher
from dlm_tune.trainers.model_inputs import is_unpaired, masked_token_inputs, prompt_mask
from dlm_tune.trainers.progress import DiffusionProgressCallback, StepTimer
from dlm_tune.trainers.sharing import SharingTrainer
from dlm_tune.trainers.statistics import NUM_COLUMNS, by_sequence, evaluation_metrics, row_statistics, summarise
from dlm_tune.trainers.step_noise import corrupt_step
from dlm_tune.trainers.trained_model import check_trainable, forget_evaluation, prepare_model
from dlm_tune.trainers.trl_limits import adapters_keep_their_type, adapters_on_the_head
from dlm_tune.trainers.unpaired import mix_unpaired, set_guidance_keep_tokens

logger = logging.getLogger(__name__)


class DiffusionTrainer(SharingTrainer):
    """Trains a masked-diffusion language model on text, prompt-completion rows or conversations.

    Data preparation, adapters, checkpoints and parallelism are those of `trl.SFTTrainer`. New here: the noise of an
    optimiser step is made where all its microbatches are visible, the denominator is counted over all processes, the
    LM head runs at masked positions only, and evaluation uses a fixed bank of noise.

    Args:
        model: a model of `load_model` (or one wrapped by peft), or a path or Hub name that is loaded with it.
        args: a `DiffusionConfig`.
        train_dataset: rows in one of TRL's formats.
        eval_dataset: rows in one of TRL's formats, or a dict of such data sets.
        processing_class: the tokenizer; by default the one beside the model.
        peft_config: trains a new adapter; where `target_modules` is None, on all linear layers but the LM head.
        unpaired_dataset: text without prompts, mixed with the training rows as `args.unpaired_fraction` says; it keeps
            the unconditional branch of guidance true.
        callbacks: additional callbacks.
        kwargs: further arguments of `SFTTrainer`.

    Raises:
        TypeError: the model is not one of `load_model`, or the data set is streamed.
        ValueError: rows or arguments that cannot be trained on; each message says what to change.
    """

    _tag_names = ["trl", "dlm-tune", "diffusion-language-model"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DiffusionConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        unpaired_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, train_dataset, eval_dataset, unpaired_dataset, kwargs)
        quantization = kwargs.pop("quantization_config", None)
        model, base_model, peft_config = prepare_model(model, args, peft_config, quantization)
        if processing_class is None:
            processing_class = load_tokenizer(base_model.config._name_or_path, model_config=base_model.config)
        train_dataset = self._check_raw(train_dataset, args, "train")
        eval_dataset = self._check_raw(eval_dataset, args, "eval")
        unpaired_dataset = self._check_raw(unpaired_dataset, args, "unpaired")
        first_row = next(iter(train_dataset))
        read_first_row(first_row, args, processing_class, has_unpaired=unpaired_dataset is not None)
        set_guidance_keep_tokens(base_model.config, args, processing_class)
        self.mask_token_id: int = base_model.config.mask_token_id
        self.logits_shift: bool = base_model.config.logits_shift
        self.vocab_size: int = embedding_rows(base_model.config)
        self.guidance_keep_token_ids: list[int] = guidance_keep_token_ids(base_model.config)
        data_collator = kwargs.pop("data_collator", None)
        with adapters_on_the_head(), adapters_keep_their_type(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=self._evaluation_metrics,
                peft_config=peft_config,
                callbacks=callbacks,
                **kwargs,
            )
        # TRL patches `forward` on the instance with its causal head; ours is the class's forward
        base_model.__dict__.pop("forward", None)
        # made here: TRL has given the tokenizer the `eos_token` and `pad_token` of the arguments by now
        self.data_collator = data_collator or self._make_collator(self.processing_class, args)
        if unpaired_dataset is not None:
            self.train_dataset = mix_unpaired(self, unpaired_dataset, is_conversational(first_row))
        self._teacher = make_teacher(self)
        self.loss_is_scaled_for_ga = True
        if self.pop_callback(ProgressCallback):
            self.add_callback(DiffusionProgressCallback)
        # of paired and of unpaired rows
        self._training_sums = torch.zeros(2, NUM_COLUMNS, dtype=torch.float64, device=args.device)
        self._num_tokens: Tensor | None = None
        self._timer = StepTimer()
        self.add_callback(self._timer)
        self.add_callback(AnnealingWarning)

    @staticmethod
    def _make_collator(tokenizer: PreTrainedTokenizerBase, args: DiffusionConfig) -> DiffusionCollator:
        return DiffusionCollator(
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            eos_policy=args.eos_policy,
            block_length=args.block_length,
            max_length=args.max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
            end_of_turn_ids=end_of_turn_ids(tokenizer),
        )

    # Data

    @classmethod
    def _check_raw(cls, dataset: Any, args: DiffusionConfig, name: str) -> Any:
        """`check_raw_rows` on a data set, or on each of a dict; what is prepared already, or None, stays as it is."""
        if isinstance(dataset, dict):
            return {part: cls._check_raw(rows, args, part) for part, rows in dataset.items()}
        if dataset is None or is_prepared(dataset):
            return dataset
        with args.main_process_first(desc=f"checking the {name} rows"):
            return check_raw_rows(dataset, args.invalid_rows, name, text_field=args.dataset_text_field)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | PackedRows:
        """TRL's tokenisation without its silent truncation, the checks of `check_rows`, and packing."""
        if is_prepared(dataset):
            check_row_index(dataset, dataset_name)
            return self._pack(dataset, processing_class, args) if packing else dataset
        dataset = self._tokenize(dataset, dataset_name, processing_class, args)
        with args.main_process_first(desc=f"checking the tokenised {dataset_name} rows"):
            dataset = check_rows(
                dataset,
                mask_token_id=self.mask_token_id,
                max_length=args.max_length,
                invalid_rows=args.invalid_rows,
                overlong_rows=args.overlong_rows,
                first_target_position=1 if self.logits_shift else 0,
                name=dataset_name,
                vocab_size=self.vocab_size,
            )
        return self._pack(dataset, processing_class, args) if packing else dataset

    def _tokenize(self, dataset: Dataset, name: str, processing_class: Any, args: Any) -> Dataset:
        """Rows `{input_ids, labels}` as TRL makes them, uncut."""
        uncut = copy.copy(args)
        uncut.max_length = None
        return super()._prepare_dataset(dataset, processing_class, uncut, False, None, name)

    def tokenize_answers(self, dataset: Dataset, name: str) -> Dataset:
        """Rows `{input_ids, labels}` of prompts and completions of which the completions alone are targets."""
        before = vars(self)["completion_only_loss"]
        self.completion_only_loss = True
        try:
            return self._tokenize(dataset, name, self.processing_class, self.args)
        finally:
            self.completion_only_loss = before

    @classmethod
    def _pack(cls, dataset: Any, processing_class: Any, args: DiffusionConfig) -> PackedRows:
        if isinstance(dataset, PackedRows):
            return dataset
        packed = PackedRows(dataset, cls._make_collator(processing_class, args).row_lengths(dataset), args.max_length)
        if len(packed) > 0.75 * len(dataset):
            logger.warning(
                "packing: %.2f rows a sequence saves little. Raise max_length=%d to several times the typical row.",
                len(dataset) / len(packed),
                args.max_length,
            )
        return packed

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "row_index", "is_unpaired", "rows"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(train_dataset, UnpairedMixture):
            return StreamSampler(train_dataset, epoch=lambda: int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, *arguments: Any, is_training: bool = False, **options: Any) -> Any:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # an evaluation takes every row
        try:
            loader = super()._get_dataloader(*arguments, is_training=is_training, **options)
        finally:
            self.args.dataloader_drop_last = drop_last
        if is_training and drop_last and not len(loader):
            raise ValueError("dataloader_drop_last=True leaves no batch: the data set holds less than one. Remove it.")
        return loader

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; evaluations may have come before."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the optimiser, of which a frozen model has no need."""
        check_trainable(self.model)
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Collects the microbatches of one optimiser step and corrupts them."""
        self._timer.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.corrupt_batches(batches, step=self.state.global_step, epoch=int(self.state.epoch or 0))
        return batches, None

    def corrupt_batches(self, batches: list[dict[str, Any]], step: int, epoch: int) -> None:
        """Adds `noisy` (a `NoisyBatch`), `loss_weights` (R, L) and `prompt_hidden` (R,) to a step's microbatches.

        See `step_noise.corrupt_step`; counting over the processes takes one collective.

        Args:
            batches: this process's microbatches as collated, on the device.
            step: optimiser step.
            epoch: number of the pass over the data; gives fresh masks in every epoch.
        """
        accelerator = self.accelerator
        num_tokens = corrupt_step(
            batches,
            self.args,
            step=step,
            epoch=epoch,
            mask_token_id=self.mask_token_id,
            first_target_position=1 if self.logits_shift else 0,
            keep_token_ids=self.guidance_keep_token_ids,
            rank=accelerator.process_index,
            gather=accelerator.gather if accelerator.num_processes > 1 else None,
        )
        if self._num_tokens is None:
            self._num_tokens = num_tokens.new_tensor(float(self.state.num_input_tokens_seen))
            self._timer.rate(self._num_tokens.item())
        self._num_tokens = self._num_tokens + num_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This microbatch's share of the step's loss, in nats per token, times the number of processes.

        The factor undoes the average that data parallelism takes over the gradients of the processes.
        """
        noisy, pad_token_id = inputs["noisy"], self.processing_class.pad_token_id
        arguments = masked_token_inputs(inputs, noisy, pad_token_id, inputs["loss_weights"])
        if self._teacher is not None:
            targets = self._teacher.guided_targets(model, arguments, to_sequences(prompt_mask(inputs), inputs, False))
            outputs = model(guided_targets=targets, **arguments)
        else:
            outputs = model(**arguments)
        statistics = row_statistics(outputs.token_nll, outputs.is_top1, noisy, inputs["target_mask"])
        self._training_sums = self._training_sums.index_add(0, is_unpaired(inputs).long(), statistics)
        # torch's DataParallel (several GPUs in one process) gives one sum a GPU, of which the Trainer takes the mean
        return outputs.loss.sum() * self.accelerator.num_processes

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one microbatch; a loss that is not finite stops the run before the optimiser."""
        row_index = inputs["row_index"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self._stop("loss", loss.item(), f"The rows of the batch have row_index {row_index.tolist()}.")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and not self.args.fp16 and not math.isfinite(float(grad_norm)):
            self._stop("gradient norm", float(grad_norm), "The loss itself is finite.")
        return grad_norm

    def _stop(self, name: str, value: float, detail: str) -> None:
        checkpoint = self.state.best_model_checkpoint or self.args.output_dir
        raise FloatingPointError(
            f"{name} is {value} at step {self.state.global_step + 1} "
            f"(learning_rate={self._get_learning_rate():.3g}, max_grad_norm={self.args.max_grad_norm}). {detail} "
            f"The optimiser has not taken this step and nothing was written; checkpoints in {checkpoint} are intact. "
            "Lower learning_rate, lengthen warmup_steps, use bf16 instead of fp16, or look at these rows with "
            "`dlm-tune inspect`; then continue with resume_from_checkpoint."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training metrics since the last log; see `statistics.summarise`."""
        if "loss" in logs and self.model.training:
            sums = self.accelerator.reduce(self._training_sums, reduction="sum")
            self._training_sums = torch.zeros_like(self._training_sums)
            logs |= summarise(sums.sum(dim=0)) | annealing_figures(self.args, self.state.global_step)
            if isinstance(self.train_dataset, UnpairedMixture):
                for name, part in zip(("paired", "unpaired"), sums, strict=True):
                    metrics = summarise(part)
                    logs.update({f"{metric}_{name}": metrics[metric] for metric in ("nelbo", "masked_accuracy")})
            if self._num_tokens is not None:
                logs["num_tokens"] = self._num_tokens.item()
                logs["tokens_per_second"] = self._timer.rate(logs["num_tokens"])
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._num_tokens is not None:
            self.state.num_input_tokens_seen = int(self._num_tokens.item())
        super()._save_checkpoint(model, trial)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out likelihood bound of a data set, raw or prepared, by default the one given at construction."""
        if isinstance(eval_dataset, Dataset | dict):
            eval_dataset = self._check_raw(eval_dataset, self.args, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Statistics of the rows over their fixed bank of noise, and their indices."""
        inputs = self._prepare_inputs(inputs)
        statistics = inputs["input_ids"].new_zeros(len(inputs["input_ids"]), NUM_COLUMNS, dtype=torch.float64)
        bank = noise_bank(
            inputs["input_ids"],
            inputs["target_mask"],
            inputs["row_index"],
            seed=self.args.noise_seed,
            num_samples=self.args.eval_noise_samples,
            mask_token_id=self.mask_token_id,
            positions=inputs["attention_mask"].cumsum(dim=1) - 1,
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            for noisy in bank:
                outputs = model(**masked_token_inputs(inputs, noisy, self.processing_class.pad_token_id))
                statistics += row_statistics(outputs.token_nll, outputs.is_top1, noisy, inputs["target_mask"])
        return None, *by_sequence(statistics, inputs)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of an evaluation; see `statistics.evaluation_metrics`."""
        statistics = torch.as_tensor(prediction.predictions).flatten(0, -2)
        return evaluation_metrics(statistics, torch.as_tensor(prediction.label_ids).flatten())
