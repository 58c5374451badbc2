"""The lm-evaluation-harness offline: three kinds of task on a tiny model, and each answer against an oracle."""

import builtins
import dataclasses
import json

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from dlm_tune.evaluation import log_likelihood
from dlm_tune.evaluation.harness import harness_model_class, run_harness
from dlm_tune.evaluation.harness_model import _context_key, rolling_windows
from dlm_tune.generation import DiffusionGenerationConfig, decode_completion, generate
from tests.tiny_models import EOS_ID, save_tiny_checkpoint, tiny_dream, tiny_llada, tiny_tokenizer

CONFIG = DiffusionGenerationConfig(max_new_tokens=8, block_length=4, steps=4)
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture
def task_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "is it?", "answer": "yes"}, {"question": "was it so?", "answer": "no"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        text = yaml.safe_dump({"task": name, **common, **task, "metadata": {"version": 1}})
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def harness_model(model=None, **options):
    options = {"generation_config": CONFIG, "num_samples": 16, "batch_size": 3} | options
    return harness_model_class()(model or tiny_llada(), tiny_tokenizer(), **options)


def instances(kind, *arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_three_kinds_of_tasks_run_offline(task_directory, make_model):
    model, tokenizer = make_model(), tiny_tokenizer()
    options = {"generation_config": CONFIG, "num_samples": 16}
    results = run_harness(model, tokenizer, list(TASKS), include_path=task_directory, bootstrap_iters=10, **options)
    samples = results["samples"]
    bounds = [float(response[0]) for sample in samples["tiny_choice"] for response in sample["filtered_resps"]]
    encoded = [[tokenizer(text)["input_ids"] for text in ("is it?", "was it so?")], ["yes", "no"]]
    prompts = [prompt for prompt in encoded[0] for _ in range(2)]
    completions = [tokenizer(f" {answer}")["input_ids"] for answer in encoded[1]] * 2
    keys = [_context_key(prompt) for prompt in prompts]
    expected = log_likelihood(model, prompts, completions, num_samples=16, row_keys=keys).log_likelihood
    assert bounds == pytest.approx(expected.tolist())
    accuracy = ((expected[0] > expected[1]).double() + (expected[3] > expected[2]).double()) / 2
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy.item())
    assert results["results"]["tiny_perplexity"]["byte_perplexity,none"] > 1
    assert results["results"]["tiny_generation"]["exact_match,none"] == 0
    assert all("\n" not in sample["filtered_resps"][0] for sample in samples["tiny_generation"])


def test_loglikelihood_is_the_bound_and_moves_spaces_to_the_continuation():
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    pairs = [("a b ", "cd"), ("", "xyz"), ("q:", " a"), ("q:", "")]
    answers = harness_model(model).loglikelihood(instances("loglikelihood", *pairs))
    encoded = [[tokenizer(text)["input_ids"] for text in pair] for pair in [("a b", " cd"), *pairs[1:]]]
    keys = [_context_key(context) if context else index for index, (context, _) in enumerate(encoded)]
    expected = log_likelihood(model, *zip(*encoded, strict=True), num_samples=16, row_keys=keys)
    assert [answer[0] for answer in answers] == pytest.approx(expected.log_likelihood.tolist())
    assert answers[3] == (0.0, True), "nothing to write"


def test_a_bound_does_not_depend_on_the_other_requests():
    """Noise is keyed by the context, so limits, order and processes change no number."""
    pairs = [("which? ", "abcd"), ("other ", "xy"), ("which? ", "efgh")]
    model = harness_model(tiny_llada(), check_greedy=False)
    together = model.loglikelihood(instances("loglikelihood", *pairs))
    backwards = model.loglikelihood(instances("loglikelihood", *pairs[::-1]))[::-1]
    alone = model.loglikelihood(instances("loglikelihood", pairs[2]))
    assert [score for score, _ in together] == pytest.approx([score for score, _ in backwards], rel=1e-6)
    assert alone[0][0] == pytest.approx(together[2][0], rel=1e-6)


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_is_greedy_is_what_unmasking_writes(make_model):
    """The continuation that the model itself writes, most confident position first, and one with a letter changed."""
    model, tokenizer = make_model(seed=5), tiny_tokenizer()
    pairs = []
    for context, length in [("abc", 4), ("def", 4), ("one two", 3), ("x", 1)]:
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        own = generate(model, ids, max_new_tokens=length, steps=length, block_length=None, stop_at_eos=False)
        continuation = own.sequences[0, ids.shape[1] :].tolist()
        changed = continuation.copy()
        changed[-1] = 40 if changed[-1] != 40 else 41
        pairs += [(ids[0].tolist(), continuation), (ids[0].tolist(), changed)]
    assert harness_model(model)._is_greedy(pairs) == [True, False] * 4
    assert {
        greedy
        for _, greedy in harness_model(model, check_greedy=False).loglikelihood(
            instances("loglikelihood", ("ab", "c"))
        )
    } == {False}


def test_guidance_guides_likelihoods_greedy_checks_and_texts():
    model, tokenizer = tiny_llada(seed=5), tiny_tokenizer()
    guided = harness_model(model, generation_config=dataclasses.replace(CONFIG, guidance_scale=1.5))
    context = tokenizer("abc")["input_ids"]
    own = generate(
        model,
        torch.tensor([context]),
        max_new_tokens=4,
        steps=4,
        block_length=None,
        stop_at_eos=False,
        guidance_scale=1.5,
    )
    continuation = own.sequences[0, 3:].tolist()
    # an empty context has nothing to guide, whatever batch it is in
    assert guided._is_greedy([(context, continuation), ([], [40])])[0]
    assert not harness_model(model)._is_greedy([(context, continuation)])[0]
    pairs = [("abc", "de"), ("", "xy")]
    found = guided.loglikelihood(instances("loglikelihood", *pairs))
    encoded = [[tokenizer(text)["input_ids"] for text in pair] for pair in pairs]
    options = {"num_samples": 16, "row_keys": [_context_key(context), 1], "guidance_scale": 1.5}
    expected = log_likelihood(model, *zip(*encoded, strict=True), **options)
    assert [score for score, _ in found] == pytest.approx(expected.log_likelihood.tolist(), rel=1e-5)
    request = instances("generate_until", ("abc", {"until": [], "max_gen_toks": 8}))
    assert guided.generate_until(request) != harness_model(model).generate_until(request)
    with pytest.raises(ValueError, match=r"guidance_scale=1.5 has no condition"):
        guided.loglikelihood_rolling(instances("loglikelihood_rolling", ("abc",)))
    with pytest.raises(ValueError, match="guidance_schedule='linear' has no effect"):
        harness_model(model, guidance_schedule="linear")
    scheduled = harness_model(model, guidance_scale=1.0, guidance_schedule="linear")
    with pytest.raises(ValueError, match=r"guidance_schedule='linear' goes by the steps"):
        scheduled.loglikelihood(instances("loglikelihood", *pairs))


def test_contexts_that_are_too_long_lose_their_beginning(caplog):
    model = harness_model(max_length=20)
    long, _ = model.loglikelihood(instances("loglikelihood", ("z" * 50 + "abcdefgh", "0123456789"), ("ab", "c")))
    assert "lost its beginning" in caplog.text
    kept = harness_model(max_length=20).loglikelihood(instances("loglikelihood", ("zzabcdefgh", "0123456789")))
    assert long[0] == pytest.approx(kept[0][0], abs=1e-4)
    with pytest.raises(ValueError, match=r"continuation of 21 tokens.*max_length=20"):
        model.loglikelihood(instances("loglikelihood", ("a", "b" * 21)))


@pytest.mark.parametrize(
    ("num_tokens", "max_length", "stride"), [(0, 8, 4), (5, 8, 4), (8, 8, 4), (30, 8, 3), (9, 8, 8)]
)
def test_rolling_windows_score_every_token_once(num_tokens, max_length, stride):
    windows = rolling_windows(num_tokens, max_length, stride)
    assert [token for _, start, end in windows for token in range(start, end)] == list(range(num_tokens))
    for index, (context_start, start, end) in enumerate(windows):
        assert 0 <= context_start <= start < end
        assert end - context_start <= max_length
        assert index == 0 or end - start <= stride
        assert index == 0 or start - context_start >= max_length - stride, "the context is as long as it can be"


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_rolling_scores_add_up_over_windows(make_model):
    model, tokenizer = make_model(), tiny_tokenizer()
    texts = ["0123456789abcdef", "short", ""]
    answers = harness_model(model, max_length=9, rolling_stride=4).loglikelihood_rolling(
        instances("loglikelihood_rolling", *((text,) for text in texts))
    )
    ids = tokenizer(texts[0])["input_ids"]
    prefix = [tokenizer.bos_token_id] if model.config.logits_shift else []
    size = 9 - len(prefix)
    windows = rolling_windows(16, size, 4)
    assert len(windows) > 2
    prompts = [prefix + ids[first:start] for first, start, _ in windows] + [prefix]
    completions = [ids[start:end] for _, start, end in windows] + [tokenizer("short")["input_ids"]]
    expected = log_likelihood(model, prompts, completions, num_samples=16).log_likelihood
    assert answers == pytest.approx([expected[:-1].sum().item(), expected[-1].item(), 0.0])


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_rolling_windows_with_their_prefix_fit_max_length(make_model, monkeypatch):
    lm = harness_model(make_model(), max_length=9, rolling_stride=9)
    seen = []
    monkeypatch.setattr(lm, "_score", lambda pairs: seen.extend(pairs) or [0.0] * len(pairs))
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("0123456789abcdefghijkl",)))
    assert len(seen) == 3
    assert max(len(context) + len(scored) for context, scored in seen) == 9


