"""Run by test_wrapped_heads.py under torchrun: gradients with unequal numbers of targets per rank.

Usage: score_in_two_processes.py WRAPPING ...; prints for each wrapping the largest difference of a gradient to one
process with dense logits, relative to the largest entry of that gradient.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dlm_tune.models import lm_head
from tests.tiny_models import tiny_llada

VOCAB = 128
TARGETS_OF_RANK = (slice(0, 9), slice(4, 5), slice(0, 0))  # rank 0 scores nine positions, rank 1 one, then none


def rows(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, 120, (1, 10), generator=generator), torch.rand(1, 10, generator=generator)


def target_mask(rank: int, step: int) -> Tensor:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[:, TARGETS_OF_RANK[rank + (step if rank else 0)]] = True
    return mask


def wrap(model: nn.Module, wrapping: str) -> nn.Module:
    if wrapping.startswith("ddp"):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    if wrapping.startswith("fsdp2_layers"):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
    if wrapping.startswith("fsdp2_head"):
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.lm_head.weight, DTensor)
    return model


def dense_gradients(frozen: bool) -> dict[str, Tensor]:
    """One process, dense logits, two accumulated microbatches; the mean over both ranks' losses."""
    model = tiny_llada().train()
    model.lm_head.requires_grad_(not frozen)
    for step in range(2):
        for rank in range(2):
            tokens, weights = rows(rank)
            mask = target_mask(rank, step)
            logits = model(input_ids=tokens).logits[mask]
            nll = F.cross_entropy(logits, tokens[mask], reduction="none")
            ((nll * weights[mask]).sum() / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(wrapping: str, rank: int) -> float:
    frozen, unweighted = "frozen" in wrapping, "unweighted" in wrapping
    model = tiny_llada().train()
    model.lm_head.requires_grad_(not frozen)
    wrapped = wrap(model, wrapping)
    tokens, weights = rows(rank)
    for step in range(2):
        mask = target_mask(rank, step)
        given = None if unweighted else weights
        scores = wrapped(input_ids=tokens, target_ids=tokens, target_mask=mask, target_weights=given)
        loss = scores.token_nll @ weights[mask] if unweighted else scores.loss
        loss.backward()
    assert (model.lm_head.weight.grad is None) == frozen
    differences = []
    for name, expected in dense_gradients(frozen).items():
        gradient = dict(model.named_parameters())[name].grad
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        differences.append(float((full - expected).abs().max() / expected.abs().max()))
    return max(differences)


def main() -> None:
    lm_head.MAX_CHUNK_LOGITS = 4 * VOCAB
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    differences = {wrapping: largest_difference(wrapping, rank) for wrapping in sys.argv[1:]}
    if rank == 0:
        print("DIFFERENCES", json.dumps(differences), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
