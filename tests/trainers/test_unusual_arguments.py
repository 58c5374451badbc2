"""What is legal but not usual: columns of one's own, tokens and templates by argument, several evaluation sets."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTConfig
from trl.trainer import sft_trainer

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


@pytest.mark.parametrize("packing", [False, True])
def test_an_evaluation_takes_every_row_where_training_drops_the_last_batch(tmp_path, packing):
    settings = {"packing": packing, "max_length": 48, "dataloader_drop_last": True, "per_device_eval_batch_size": 3}
    trainer = make_trainer(tmp_path, eval_rows=PAIRS, per_device_train_batch_size=2, **settings)
    assert trainer.evaluate()["eval_num_rows"] == len(PAIRS)
    assert trainer.args.dataloader_drop_last
    assert trainer.predict(trainer.eval_dataset).metrics["test_num_rows"] == len(PAIRS)


def test_a_run_that_would_drop_all_data_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, packing=True, max_length=256, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="dataloader_drop_last=True leaves no batch"):
        trainer.train()


@pytest.mark.parametrize("packing", [False, True])
def test_an_adapter_on_the_head_is_trained(tmp_path, packing):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    trainer = make_trainer(
        tmp_path, peft_config=adapter, packing=packing, max_length=48, max_steps=2, learning_rate=1e-2
    )
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert any("lm_head" in name for name in trained)
    assert all(p.abs().max() > 0 for p in trained.values())  # they begin at 0
    assert sft_trainer.BaseTunerLayer is BaseTunerLayer
