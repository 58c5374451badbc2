"""Rows and trained models for `gradient_variance.py`, and short training runs that compare its estimators.

    python benchmarks/gradient_variance_tasks.py --task windows     # held-out NELBO of short runs, minutes to an hour

Starts from `models/quickstart-base` and the data of `examples/quickstart/inflection_data.py --pretraining`:

- `lines`: the base as it is, on lines it was pretrained on, 48 targets (EOS filled);
- `windows`: the base trained on for some steps on lines run together, 96 targets and no filling;
- `inflection`: the base fine-tuned on "past of carry: " -> "carried" and EOS, 18 targets, nearly deterministic;
- `start`: a model with initial weights on the rows of `lines`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dlm_tune import load_model, load_tokenizer
from dlm_tune.diffusion import TIMESTEP_SAMPLERS, NoiseStream, NoisyBatch, corrupt, counter_uniform, noise_bank
from dlm_tune.diffusion.schedules import LINEAR, NoiseSchedule, polynomial

ROOT = Path(__file__).resolve().parents[1]
BASE, DATA = ROOT / "models" / "quickstart-base", ROOT / "data" / "quickstart"
TASKS = {"lines": 0, "windows": 800, "inflection": 800, "start": 0}  # training steps before the measurement
LEARNING_RATE = 1e-3
BATCH_SIZE = 16
WINDOW, CANVAS, LINE = 96, 18, 48
HELD_OUT = 192


class Rows(NamedTuple):
    """Rows padded on the right: ids, targets and attended tokens, each (R, L)."""

    input_ids: Tensor
    target_mask: Tensor
    attention_mask: Tensor

    def take(self, index: Any) -> "Rows":
        """Return the rows of `index`, a slice or a tensor."""
        return Rows(*(part[index] for part in self))


class Estimator(NamedTuple):
    """How masks are drawn: keys of a recipe."""

    masking: str
    timestep_sampling: str
    schedule: NoiseSchedule


LLADA = Estimator("bernoulli", "uniform", LINEAR)


def load_rows(task: str, num_rows: int, file: str = "train") -> Rows:
    """Return `num_rows` rows of a task, the same ones at every call; a longer call begins with a shorter one's."""
    tokenizer = load_tokenizer(str(BASE))
    eos = tokenizer.eos_token_id
    path = DATA / ("pretrain.jsonl" if task != "inflection" else f"{file}.jsonl")
    if not path.is_file():
        raise SystemExit(f"{path} is missing: python examples/quickstart/inflection_data.py --pretraining")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[list[int]] = []
    num_prompt: list[int] = []
    window: list[int] = []
    for index in order:
        if len(ids) == num_rows:
            break
        record = records[index]
        if task == "inflection":
            prompt, answer = (tokenizer(record[key])["input_ids"] for key in ("prompt", "completion"))
            ids.append(prompt + answer + [eos] * (CANVAS - len(answer)))
            num_prompt.append(len(prompt))
        elif task == "windows":
            window += [*tokenizer(record["text"])["input_ids"], eos]
            if len(window) >= WINDOW:
                ids.append(window[:WINDOW])
                window = window[WINDOW:]
                num_prompt.append(0)
        else:
            line = tokenizer(record["text"])["input_ids"]
            ids.append(line + [eos] * (LINE - len(line)))
            num_prompt.append(0)
    return pad_rows(ids, num_prompt)


def pad_rows(ids: list[list[int]], num_prompt: list[int]) -> Rows:
    shape = len(ids), max(map(len, ids))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(ids):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    target_mask = attention_mask.bool() & (torch.arange(shape[1]) >= torch.tensor(num_prompt)[:, None])
    return Rows(input_ids, target_mask, attention_mask)


def load_task_model(task: str, train_steps: int) -> Any:
    """Return the float32 model of a task, trained for `train_steps` with LLaDA's recipe, in eval mode."""
    model = load_model(str(BASE), dtype=torch.float32)
    if task == "start":
        torch.manual_seed(0)
        model = type(model)(model.config)
    if train_steps:
        train(model, load_rows(task, BATCH_SIZE * train_steps + HELD_OUT).take(slice(HELD_OUT, None)), LLADA)
    return model.eval()


