"""Useful tokens per second of packed training against padded training, on the same rows, with DiffusionTrainer.

    OMP_NUM_THREADS=1 python benchmarks/packing.py                       # under two minutes on one core
    python benchmarks/packing.py --device cuda --rows 20000 --width 2048 --layers 8

Useful tokens are those of the rows with their EOS; padding is not. The lengths are log-normal, as those of instruction
data are roughly, and cut at `--max-length`. Every variant sees each row once:

- `padded`: batches of rows in random order, as many rows as a packed batch holds on average;
- `grouped`: the same number of rows of like length (`train_sampling_strategy: group_by_length`);
- `packed`: `packing: true`.

The ideal ratio is what packing would give if a step took time in proportion to the positions that the model
processes, and nothing else: positions of `padded` over positions of `packed`, counted in the model's embedding. The
exit status is 1 if packed over padded, in useful tokens per second, is below 0.9 of it.

The model is small. Its head has about the share in the work that it has in an 8B model (8 % of the layers' where every
token is masked; LLaDA-8B: 7 %), attention twice the share that it has there at 4,096 tokens (31 % against 15 %). Times
are of the process on CPU, so that other processes matter little, and of the clock on an accelerator.

`group_by_length` sorts within 50 batches at most and within a quarter of the data, so on few rows it does less than on
many. The second table counts positions on 100,000 rows, without a model.
"""

import argparse
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

from dlm_tune import DiffusionConfig, DiffusionTrainer
from dlm_tune.data import PackedRows, plan_packing
from dlm_tune.models import LLaDAConfig, LLaDAModelLM

MIN_SHARE_OF_IDEAL = 0.9
VOCAB_SIZE, EOS_ID, MASK_ID = 512, 0, 1
VARIANTS = {"padded": {}, "grouped": {"train_sampling_strategy": "group_by_length"}, "packed": {"packing": True}}


