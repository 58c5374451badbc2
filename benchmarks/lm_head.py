"""Peak memory and time of LM head + cross-entropy, forward and backward: dense logits against scoring in chunks.

    python benchmarks/lm_head.py                                  # LLaDA's vocabulary, minutes on one core
    python benchmarks/lm_head.py --vocab 152064 --width 3584 --tokens 512      # Dream's head
    python benchmarks/lm_head.py --vocab 126464 --width 4096 --tokens 512      # LLaDA's head

Implementations:

- `dense`: all logits, float32 cross-entropy;
- `dlm_tune`: `score_targets` with weights, as in training; gradients are computed in the forward pass;
- `dlm_tune_nll`: `score_targets` without weights: each token's score is differentiable;
- `trl`: the function under TRL's `add_fused_lm_head`, its log-probabilities;
- `torch`: `torch.nn.functional.linear_cross_entropy` with its default chunking;
- `liger`: liger's fused linear cross-entropy, where liger is installed and there is a GPU.

Each variant runs in its own process. On CPU the peak is the process's largest resident memory above what it held with
weights, hidden states and targets in place, and seconds are CPU seconds; on an accelerator the peak is the allocator's
above the same, and seconds are of the clock. The exit status is 1 if scoring with a frozen head (as under LoRA) takes
more than a quarter of the dense memory.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_tune.models import lm_head

MEBIBYTE = 2**20
MAX_FROZEN_RATIO = 0.25
TRL_VOCAB_CHUNK = 32768  # what add_fused_lm_head passes
Results = dict[tuple[str, str], dict[str, float] | str]


def dense_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def dlm_tune_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    weights = torch.ones(len(targets), device=targets.device)
    loss = lm_head.score_targets(head, hidden, targets, len(head.weight), token_weights=weights)[0]
    assert loss is not None
    return loss


def dlm_tune_nll_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return lm_head.score_targets(head, hidden, targets, len(head.weight))[1].sum()


def trl_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    settings: tuple[Any, ...] = (1.0, TRL_VOCAB_CHUNK, None, 1.0, ("log_probs",))
    return -ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, targets, *settings)[0].sum()


def torch_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)


def liger_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden, targets)


IMPLEMENTATIONS: dict[str, Callable[[torch.nn.Linear, Tensor, Tensor], Tensor]] = {
    "dense": dense_loss,
    "dlm_tune": dlm_tune_loss,
    "dlm_tune_nll": dlm_tune_nll_loss,
    "trl": trl_loss,
    "torch": torch_loss,
    "liger": liger_loss,
}


def missing(implementation: str, device: str) -> str:
    """Why an implementation cannot run here; empty if it can."""
    if implementation == "torch" and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    if implementation == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "not installed"
        return "" if device == "cuda" else "needs a GPU"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="scored positions N (default 2048)")
    parser.add_argument("--width", type=int, default=1024, help="hidden width D (default 1024)")
    parser.add_argument("--vocab", type=int, default=126464, help="vocabulary V (default 126464, LLaDA's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1, help="timed repetitions, the fastest counts (default 1)")
    parser.add_argument("--max-chunk-logits", type=int, help="logits that exist at a time in dlm_tune (default 2**25)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--only", nargs="+", choices=list(IMPLEMENTATIONS), help="default: all; include dense, dlm_tune"
    )
    parser.add_argument("--worker", nargs=2, metavar=("IMPLEMENTATION", "HEAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments, *arguments.worker)))
        return 0
    results: Results = {
        (implementation, head): missing(implementation, arguments.device) or run_worker(implementation, head)
        for head in ("trainable", "frozen")
        for implementation in arguments.only or IMPLEMENTATIONS
    }
    print_table(arguments, results)
    ratio = memory_ratio(results, "frozen")
    if ratio > MAX_FROZEN_RATIO:
        print(f"FAILED: frozen head takes {ratio:.2f} of the dense memory, more than {MAX_FROZEN_RATIO}")
        return 1
    return 0


def run_worker(implementation: str, head: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", implementation, head]
    completed = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(completed.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, implementation: str, head_kind: str) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    if arguments.max_chunk_logits:
        lm_head.MAX_CHUNK_LOGITS = arguments.max_chunk_logits
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    head = torch.nn.Linear(arguments.width, arguments.vocab, bias=False, device=device, dtype=dtype)
    head.weight.requires_grad_(head_kind == "trainable")
    hidden = torch.randn(arguments.tokens, arguments.width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(arguments.vocab, (arguments.tokens,), device=device)

    def run() -> float:
        head.weight.grad = hidden.grad = None
        loss = IMPLEMENTATIONS[implementation](head, hidden, targets)
        loss.backward()
        return float(loss)

    tiny = torch.nn.Linear(arguments.width, 8, bias=False, device=device, dtype=dtype)
    IMPLEMENTATIONS[implementation](tiny, hidden[:2], targets[:2] % 8).backward()  # imports are not measured
    base = peak_memory(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(arguments.repeats):
        start = clock()
        loss = run()
        seconds.append(clock() - start)
    gradient = float(hidden.grad.double().norm())
    return {"mebibytes": peak_memory(device) - base, "seconds": min(seconds), "loss": loss, "gradient": gradient}


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_ratio(results: Results, head: str) -> float:
    ours, dense = results["dlm_tune", head], results["dense", head]
    assert isinstance(ours, dict)
    assert isinstance(dense, dict)
    return ours["mebibytes"] / dense["mebibytes"]


def print_table(arguments: argparse.Namespace, results: Results) -> None:
    print(
        f"N = {arguments.tokens}, D = {arguments.width}, V = {arguments.vocab}, {arguments.dtype} on "
        f"{arguments.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print("| head | implementation | peak MiB | memory / dense | seconds | time / dense | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|---|")
    for (implementation, head), row in results.items():
        dense = results["dense", head]
        if isinstance(row, str) or isinstance(dense, str):
            print(f"| {head} | {implementation} | {row} | | | | | |")
            continue
        print(
            f"| {head} | {implementation} | {row['mebibytes']:,.0f} | {row['mebibytes'] / dense['mebibytes']:.2f} "
            f"| {row['seconds']:.2f} | {row['seconds'] / dense['seconds']:.2f} "
            f"| {row['loss']:.2f} | {row['gradient']:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