def batch_loss(model: Any, rows: Rows, estimator: Estimator, seed: int, step: int) -> Tensor:
    """Return the loss of a batch in nats per target token, with the noise of (seed, step)."""
    slots = torch.arange(len(rows.input_ids))
    columns = torch.arange(rows.input_ids.shape[1])
    noisy = corrupt(
        rows.input_ids,
        rows.target_mask,
        TIMESTEP_SAMPLERS[estimator.timestep_sampling](seed, step, slots, len(slots)),
        counter_uniform(seed, NoiseStream.MASK, step, slots[:, None], columns),
        schedule=estimator.schedule,
        masking=estimator.masking,
        mask_token_id=model.config.mask_token_id,
    )
    weights = noisy.weights[noisy.masked_rows].float()
    return (masked_nll(model, rows, noisy) * weights).sum() / rows.target_mask.sum()


def masked_nll(model: Any, rows: Rows, noisy: NoisyBatch) -> Tensor:
    """Return the (N,) cross-entropy of the masked tokens of `rows` in nats."""
    return model(
        input_ids=noisy.noisy_input_ids,
        attention_mask=rows.attention_mask,
        target_ids=rows.input_ids,
        target_mask=noisy.masked,
    ).token_nll


def row_gradients(model: Any) -> Callable[[Rows, Tensor], tuple[Tensor, Tensor]]:
    """Return a function of (rows, masked) to (n, P) gradients of summed cross-entropy and (n, L) token scores."""
    model.set_attn_implementation("eager")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: Any, input_ids: Tensor, attended: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        length = len(input_ids)
        inputs = {
            "input_ids": input_ids.masked_fill(masked, model.config.mask_token_id)[None],
            "attention_mask": attended.bool().expand(1, 1, length, length),
            "position_ids": torch.arange(length)[None],
        }
        logits = functional_call(model, parameters, (), inputs).logits[0]
        nll = torch.nn.functional.cross_entropy(logits, input_ids, reduction="none") * masked
        return nll.sum(), nll

    per_row = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0, 0))

    def gradients(rows: Rows, masked: Tensor) -> tuple[Tensor, Tensor]:
        parts, nll = per_row(parameters, rows.input_ids, rows.attention_mask, masked)
        return torch.cat([part.flatten(1) for part in parts.values()], dim=1), nll.detach()

    return gradients


def train(model: Any, rows: Rows, estimator: Estimator, seed: int = 0) -> None:
    """One pass over `rows` in batches of `BATCH_SIZE`: AdamW, short warm-up, linear decay, norms clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = len(rows.input_ids) // BATCH_SIZE
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = rows.take(slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))
        optimizer.zero_grad()
        batch_loss(model, batch, estimator, seed, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def held_out_nelbo(model: Any, rows: Rows, num_samples: int = 16) -> float:
    """Return the NELBO of `rows` in nats per target token over a fixed bank of noise."""
    nats = 0.0
    for noisy in noise_bank(
        rows.input_ids,
        rows.target_mask,
        torch.arange(len(rows.input_ids)),
        seed=0,
        num_samples=num_samples,
        mask_token_id=model.config.mask_token_id,
    ):
        nats += float((masked_nll(model, rows, noisy) * noisy.weights[noisy.masked_rows]).sum())
    return nats / num_samples / float(rows.target_mask.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["windows", "inflection"], default="windows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--powers", type=float, nargs="*", default=[1.25], help="polynomial schedules to try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = load_rows(arguments.task, HELD_OUT + arguments.seeds * arguments.steps * BATCH_SIZE)
    held_out = rows.take(slice(HELD_OUT))
    if arguments.task == "inflection":
        held_out = load_rows(arguments.task, HELD_OUT, "development")
    estimators = {"exact count, stratified": Estimator("exact_count", "stratified", LINEAR)}
    for power in arguments.powers:
        estimators[f"exact count, stratified, power {power:g}"] = Estimator(
            "exact_count", "stratified", polynomial(power)
        )
    estimators["LLaDA's recipe"] = LLADA
    print(f"{arguments.task}: {arguments.steps} steps of {BATCH_SIZE} rows; held-out NELBO, nats per token")
    print("| estimator | mean | seeds |\n|---|---|---|")
    for name, estimator in estimators.items():
        results = []
        for seed in range(arguments.seeds):
            model = load_model(str(BASE), dtype=torch.float32)
            begin = HELD_OUT + seed * arguments.steps * BATCH_SIZE
            train(model, rows.take(slice(begin, begin + arguments.steps * BATCH_SIZE)), estimator, seed)
            results.append(held_out_nelbo(model, held_out))
        values = " ".join(f"{value:.4f}" for value in results)
        print(f"| {name} | {statistics.fmean(results):.4f} | {values} |", flush=True)


if __name__ == "__main__":
    main()
