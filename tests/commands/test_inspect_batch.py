"""Recipes that `inspect` must not trip over."""

from dlm_tune.cli import main
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import save_tiny_checkpoint


def test_recipe_that_evaluates_and_keeps_the_best_checkpoint(tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "data", "pairs")
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_name: {tmp_path}/data\noutput_dir: {tmp_path}/run\n"
        "max_steps: 4\nsave_strategy: steps\nsave_steps: 2\neval_strategy: steps\neval_steps: 2\nuse_cpu: true\n"
        "load_best_model_at_end: true\nmetric_for_best_model: eval_nelbo\nsave_total_limit: 1\n"
    )
    assert main(["inspect", "--debug", "--config", str(tmp_path / "recipe.yaml"), "--rows", "1"]) == 0
    assert "row" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
