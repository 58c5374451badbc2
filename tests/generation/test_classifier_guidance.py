"""A classifier in the sampler: against enumeration, beside guidance, in padded batches, and from transformers."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import dlm_tune
from dlm_tune.diffusion import ClassifierGuidance
from dlm_tune.generation import generate, pad_prompts
from tests.generation.bayes_classifier import BayesClassifier
from tests.generation.table_model import GuidedTable, JointModel, chi_square, exact_law
from tests.generation.test_sampler import CRITICAL, UNBIASED, eos_model
from tests.tiny_models import EOS_ID, tiny_dream, tiny_llada

PROMPTS = [[9, 20, 33, 41, 50], [12, 13], [77, 60, 61, 62, 63, 64, 65], [101]]
OPTIONS = {"max_new_tokens": 12, "block_length": 6, "steps": 8, "stop_at_eos": False}
NUM_SAMPLES = 6_000


@pytest.fixture(scope="module")
def joint_model():
    return JointModel()


def sample(model, prompts, **options):
    options = {"temperature": 1.0, "block_length": None, "stop_at_eos": False} | options
    return generate(model, prompts, **options).sequences


@pytest.mark.parametrize(("remasking", "confidence_from"), UNBIASED)
def test_one_token_a_step_samples_the_posterior_of_each_rows_class(joint_model, remasking, confidence_from):
    """p(x | y) by Bayes' rule on whole rows; the classes of a batch differ by row."""
    labels = torch.arange(3 * NUM_SAMPLES) % 3
    classifier = BayesClassifier(joint_model, labels)
    samples = sample(
        joint_model,
        torch.zeros(len(labels), 0, dtype=torch.long),
        max_new_tokens=3,
        steps=3,
        remasking=remasking,
        confidence_from=confidence_from,
        classifier=ClassifierGuidance(classifier, batch_size=2**16),
    )
    for label, other in ((0, 1), (1, 2), (2, 0)):
        laws = [dict(zip(joint_model.rows, classifier.posteriors[y].tolist(), strict=True)) for y in (label, other)]
        assert chi_square(joint_model, samples[labels == label], laws[0]) < CRITICAL[26]
        assert chi_square(joint_model, samples[labels == label], laws[1]) > 10 * CRITICAL[26]


class SteeredTable(GuidedTable):
    """Guidance and a classifier, by the formulas in probabilities; the classifier sees the prompt."""

    def __init__(self, model, prompt, guidance_scale, classifier, label, scale):
        super().__init__(model, prompt, guidance_scale)
        self.classifier, self.label, self.scale = classifier, label, scale

    def probabilities(self, state):
        steered = super().probabilities(state)
        for column, seen in enumerate(state):
            if seen == self.mask_token_id:
                steered[column] = self._steered(state, column, steered[column])
        return steered

    def _steered(self, state, column, guided):
        following = [(self.prompt, *state[:column], v, *state[column + 1 :]) for v in range(self.mask_token_id)]
        places = [self.model.states.index(row) for row in following]
        p_y = self.classifier.p_y_given_state[places, self.label].tolist()
        weights = [p * q**self.scale for p, q in zip(guided, p_y, strict=True)]
        return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("counts", [[1, 1], [2]])
@pytest.mark.parametrize("remasking", ["random", "margin"])
def test_guidance_and_classifier_follow_the_enumerated_law(joint_model, remasking, counts):
    labels = torch.full((NUM_SAMPLES,), 2)
    classifier = BayesClassifier(joint_model, labels)
    table = SteeredTable(joint_model, 1, 0.8, classifier, 2, 1.5)
    law = exact_law(table, remasking, "predictive", counts)
    options = {"max_new_tokens": 2, "steps": len(counts), "remasking": remasking, "confidence_from": "predictive"}
    prompts = torch.ones(NUM_SAMPLES, 1, dtype=torch.long)
    steering = ClassifierGuidance(classifier, scale=1.5, batch_size=2**16)
    both = sample(joint_model, prompts, **options, guidance_scale=0.8, classifier=steering)
    # 99.9 % point of chi-square with 8 degrees of freedom
    assert chi_square(joint_model, both[:, 1:], law) < 26.12
    for part in ({"guidance_scale": 0.8}, {"classifier": steering}):
        assert chi_square(joint_model, sample(joint_model, prompts, **options, **part)[:, 1:], law) > 26.12


# Real models


