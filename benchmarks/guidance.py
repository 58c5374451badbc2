"""Cost of guided sampling: time per token and passes against no guidance, both branches batched or in two passes.

    OMP_NUM_THREADS=1 python benchmarks/guidance.py                       # about a minute on one core
    python benchmarks/guidance.py --device cuda --width 4096 --layers 32 --vocabulary 126464 --rows 8

A random model in LLaDA's layout fills the same canvases from the same prompts, once unguided, once with both branches
of guidance as rows of one forward pass, once in two passes. The variants run `--repeats` times in turn, and of each
the fastest run counts. Every step computes every row (no early stop). Times are of the process on CPU, so that other
processes matter little, and of the clock on an accelerator.

The exit status is 1 if the batched branches take more than 1.15 times the two passes, or guidance more than 2.1 times
no guidance.

The second table changes the schedule: steps outside the interval have no second branch and so cost what they cost
without guidance.
"""

import argparse
import sys
import time
from typing import Any

import torch

from dlm_tune.generation import DiffusionGenerationConfig, DiffusionGenerationOutput, generate
from dlm_tune.models import LLaDAConfig, LLaDAModelLM

MAX_BATCHED_TO_TWO_PASSES, MAX_GUIDED_TO_UNGUIDED = 1.15, 2.1
MASK_ID = 1
VARIANTS: dict[str, dict[str, Any]] = {
    "unguided": {},
    "guided, batched": {"guidance_scale": 1.0},
    "guided, two passes": {"guidance_scale": 1.0, "guidance_batching": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"guidance_scale": 1.0, "guidance_schedule": "linear"},
    "interval [0.25, 0.75)": {
        "guidance_scale": 1.0,
        "guidance_schedule": "interval",
        "guidance_interval": [0.25, 0.75],
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="prompts in a batch (default 8)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default 32)")
    parser.add_argument("--canvas", type=int, default=32, help="new tokens (default 32)")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block (default 16)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (default 8)")
    parser.add_argument("--width", type=int, default=512, help="hidden width (default 512)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default 4)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the vocabulary (default 8192)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant, the fastest counts (default 3)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()

    model = make_model(arguments)
    prompts = torch.randint(MASK_ID + 1, arguments.vocabulary, (arguments.rows, arguments.prompt))
    prompts = prompts.to(arguments.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{num_parameters / 1e6:.0f}M parameters, {arguments.rows} rows, {arguments.prompt} tokens of prompt, "
        f"{arguments.canvas} new tokens in {arguments.steps} steps; torch {torch.__version__}, "
        f"{device_name(arguments.device)}, {torch.get_num_threads()} threads\n"
    )
    measured = {name: Measurement(arguments) for name in [*VARIANTS, *SCHEDULES]}
    sample(model, prompts, arguments, VARIANTS["unguided"])  # warm up
    for _ in range(arguments.repeats):
        for name, options in [*VARIANTS.items(), *SCHEDULES.items()]:
            measured[name].run(model, prompts, options)
    return report(measured)


class Measurement:
    """The fastest run of a variant: seconds, passes, and peak memory beyond the model where it can be told."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.seconds, self.mebibytes = float("inf"), float("nan")
        self.output: DiffusionGenerationOutput | None = None

    def run(self, model: Any, prompts: torch.Tensor, options: dict[str, Any]) -> None:
        """Generate once more."""
        on_cuda = self.arguments.device == "cuda"
        clock = time.perf_counter if on_cuda else time.process_time
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = clock()
        self.output = sample(model, prompts, self.arguments, options)
        if on_cuda:
            torch.cuda.synchronize()
            self.mebibytes = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.seconds = min(self.seconds, clock() - start)


def make_model(arguments: argparse.Namespace) -> LLaDAModelLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=arguments.width,
        n_layers=arguments.layers,
        n_heads=max(1, arguments.width // 128),
        n_kv_heads=max(1, arguments.width // 128),
        mlp_hidden_size=3 * arguments.width,
        vocab_size=arguments.vocabulary,
        embedding_size=arguments.vocabulary,
        max_sequence_length=arguments.prompt + arguments.canvas,
        mask_token_id=MASK_ID,
        eos_token_id=0,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with torch.device(arguments.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = LLaDAModelLM(config).eval()
        torch.set_default_dtype(default)
    return model


def sample(
    model: Any, prompts: torch.Tensor, arguments: argparse.Namespace, options: dict[str, Any]
) -> DiffusionGenerationOutput:
    config = DiffusionGenerationConfig(
        max_new_tokens=arguments.canvas,
        block_length=arguments.block,
        steps=arguments.steps,
        stop_at_eos=False,
        **options,
    )
    return generate(model, prompts, None, config)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def report(measured: dict[str, Measurement]) -> int:
    on_cuda = measured["unguided"].arguments.device == "cuda"
    memory = "peak MiB | " if on_cuda else ""
    print(f"| variant | calls | rows in them | ms per new token | {memory}time / unguided |")
    print("|---|---|---|---|---|" + ("---|" if on_cuda else ""))
    unguided = measured["unguided"].seconds
    for name, measurement in measured.items():
        output, arguments = measurement.output, measurement.arguments
        assert output is not None
        milliseconds = 1e3 * measurement.seconds / (arguments.rows * arguments.canvas)
        memory = f"{measurement.mebibytes:,.0f} | " if on_cuda else ""
        print(
            f"| {name} | {output.num_forward_passes} | {output.num_row_passes} | {milliseconds:.2f} | {memory}"
            f"{measurement.seconds / unguided:.2f} |"
        )
    batched, two_passes = (measured[name].seconds for name in ("guided, batched", "guided, two passes"))
    print(f"\nbatched / two passes: {batched / two_passes:.3f} (at most {MAX_BATCHED_TO_TWO_PASSES})")
    print(f"guided / unguided: {batched / unguided:.3f} (at most {MAX_GUIDED_TO_UNGUIDED})")
    if batched > MAX_BATCHED_TO_TWO_PASSES * two_passes or batched > MAX_GUIDED_TO_UNGUIDED * unguided:
        print("FAILED")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
