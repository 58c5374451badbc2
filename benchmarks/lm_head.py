"""Peak memory and time of LM head + cross-entropy, forward and backward: dense logits against scoring in chunks.

    python benchmarks/lm_head.py                                  # LLaDA's vocabulary, about two minutes on two cores
    python benchmarks/lm_head.py --tokens 256 --width 128 --vocab 8000

Each variant runs in its own process. On CPU the peak is the process's largest resident memory above what it held with
weights, hidden states and targets in place; on an accelerator it is the allocator's peak above the same. The exit
status is 1 if scoring with a frozen head (as under LoRA) takes more than a quarter of the dense memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from dlm_tune.models.lm_head import score_targets

MEBIBYTE = 2**20
MAX_FROZEN_RATIO = 0.25
IMPLEMENTATIONS = ("dense", "dlm_tune")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="scored positions N (default 2048)")
    parser.add_argument("--width", type=int, default=1024, help="hidden width D (default 1024)")
    parser.add_argument("--vocab", type=int, default=126464, help="vocabulary V (default 126464, LLaDA's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1, help="timed repetitions, the fastest counts (default 1)")
    parser.add_argument("--worker", nargs=2, metavar=("IMPLEMENTATION", "HEAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments, *arguments.worker)))
        return 0
    results = {
        (implementation, head): run_worker(implementation, head)
        for head in ("trainable", "frozen")
        for implementation in IMPLEMENTATIONS
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
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    head = torch.nn.Linear(arguments.width, arguments.vocab, bias=False, device=device, dtype=dtype)
    head.weight.requires_grad_(head_kind == "trainable")
    hidden = torch.randn(arguments.tokens, arguments.width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(arguments.vocab, (arguments.tokens,), device=device)

    def run() -> float:
        head.weight.grad = hidden.grad = None
        if implementation == "dense":
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        else:
            loss = score_targets(head, hidden, targets, arguments.vocab)[1].sum()
        loss.backward()
        return float(loss)

    base = peak_memory(device)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        loss = run()
        seconds.append(time.perf_counter() - start)
    gradient = float(hidden.grad.double().norm())
    return {"mebibytes": peak_memory(device) - base, "seconds": min(seconds), "loss": loss, "gradient": gradient}


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_ratio(results: dict[tuple[str, str], dict[str, float]], head: str) -> float:
    return results["dlm_tune", head]["mebibytes"] / results["dense", head]["mebibytes"]


def print_table(arguments: argparse.Namespace, results: dict[tuple[str, str], dict[str, float]]) -> None:
    print(
        f"N = {arguments.tokens}, D = {arguments.width}, V = {arguments.vocab}, {arguments.dtype} on "
        f"{arguments.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print("| head | implementation | peak MiB | memory / dense | seconds | time / dense | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|---|")
    for (implementation, head), row in results.items():
        dense = results["dense", head]
        print(
            f"| {head} | {implementation} | {row['mebibytes']:,.0f} | {row['mebibytes'] / dense['mebibytes']:.2f} "
            f"| {row['seconds']:.2f} | {row['seconds'] / dense['seconds']:.2f} "
            f"| {row['loss']:.2f} | {row['gradient']:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
