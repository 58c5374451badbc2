"""The command line end to end on a tiny model, and what it says about wrong input."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm_tune.cli import main
from dlm_tune.commands.arguments import VERBS
from dlm_tune.commands.effects import _READ_BY, CONDITIONS, DECIDED
from dlm_tune.commands.environment import collect
from dlm_tune.commands.help import missing_help_keys, verb_help
from dlm_tune.recipe import keys_of
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import save_tiny_checkpoint

SAMPLER = ["--max_new_tokens", "8", "--steps", "4", "--block_length", "8"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny checkpoint, tiny data sets, and a recipe that trains an adapter on them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_checkpoint(folder / "model")
    for kind in ("pairs", "text", "messages"):
        write_rows(folder / kind, kind)
    recipe = (
        f"model_name_or_path: {folder}/model\ndataset_name: {folder}/pairs\noutput_dir: {folder}/run\n"
        "use_peft: true\nlora_r: 4\nmax_steps: 2\nper_device_train_batch_size: 4\nmax_length: 64\n"
        "gradient_checkpointing: false\nsave_strategy: steps\nsave_steps: 1\nlogging_steps: 1\nlearning_rate: 1e-3\n"
        "use_cpu: true\neos_policy: pad_to_block\nblock_length: 8\nnoise_schedule: linear\n"
    )
    (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def trained(workspace):
    assert main(["sft", "--debug", "--config", str(workspace / "recipe.yaml")]) == 0
    return workspace / "run"


def error_of(capsys, *arguments: str) -> str:
    """What a wrong command line prints: one `error:` block, exit code 2, no traceback."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    return printed[printed.index("error: ") :]


# Costs