def test_generate_until_fills_the_tasks_canvas_and_cuts_the_text():
    model, tokenizer = tiny_llada(seed=5), tiny_tokenizer()
    prompt = torch.tensor([tokenizer("tell me")["input_ids"]])
    lm = harness_model(model)
    config = lm._task_options({"max_gen_toks": 10})[0]
    assert (config.max_new_tokens, config.block_length, config.steps) == (12, 4, 6), (
        "half a step a token, as configured"
    )
    tokens = generate(model, prompt, None, config).sequences[0, prompt.shape[1] :].tolist()
    text = decode_completion(tokenizer, tokens, [EOS_ID])
    stop = text[5]
    assert text.index(stop) > 0
    requests = [
        ("tell me", {"until": [], "max_gen_toks": 10}),
        ("tell me", {"until": [stop], "max_gen_toks": 10}),
        ("tell me", {"until": stop, "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}),
        ("tell me", {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 2.0}),
        ("other", {"until": [], "max_gen_toks": 3}),
    ]
    answers = lm.generate_until(instances("generate_until", *requests))
    assert answers[0] == text
    assert answers[1] == answers[2] == text[: text.index(stop)]
    assert answers[3] != text
    assert len(answers[4]) <= 4


def test_stop_strings_may_be_special_tokens():
    lm = harness_model()
    ids = lm.tokenizer("ab<|start_header_id|>cd<|eot_id|>ef")["input_ids"]
    assert lm._cut(ids, []) == "abcd"
    assert lm._cut(ids, ["<|start_header_id|>", ""]) == "ab"


def test_registered_under_its_name_for_the_harness(task_directory, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    harness_model_class()
    path = save_tiny_checkpoint(tmp_path / "model")
    results = lm_eval.simple_evaluate(
        model="dlm_tune",
        model_args=f"pretrained={path},steps=4,block_length=4,max_new_tokens=8,num_samples=4",
        tasks=["tiny_generation"],
        task_manager=TaskManager(include_path=str(task_directory), include_defaults=False),
        bootstrap_iters=0,
        batch_size=2,
        apply_chat_template=True,
    )
    assert "exact_match,none" in results["results"]["tiny_generation"]
    prompt, generation_kwargs = results["samples"]["tiny_generation"][0]["arguments"][0]
    assert prompt == tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "is it?"}], add_generation_prompt=True, tokenize=False
    )
    assert generation_kwargs["max_gen_toks"] == 10


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    real_import = builtins.__import__

    def missing(name, *arguments, **options):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", missing)
        with pytest.raises(ImportError, match=r'pip install "dlm-tune\[eval\]"'):
            harness_model_class.__wrapped__()  # without the cache: other tests have imported lm_eval


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "temperature=1.0 would have no effect.*gen_kwargs", {"temperature": 1.0}),
        (ValueError, "batch_size='auto'", {"batch_size": "auto"}),
        (ValueError, "rolling_stride=999.*max_length=256", {"rolling_stride": 999}),
        (ValueError, "adapter='x' needs pretrained to be a name", {"adapter": "x"}),
        (TypeError, "'step'.*Did you mean 'steps'", {"step": 3}),
    ],
)
def test_bad_options(error, words, options):
    with pytest.raises(error, match=words):
        harness_model(**options)


def test_bad_tasks_and_task_options(task_directory):
    lm = harness_model()
    with pytest.raises(ValueError, match=r"'top_p': 0.5.*cannot be honoured"):
        lm._task_options({"do_sample": True, "temperature": 1.0, "top_p": 0.5})
    with pytest.raises(ValueError, match=r"max_gen_toks=300.*max_length=256"):
        lm._task_options({"max_gen_toks": 300})
    with pytest.raises(ValueError, match="tokenizer=None"):
        harness_model_class()(tiny_llada())
    with pytest.raises(ValueError, match="is not a directory"):
        run_harness(tiny_llada(), tiny_tokenizer(), ["tiny_choice"], include_path=task_directory / "nowhere")


@pytest.mark.slow
def test_unknown_tasks_are_named(task_directory):
    with pytest.raises(ValueError, match=r"tiny_choise.*Did you mean.*tiny_choice"):
        run_harness(tiny_llada(), tiny_tokenizer(), ["tiny_choise"], include_path=task_directory)
