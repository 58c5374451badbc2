"""Classes on top of a table model: the Bayes classifier of sequences with masks, and the posterior that it implies."""

import torch
from torch import Tensor

from tests.generation.table_model import JointModel


class BayesClassifier:
    """`p(y | x_t)` of an arbitrary `p(y | x)`, by summing over all clean rows that agree with what is visible.

    Attributes:
        posteriors: `(C, V ** L)` p(x | y) in the order of `model.rows`.
        labels: class of each row of the batch, by its index.
    """

    def __init__(self, model: JointModel, labels: Tensor, num_classes: int = 3, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(len(model.rows), num_classes, generator=generator, dtype=torch.float64)
        p_y_given_x = scores.softmax(-1)
        rows, states = torch.tensor(model.rows), torch.tensor(model.states)
        agrees = ((states[:, None] == rows) | (states[:, None] == model.mask_token_id)).all(-1).double()
        weights = agrees * model.joint
        self.p_y_given_state = (weights @ p_y_given_x) / weights.sum(1, keepdim=True)
        joint = model.joint[:, None] * p_y_given_x
        self.posteriors = (joint / joint.sum(0)).T
        self.labels, self.radix = labels, model.radix
        self.num_calls, self.num_sequences = 0, 0

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        self.num_calls, self.num_sequences = self.num_calls + 1, self.num_sequences + len(input_ids)
        return self.p_y_given_state[(input_ids * self.radix).sum(1), self.labels[rows]].log()