def token_scores(seed=0, classes=4, vocab=128):
    return torch.randn(classes, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bag_of_tokens(labels, weights):
    """Mean score of the attended tokens under the class of the row, from ids or one-hot rows: linear in each."""

    def log_prob(inputs, attention_mask, rows):
        scores = weights[labels[rows]]
        tokens = torch.gather(scores, 1, inputs) if inputs.ndim == 2 else torch.einsum("ntv,nv->nt", inputs, scores)
        return 4 * (tokens * attention_mask).sum(1) / attention_mask.sum(1)

    return log_prob


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("given", [{}, {"guidance_scale": 1.5}])
@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_padded_batches_with_classes_give_the_tokens_of_single_rows(make_model, given, method):
    model = make_model(seed=3).double()
    labels, weights = torch.tensor([3, 1, 0, 2]), token_scores()
    options = OPTIONS | given | {"temperature": 1.0, "return_trace": True}
    steering = ClassifierGuidance(bag_of_tokens(labels, weights), scale=8.0, method=method, batch_size=1000)
    batch = generate(model, *pad_prompts(PROMPTS, EOS_ID), **options, classifier=steering)
    changed = generate(model, *pad_prompts(PROMPTS, EOS_ID), **options)
    for row, prompt in enumerate(PROMPTS):
        steering = ClassifierGuidance(
            bag_of_tokens(labels[row : row + 1], weights), scale=8.0, method=method, batch_size=77 if row else 1000
        )
        alone = generate(model, torch.tensor([prompt]), **options, classifier=steering, row_keys=torch.tensor([row]))
        assert batch.sequences[row, -12:].equal(alone.sequences[0, -12:])
        assert batch.trace[row].equal(alone.trace[0])
        assert not batch.sequences[row].equal(changed.sequences[row])


def test_the_first_order_gives_the_tokens_of_the_exact_method_for_a_linear_score():
    model = tiny_llada(seed=3).double()
    log_prob = bag_of_tokens(torch.tensor([3, 1, 0, 2]), token_scores())
    inputs = pad_prompts(PROMPTS, EOS_ID)
    exact, first_order = (
        generate(model, *inputs, **OPTIONS, temperature=1.0, classifier=ClassifierGuidance(log_prob, 8.0, method))
        for method in ("exact", "first_order")
    )
    assert exact.sequences.equal(first_order.sequences)
    assert (exact.num_forward_passes, exact.num_row_passes) == (8, 32)


def test_a_strong_classifier_writes_its_tokens_and_suppressed_ones_stay_out():
    model, wanted = tiny_llada(seed=3), [40, 41, 50, 77]
    inputs = pad_prompts(PROMPTS, EOS_ID)

    def log_prob(input_ids, attention_mask, rows):
        return torch.isin(input_ids, torch.tensor(wanted)).float().sum(1)

    options = OPTIONS | {"temperature": 1.0, "suppress_tokens": [41]}
    unguided = generate(model, *inputs, **options, classifier=ClassifierGuidance(log_prob, scale=0.0)).sequences
    assert unguided.equal(generate(model, *inputs, **options).sequences)
    new = generate(model, *inputs, **options, classifier=ClassifierGuidance(log_prob, scale=30.0)).sequences[:, -12:]
    assert set(new.flatten().tolist()) == {40, 50, 77}


def test_the_best_token_alone_is_greedy_whatever_the_classifier_says(joint_model):
    """Of the tokens that may be proposed: the mask token, whose logit is the largest of all, costs no evaluation."""
    options = {"max_new_tokens": 3, "steps": 3, "remasking": "random", "suppress_tokens": [1]}
    prompts, num_scored = torch.zeros(50, 0, dtype=torch.long), []

    def log_prob(input_ids, attention_mask, rows):
        num_scored.append(len(input_ids))
        return input_ids.double().sum(1)

    cut = sample(joint_model, prompts, **options, classifier=ClassifierGuidance(log_prob, top_k=1))
    greedy = sample(joint_model, prompts, **options, temperature=0.0)
    assert cut.equal(greedy)
    assert sum(num_scored) == 50 * (3 + 2 + 1)
    both = sample(joint_model, prompts, **options, classifier=ClassifierGuidance(log_prob))
    assert not both.equal(greedy)
    assert sum(num_scored) == 50 * 6 + 2 * 50 * 6


def test_ended_rows_are_not_shown_to_the_classifier():
    model, seen = eos_model([[0], [], [1]], length=4, num_rows=3), []

    def log_prob(input_ids, attention_mask, rows):
        assert input_ids[:, 0].equal(rows), "the row's prompt is its index"
        seen.append(sorted(set(rows.tolist())))
        return torch.zeros(len(input_ids))

    prompts = torch.tensor([[0], [1], [2]])
    steering = ClassifierGuidance(log_prob, batch_size=10_000)
    generate(model, prompts, max_new_tokens=4, steps=4, block_length=None, classifier=steering)
    assert seen == [[0, 1, 2], [1, 2], [1], [1]]


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_a_sequence_classifier_of_transformers_steers_adapters(method):
    """The five lines of the documentation, with a random classifier: its own score of the result must rise."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=128, num_labels=2, initializer_range=0.5, **sizes)
    classifier = BertForSequenceClassification(config).eval()
    table = classifier.get_input_embeddings().weight
    labels = torch.tensor([1, 0, 1, 0])

    def log_prob(inputs, attention_mask, rows):
        key = "input_ids" if inputs.ndim == 2 else "inputs_embeds"
        inputs = inputs if inputs.ndim == 2 else inputs.to(table.dtype) @ table
        logits = classifier(**{key: inputs}, attention_mask=attention_mask).logits
        return logits.log_softmax(-1).gather(1, labels[rows, None]).squeeze(1)

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llada(seed=3), lora)
    inputs = pad_prompts(PROMPTS, EOS_ID)
    before = {name: parameter.clone() for name, parameter in classifier.named_parameters()}
    scores = []
    for scale in (0.0, 3.0):
        steering = dlm_tune.ClassifierGuidance(log_prob, scale=scale, method=method, batch_size=500)
        output = model.generate(*inputs, **OPTIONS, temperature=1.0, classifier=steering)
        attention_mask = torch.cat([inputs[1], torch.ones(4, 12)], 1).long()
        with torch.no_grad():
            scores.append(log_prob(output.sequences, attention_mask, torch.arange(4)).mean())
    assert scores[1] > scores[0] + 0.3
    assert all(parameter.equal(before[name]) for name, parameter in classifier.named_parameters())
    assert all(parameter.grad is None for parameter in itertools.chain(classifier.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("classifier", "error", "words"),
    [
        (lambda *_: None, TypeError, ["classifier is a function", "ClassifierGuidance(log_prob"]),
        (ClassifierGuidance(lambda ids, *_: torch.zeros(3)), ValueError, ["shape (3,)", "64 sequences"]),
    ],
)
def test_what_cannot_steer_is_refused(classifier, error, words):
    with pytest.raises(error) as caught:
        generate(tiny_llada(), torch.tensor(PROMPTS[:1]), **OPTIONS, classifier=classifier)
    for word in words:
        assert word in str(caught.value)
