"""What is legal but not usual: columns of one's own, tokens and templates by argument, several evaluation sets."""

import pytest
from datasets import Dataset
from trl import SFTConfig

from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import tiny_llada, tiny_tokenizer
from tests.trainers.test_diffusion_trainer import PAIRS, make_trainer

CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 8


def test_best_checkpoint_by_nelbo_is_the_lowest(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_rows=PAIRS,
        max_steps=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nelbo",
    )
    trainer.train()
    nelbos = [entry["eval_nelbo"] for entry in trainer.state.log_history if "eval_nelbo" in entry]
    assert nelbos[0] > nelbos[-1]  # else the first checkpoint would be the best one by chance
    assert trainer.state.best_metric == min(nelbos)
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(min(nelbos), rel=1e-6)


def test_a_column_named_row_index_is_no_sign_of_prepared_rows(tmp_path):
    rows = [{**row, "row_index": 7} for row in PAIRS]
    trainer = make_trainer(tmp_path, rows=rows)
    assert trainer.train_dataset["row_index"] == list(range(len(rows)))


def test_eos_token_of_the_arguments_ends_and_fills_answers(tmp_path):
    trainer = make_trainer(tmp_path, eos_token="<|eot_id|>", eos_policy="pad_to_max")
    eot = trainer.processing_class.convert_tokens_to_ids("<|eot_id|>")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    added = batch["input_ids"][batch["eos_padding_mask"]]
    assert len(added)
    assert set(added.tolist()) == {eot}


def test_raw_evaluation_data_in_a_dict_are_checked(tmp_path):
    trainer = make_trainer(tmp_path)
    good, bad = Dataset.from_list(PAIRS[:3]), Dataset.from_list([{"prompt": "a", "completion": ""}, PAIRS[0]])
    metrics = trainer.evaluate({"one": good, "two": Dataset.from_list(PAIRS[3:])})
    assert metrics["eval_one_num_rows"] == 3
    assert metrics["eval_one_nelbo"] == trainer.evaluate(good)["eval_nelbo"]
    with pytest.raises(ValueError, match="rows of the two data set cannot be used"):
        trainer.evaluate({"one": good, "two": bad})


def test_wrong_kinds_of_arguments_are_named(tmp_path):
    rows = Dataset.from_list(PAIRS)
    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(TypeError, match=r"args is a SFTConfig: pass a dlm_tune\.DiffusionConfig"):
        DiffusionTrainer(tiny_llada(), plain, rows, processing_class=tiny_tokenizer())
    ours = DiffusionConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for streamed in (rows.to_iterable_dataset(), {"a": rows.to_iterable_dataset()}):
        with pytest.raises(TypeError, match="eval_dataset is a IterableDataset"):
            DiffusionTrainer(tiny_llada(), ours, rows, streamed, processing_class=tiny_tokenizer())


def test_conversations_without_a_chat_template_are_refused(tmp_path):
    arguments = DiffusionConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        DiffusionTrainer(
            tiny_llada(), arguments, Dataset.from_list(CHATS), processing_class=tiny_tokenizer(chat_template=False)
        )
