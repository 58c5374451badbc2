"""Several GPUs in one process, as transformers uses them without a launcher."""

import torch
from torch import nn

from dlm_tune.models.mixin import MaskedTokenScores
from tests.trainers.test_diffusion_trainer import make_trainer


class TwoReplicas(nn.Module):
    """What torch's DataParallel does on two GPUs: halves of the batch, outputs gathered along dimension 0."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        halves = [{name: value.chunk(2)[half] for name, value in inputs.items()} for half in range(2)]
        first, second = (self.module(**half) for half in halves)
        return MaskedTokenScores(
            loss=torch.stack([first.loss, second.loss]),
            token_nll=torch.cat([first.token_nll, second.token_nll]),
            is_top1=torch.cat([first.is_top1, second.is_top1]),
        )


def test_the_sums_of_replicas_add_up(tmp_path):
    """The Trainer takes the mean of what `compute_loss` returns."""
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    trainer.corrupt_batches([batch], step=0, epoch=0)
    whole, replicated = (trainer.compute_loss(model, batch) for model in (trainer.model, TwoReplicas(trainer.model)))
    torch.testing.assert_close(replicated.mean(), whole)