class Meter(TrainerCallback):
    """Time from the first step to the last, data loading included, and positions that went through the model."""

    def __init__(self, model: Any, device: str) -> None:
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.positions = 0
        self.steps = 0
        self.seconds = 0.0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.positions += output.shape[0] * output.shape[1]

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:  # noqa: D102
        self.start = self.clock()

    def on_train_end(self, args: Any, state: Any, *arguments: Any, **kwargs: Any) -> None:  # noqa: D102
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds, self.steps = self.clock() - self.start, state.global_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rows of the data set (default 400)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--median", type=float, default=110, help="median length of the rows (default 110 tokens)")
    parser.add_argument("--spread", type=float, default=0.9, help="deviation of the log-length (default 0.9)")
    parser.add_argument("--sequences", type=int, default=4, help="packed sequences a step (default 4)")
    parser.add_argument("--width", type=int, default=256, help="hidden width (default 256)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default 2)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each variant, the fastest counts (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()

    print_planning(arguments)
    print_positions(arguments)
    rows, lengths = make_rows(arguments)
    num_sequences = len(plan_packing(lengths, arguments.max_length))
    rows_per_step = round(arguments.sequences * arguments.rows / num_sequences)
    useful = int(lengths.sum())
    print(
        f"\n{arguments.rows} rows, {useful:,} useful tokens with EOS; lengths: median {np.median(lengths):.0f}, mean "
        f"{lengths.mean():.0f}, longest {lengths.max()}; {num_sequences} sequences of {arguments.max_length}; torch "
        f"{torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads"
    )
    meters: dict[str, Meter] = {}
    for _ in range(arguments.repeats):
        for variant in VARIANTS:
            meter = train(arguments, variant, rows, arguments.sequences if variant == "packed" else rows_per_step)
            if variant not in meters or meter.seconds < meters[variant].seconds:
                meters[variant] = meter
    return report(meters, useful)


def make_rows(arguments: argparse.Namespace) -> tuple[Dataset, np.ndarray]:
    """Tokenised rows with every token a target, and their lengths once EOS is added."""
    generator = np.random.default_rng(0)
    lengths = draw_lengths(generator, arguments, arguments.rows)
    tokens = [generator.integers(MASK_ID + 1, VOCAB_SIZE, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens}), np.minimum(lengths + 1, arguments.max_length)


def draw_lengths(generator: np.random.Generator, arguments: argparse.Namespace, size: int) -> np.ndarray:
    lengths = generator.lognormal(np.log(arguments.median), arguments.spread, size)
    return np.clip(lengths, 4, arguments.max_length).astype(np.int64)


def print_planning(arguments: argparse.Namespace) -> None:
    print("| 1,000,000 rows cut at | planning, CPU seconds | sequences | tokens / room |\n|---|---|---|---|")
    for max_length in sorted({arguments.max_length, 4096}):
        scaled = argparse.Namespace(**vars(arguments) | {"max_length": max_length})
        lengths = draw_lengths(np.random.default_rng(0), scaled, 1_000_000)
        start = time.process_time()
        num_sequences = len(plan_packing(lengths, max_length))
        seconds = time.process_time() - start
        efficiency = lengths.sum() / (num_sequences * max_length)
        print(f"| {max_length} | {seconds:.2f} | {num_sequences:,} | {efficiency:.4f} |")


def print_positions(arguments: argparse.Namespace, num_rows: int = 100_000) -> None:
    lengths = draw_lengths(np.random.default_rng(0), arguments, num_rows)
    num_sequences = len(plan_packing(lengths, arguments.max_length))
    batch_size = round(arguments.sequences * num_rows / num_sequences)
    torch.manual_seed(0)
    orders = {
        "padded": torch.randperm(num_rows).numpy(),
        "grouped": np.array(get_length_grouped_indices(lengths.tolist(), batch_size)),
    }
    positions = {"packed": num_sequences * arguments.max_length}
    for variant, order in orders.items():
        batches = [lengths[order[start : start + batch_size]] for start in range(0, num_rows, batch_size)]
        positions[variant] = sum(len(batch) * int(batch.max()) for batch in batches)
    print(f"\n| {num_rows:,} rows, {batch_size} a step | positions | useful share |\n|---|---|---|")
    for variant in VARIANTS:
        print(f"| {variant} | {positions[variant]:,} | {lengths.sum() / positions[variant]:.3f} |")


def train(arguments: argparse.Namespace, variant: str, rows: Dataset, batch_size: int) -> Meter:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=arguments.width,
        n_layers=arguments.layers,
        n_heads=arguments.width // 64,
        mlp_hidden_size=3 * arguments.width,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=arguments.max_length,
        mask_token_id=MASK_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = LLaDAModelLM(config)
    vocabulary = {f"t{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t2")), eos_token="t0", pad_token="t0"
    )
    meter = Meter(model, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            max_length=arguments.max_length,
            gradient_checkpointing=False,
            bf16=arguments.device == "cuda",
            use_cpu=arguments.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **VARIANTS[variant],
        )
        trainer = DiffusionTrainer(model, settings, rows, processing_class=tokenizer, callbacks=[meter])
        trainer.remove_callback(PrinterCallback)
        assert isinstance(trainer.train_dataset, PackedRows) == (variant == "packed")
        trainer.train()
    return meter


def report(meters: dict[str, Meter], useful: int) -> int:
    print(
        "\n| batches | steps | positions | useful share | seconds | useful tokens / s | ratio | ratio of positions |"
    )
    print("|---|---|---|---|---|---|---|---|")
    padded = meters["padded"]
    for variant, meter in meters.items():
        share, speed = useful / meter.positions, useful / meter.seconds
        ratios = f"{padded.seconds / meter.seconds:.2f} | {padded.positions / meter.positions:.2f}"
        print(f"| {variant} | {meter.steps} | {meter.positions:,} | {share:.3f} | {meter.seconds:.1f} ", end="")
        print(f"| {speed:,.0f} | {ratios} |")
    packed = meters["packed"]
    achieved, ideal = padded.seconds / packed.seconds, padded.positions / packed.positions
    print(f"\npacked against padded: {achieved:.2f} achieved, {ideal:.2f} ideal, {achieved / ideal:.2f} of the ideal")
    if achieved / ideal < MIN_SHARE_OF_IDEAL:
        print(f"FAILED: less than {MIN_SHARE_OF_IDEAL} of the ideal ratio")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