def best_of_three(command: list[str]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_takes_less_than_a_second():
    assert best_of_three([sys.executable, "-m", "dlm_tune", "--help"]) < 1


def test_neither_the_package_nor_the_command_line_imports_torch():
    code = (
        "import sys, dlm_tune, dlm_tune.cli, dlm_tune.recipe, dlm_tune.commands.arguments, dlm_tune.commands.run;"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Help


def test_overview_lists_every_verb(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb, description in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(description.summary)}$", printed, re.MULTILINE)
    assert main(["--version"]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert missing_help_keys(verb) == []
    assert main([verb, "--help"]) == 0
    short = capsys.readouterr().out
    assert short.startswith(f"dlm-tune {verb}: ")
    assert max(map(len, short.splitlines())) <= 160
    assert len(short.splitlines()) < 220
    assert len(verb_help(verb, show_all=True)) >= len(short) - 80


def test_help_shows_choices_and_defaults():
    text = verb_help("sft")
    assert "--eos_policy (one of one, pad_to_block, pad_to_max, none)" in text
    assert text.index("--model_name_or_path") < text.index("--learning_rate")
    assert "--adam_beta2" not in text
    assert "--adam_beta2" in verb_help("sft", show_all=True)


def test_tables_name_only_keys_that_exist():
    from dlm_tune.commands.arguments import verb_classes

    keys = set().union(*(keys_of(verb_classes(verb)) for verb in ("convert", "eval", "generate", "inspect")))
    named = {name for condition in CONDITIONS for name in (*condition.keys, condition.controller)}
    assert named | set(DECIDED) | set().union(*_READ_BY.values()) <= keys


# The main path


def test_training_leaves_adapter_recipe_and_results(trained):
    assert (trained / "adapter_model.safetensors").is_file()
    assert (trained / "tokenizer.json").is_file()
    config = json.loads((trained / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    assert results["num_processes"] == 1
    assert results["after"]["eval_nelbo"] < results["before"]["eval_nelbo"]
    recipe = (trained / "recipe.yaml").read_text()
    assert "learning_rate: 0.001" in recipe
    assert "dlm-tune sft" in recipe


def test_resume_goes_on_from_the_last_checkpoint(workspace, trained, capsys):
    arguments = ["sft", "--config", str(workspace / "recipe.yaml"), "--max_steps", "3"]
    assert "exists and is not empty" in error_of(capsys, *arguments)
    assert main([*arguments, "--debug", "--resume_from_checkpoint", "last"]) == 0
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_overwrite_removes_old_checkpoints_only(workspace, tmp_path):
    old = tmp_path / "checkpoint-99"
    old.mkdir()
    (old / "trainer_state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("keep")
    arguments = ["sft", "--config", str(workspace / "recipe.yaml"), "--output_dir", str(tmp_path), "--debug"]
    assert main([*arguments, "--overwrite_output_dir", "--max_steps", "1", "--evaluate_before", "false"]) == 0
    assert not old.exists()
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_generate_from_the_adapter(workspace, trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the known answer"}]
    rows = [{"prompt": "past of w1: "}, {"prompt": messages[:1]}, {"messages": messages}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "deep" / "answers.jsonl"
    arguments = ["generate", "--debug", "--model_name_or_path", str(trained), "--prompt", "a b", "--prompt", "c"]
    arguments += ["--prompts_file", str(prompts), "--output_file", str(output), "--batch_size", "2", *SAMPLER]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "> a b\n" in printed
    assert re.search(r"5 prompts, \d+ tokens, \d+ forward passes of \d+ rows, [\d.]+ tokens/s", printed)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["a b", "c", "past of w1: ", messages[:1], messages[:1]]
    assert answers[3]["completion"] == answers[4]["completion"]
    assert all("<|mdm_mask|>" not in answer["completion"] for answer in answers)
    one = tmp_path / "one.jsonl"
    arguments = ["generate", "--model_name_or_path", str(workspace / "model"), "--adapter", str(trained), *SAMPLER]
    assert main([*arguments, "--prompt", "a b", "--output_file", str(one)]) == 0
    assert json.loads(one.read_text()) == answers[0], "neither the batch nor the way to name the adapter matters"


def test_chat_template_always_wraps_text(workspace, capsys, monkeypatch):
    from dlm_tune.commands import generate as command

    seen = []
    original = command.tokenize_prompt
    monkeypatch.setattr(command, "tokenize_prompt", lambda tok, prompt: seen.append(prompt) or original(tok, prompt))
    arguments = ["generate", "--model_name_or_path", str(workspace / "model"), "--prompt", "hi", *SAMPLER]
    assert main(arguments) == 0
    assert main([*arguments, "--chat_template", "always"]) == 0
    assert seen == ["hi", [{"role": "user", "content": "hi"}]]


def test_eval_reports_the_trainers_figures(workspace, trained, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["eval", "--debug", "--config", str(trained / "recipe.yaml"), "--model_name_or_path", str(trained)]
    arguments += ["--generate", "--generation.max_new_tokens", "8", "--generation.steps", "8", "--num_prompts", "3"]
    assert main([*arguments, "--generation.block_length", "8", "--output_file", str(output)]) == 0
    figures = json.loads(output.read_text())
    after = json.loads((trained / "results.json").read_text())["after"]
    assert figures["likelihood"]["eval_nelbo"] == pytest.approx(after["eval_nelbo"], rel=1e-6)
    assert figures["completions"]["num_rows"] == 3
    printed = capsys.readouterr().out
    assert f"{after['eval_nelbo']:.4f}" in printed
    assert "exact match" in printed


def test_a_run_with_unpaired_text_is_evaluated_by_its_own_recipe(workspace, tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\n")
    flags = [
        "--unpaired_dataset",
        str(tmp_path / "text.txt"),
        "--unpaired_fraction",
        "0.25",
        "--prompt_dropout",
        "0.1",
    ]
    recipe = ["--config", str(workspace / "recipe.yaml")]
    assert main(["sft", "--debug", *recipe, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("nelbo_unpaired" in entry for entry in log)
    own = ["--config", str(tmp_path / "run" / "recipe.yaml"), "--model_name_or_path", str(tmp_path / "run")]
    assert main(["eval", "--debug", *own, "--output_file", str(tmp_path / "figures.json")]) == 0
    likelihood = json.loads((tmp_path / "figures.json").read_text())["likelihood"]
    assert likelihood["eval_nelbo"] == pytest.approx(results["after"]["eval_nelbo"], rel=1e-6)


def test_a_distilled_run_is_inspected_and_evaluated_by_its_own_recipe(workspace, tmp_path, capsys):
    """An adapter that has been trained could not be a teacher; evaluation needs none."""
    recipe = ["--config", str(workspace / "recipe.yaml")]
    distil = ["--guidance_distillation_scale", "1.5"]
    assert main(["sft", "--debug", *recipe, *distil, "--output_dir", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    own = ["--config", str(tmp_path / "run" / "recipe.yaml")]
    output = ["--output_file", str(tmp_path / "figures.json")]
    assert main(["eval", "--debug", *own, "--model_name_or_path", str(tmp_path / "run"), *output]) == 0
    likelihood = json.loads((tmp_path / "figures.json").read_text())["likelihood"]
    assert likelihood["eval_nelbo"] == pytest.approx(after["eval_nelbo"], rel=1e-6)
    capsys.readouterr()
    for arguments, expected in (
        (own, "x divergence from the guided initial model (nats)"),
        ([*recipe, *distil], "x divergence from the guided initial model (nats)"),
        (recipe, "x negative log-likelihood (nats)"),
        ([*own, "--estimate"], "Not counted: what guidance_distillation_scale changes"),
    ):
        assert main(["inspect", "--debug", *arguments]) == 0
        assert expected in capsys.readouterr().out


def test_eval_of_a_file_without_a_recipe(workspace, tmp_path):
    output = tmp_path / "figures.json"
    arguments = ["eval", "--model_name_or_path", str(workspace / "model"), "--output_file", str(output), "--debug"]
    assert main([*arguments, "--eval_dataset_name", str(workspace / "pairs" / "test.jsonl")]) == 0
    assert json.loads(output.read_text())["likelihood"]["eval_num_rows"] == 4


@pytest.mark.slow
def test_eval_runs_a_task_of_the_harness(workspace, tmp_path):
    rows = [{"question": f"w{i} is ", "choices": ["a", "b"], "label": i % 2} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\nmetadata: {version: 1}\n"
    )
    output = tmp_path / "figures.json"
    arguments = ["eval", "--debug", "--model_name_or_path", str(workspace / "model"), "--output_file", str(output)]
    arguments += ["--eval_dataset_name", str(workspace / "pairs" / "test.jsonl")]
    assert main([*arguments, "--tasks", "tiny_choice", "--tasks_path", str(tmp_path), "--tasks_limit", "2"]) == 0
    figures = json.loads(output.read_text())
    assert figures["likelihood"]["eval_num_rows"] == 4
    assert 0 <= figures["tasks"]["results"]["tiny_choice"]["acc,none"] <= 1
    assert figures["tasks"]["n-samples"]["tiny_choice"]["effective"] == 2


def test_chat_answers_a_line(workspace, capsys, monkeypatch):
    lines = iter(["hello"])

    def read_line(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr("dlm_tune.generation.chat.run_chat.__defaults__", (None, None, read_line))
    assert main(["chat", "--debug", "--model_name_or_path", str(workspace / "model"), *SAMPLER]) == 0
    assert next(lines, None) is None
    assert capsys.readouterr().out.strip()


def strip_colors(text: str) -> str:
    return re.sub(r"\033\[[\d;]*m", "", text)


def test_inspect_shows_the_batch_that_training_sees(workspace, capsys):
    """Markers add up: what is in brackets is masked, and weight x NLL / denominator is the trainer's coefficient."""
    arguments = ["inspect", "--debug", "--config", str(workspace / "recipe.yaml"), "--rows", "4"]
    assert main([*arguments, "--color", "never"]) == 0
    plain = capsys.readouterr().out
    figures = re.findall(
        r"row (\d+): t ([\d.]+), weight ([\d.]+), denominator ([\d.]+), (\d+) of (\d+) targets masked, (\d+) tokens\n"
        r"  (.*)\n",
        plain,
    )
    assert len(figures) == 4
    assert sum(int(row[5]) for row in figures) == int(figures[0][3]), "tokens: all targets of the step"
    for index, t, weight, _, num_masked, num_targets, num_tokens, text in figures:
        masked = "".join(re.findall(r"\[(.*?)\]", text))
        num_eos = sum(int(count or 1) for count in re.findall(r"(?:EOS|FILL)(?:x(\d+))?", masked))
        assert len(re.sub(r"(EOS|FILL)(x\d+)?", "", masked)) + num_eos == int(num_masked)
        assert float(weight) == pytest.approx(int(num_targets) / int(num_masked), rel=1e-3), "exact count: A / l"
        assert 0 <= float(t) < 1
        answer = re.sub(r"(EOS|FILL|PAD)(x\d+)?|[\[\]{}]", "", text)
        assert re.search(r"EOS[\]}]([\[{]FILL(x\d+)?[\]}])+(PAD|$)", text), "one EOS ends the answer, others fill it"
        assert answer == f"past of w{index}: w{index}ed"
        assert int(num_targets) % 8 == 0, "answers are filled to the block length with learned EOS"
        assert int(num_tokens) == len(f"past of w{index}: ") + int(num_targets)
    for word in ("prompt", "target", "masked", "end-of-sequence", "padding"):
        assert word in plain
    assert main([*arguments, "--color", "always"]) == 0
    colored = capsys.readouterr().out
    assert "\033[" in colored
    assert strip_colors(colored) == plain


def test_inspect_numbers_are_those_of_the_trainer(workspace, tmp_path, capsys):
    from dlm_tune.commands.inspect_batch import data_only_trainer
    from dlm_tune.commands.run import read_arguments
    from dlm_tune.commands.train import build_trainer

    arguments = ["--config", str(workspace / "recipe.yaml"), "--output_dir", str(tmp_path)]
    batches = []
    for verb in ("inspect", "sft"):
        recipe = read_arguments(verb, arguments)
        *_, model, data, config = recipe.build()
        real = verb == "sft"
        trainer = build_trainer("sft", recipe, model, data, config) if real else data_only_trainer(model, data, config)
        batches.append(trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, config.device)[0][0])
    assert batches[0]["noisy"].noisy_input_ids.equal(batches[1]["noisy"].noisy_input_ids)
    assert batches[0]["loss_weights"].equal(batches[1]["loss_weights"])


def test_env_reports_versions_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr("dlm_tune.commands.environment._PACKAGES", {"torch": "", "no-such-package": "pip install it"})
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "hf_verysecret" not in printed
    assert re.search(r"HF_TOKEN +set", printed)
    assert re.search(r"no-such-package +missing: pip install it", printed)
    assert re.search(r"torch threads +\d+", printed)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(collect()))


# Wrong input


def test_unknown_verb(capsys):
    assert "unknown command 'stf'" in error_of(capsys, "stf")
    assert "Did you mean 'sft'?" in error_of(capsys, "stf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--config", "{recipe}", "--learning_rat", "1"], ["unknown key 'learning_rat'", "'learning_rate'"]),
        (["sft", "--config", "nowhere/lora"], ["neither a file", "llada-8b/sft/lora"]),
        (["sft", "--config"], ["--config: needs a file"]),
        (["sft", "--config", "{recipe}", "--output_dir", "null"], ["output_dir is missing"]),
        (["sft", "--config", "{recipe}", "--output_dir", "{recipe}"], ["is a file"]),
        (["sft", "--config", "{recipe}", "--resume_from_checkpoint", "last", "--output_dir", "{tmp}/new"],
         ["there is no checkpoint-* folder"]),
        (["sft", "--config", "{recipe}", "--resume_from_checkpoint", "{folder}/model"], ["no trainer_state.json"]),
        (["sft", "--config", "{recipe}", "--model_name_or_path", "null"], ["model_name_or_path is missing"]),
        (["sft", "--config", "{recipe}", "--model_name_or_path", "{folder}/nothing"], ["nothing"]),
        (["sft", "--config", "{recipe}", "--dataset_name", "{folder}/text"], ["columns text", "dlm-tune pretrain"]),
        (["pretrain", "--config", "{recipe}"], ["columns prompt, completion", "completion_only_loss: false"]),
        (["sft", "--config", "{recipe}", "--dataset_name", "{folder}/none.jsonl"], ["dataset_name", "none.jsonl"]),
        (["sft", "--config", "{recipe}", "--max_length", "4"], ["max_length"]),
        (["sft", "--config", "{recipe}", "--padding_free"], ["padding_free=True cannot be honoured"]),
        (["sft", "--config", "{recipe}", "--dataset_name", "{folder}/pairs/train.jsonl", "--eval_strategy", "epoch"],
         ["eval_strategy = ", "needs evaluation data"]),
        (["sft", "--config", "{recipe}", "--accelerate_config", "zero4"], ["zero3"]),
        (["sft", "--config", "{recipe}", "--num_processes", "2"], ["no effect without --accelerate_config"]),
        (["eval", "--config", "{recipe}", "--generate", "--generation.step", "4"], ["unknown key 'step'", "'steps'"]),
        (["eval", "--config", "{recipe}", "--generation.steps", "4"], ["generation", "generate: true"]),
        (["eval", "--config", "{recipe}", "--dataset_name", "{folder}/pairs/train.jsonl"], ["nothing to evaluate on"]),
        (["eval", "--config", "{recipe}", "--eval_dataset_name", "{folder}/pairs", "--unpaired_dataset",
          "{folder}/text"], ["--unpaired_dataset: has no effect in `dlm-tune eval`"]),
        (["eval", "--model_name_or_path", "{folder}/model"], ["no evaluation data", "eval_dataset_name"]),
        (["eval", "--model_name_or_path", "{folder}/model", "--eval_dataset_name", "{folder}/text", "--generate"],
         ["prompt and completion, not text"]),
        (["generate", "--prompt", "x"], ["model_name_or_path is missing"]),
        (["generate", "--model_name_or_path", "{folder}/model"], ["no prompt"]),
        (["generate", "--model_name_or_path", "{folder}/model", "--prompts_file", "{tmp}/no.txt"], ["does not exist"]),
        (["generate", "--model_name_or_path", "{folder}/model", "--prompts_file", "{tmp}/bad.jsonl"],
         ["bad.jsonl:2", "is not JSON"]),
        (["generate", "--model_name_or_path", "{folder}/model", "--prompt", "x", "--max_new_tokens", "10",
          "--block_length", "4"], ["block_length=4", "max_new_tokens=10"]),
        (["inspect", "--config", "{recipe}", "--rows", "0"], ["rows=0 must be at least 1"]),
        (["env", "--learning_rate", "1"], ["only --json is known"]),
    ],
)  # fmt: skip
def test_wrong_input_is_explained(workspace, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\nnot json\n')
    places = {"recipe": workspace / "recipe.yaml", "folder": workspace, "tmp": tmp_path}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] in ("sft", "pretrain") and "--output_dir" not in arguments:
        arguments += ["--output_dir", str(tmp_path / "out")]
    printed = error_of(capsys, *arguments)
    for word in words:
        assert word in printed
    assert not (tmp_path / "out" / "results.json").exists()


def test_debug_shows_the_traceback(capsys):
    assert main(["sft", "--debug", "--config", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_our_own_mistakes_are_not_dressed_up(monkeypatch):
    def broken(verb: str, arguments: list[str]) -> None:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("dlm_tune.cli.run_verb", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        main(["env"])


def test_only_the_first_process_reports_a_fault_that_all_have(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["sft", "--nonsense", "1"]) == 2
    assert "error" not in capsys.readouterr().err


def test_module_is_the_same_program():
    finished = subprocess.run(
        [sys.executable, "-m", "dlm_tune", "nonsense"], capture_output=True, text=True, env={**os.environ, "RANK": "0"}
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: unknown command 'nonsense'")
    assert Path(sys.executable).with_name("dlm-tune").exists(), "the entry point is installed"
