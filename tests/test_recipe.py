"""Recipes: types, places, overrides, and every kind of fault."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.commands.run import read_arguments
from dlm_tune.recipe import RecipeError, check_mapping, parse_recipe
from dlm_tune.recipe_yaml import dump_yaml, parse_scalar, read_yaml
from dlm_tune.shipped import find_yaml, resolve_path, shipped_names


@dataclass
class Small:
    name: str | None = None
    rate: float = 0.1
    count: int = 3
    flag: bool = False
    targets: list[str] | None = None
    report: str | list[str] | None = None
    options: dict | str | None = None
    length: int | None = 16
    rule: str = field(default="one", metadata={"choices": ["one", "two", "three"]})

    def __post_init__(self) -> None:
        if self.count > 100:
            raise ValueError(f"count={self.count} is above 100.")


@dataclass
class Other:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size={self.size} is negative.")


def parse(tmp_path: Path, text: str, *flags: str) -> Small:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse_recipe((Small,), ["--config", str(path), *flags]).build()[0]


def faults(tmp_path: Path, text: str, *flags: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse(tmp_path, text, *flags)
    return error.value.faults


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2.", 2.0),
        ("3", 3),
        ("1_000", 1000),
        ("007", "007"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("[a, 1e-3]", ["a", 1e-3]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


_SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff"),
        max_size=12,
    ),
    st.sampled_from(
        ["no", "1e-4", "1e5", "on", "0x1f", "null", "~", "true", "01", "1_0", "2024-01-01", "12:30", "=", "<<"]
    ),
)


@given(st.dictionaries(st.sampled_from("abcdef"), st.one_of(_SCALAR, st.lists(_SCALAR, max_size=3)), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(dump_yaml(values, "a header\nof two lines"), encoding="utf-8")
    entries, problems = read_yaml(path)
    assert problems == []
    assert {name: value for name, value, _ in entries} == values


def test_values_reach_their_fields(tmp_path):
    parsed = parse(
        tmp_path,
        "name: x\nrate: 1e-4\ncount: 5\nflag: true\ntargets: [a, b]\nreport: none\n"
        "options: {a: {b: 1}}\nlength: null\n",
    )
    assert parsed == Small("x", 1e-4, 5, True, ["a", "b"], "none", {"a": {"b": 1}}, None)
    assert parse(tmp_path, "") == Small()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rate", "1e-3"], {"rate": 1e-3}),
        (["--rate=1e-3"], {"rate": 1e-3}),
        (["--count", "-1"], {"count": -1}),
        (["--flag"], {"flag": True}),
        (["--flag", "false"], {"flag": False}),
        (["--no_flag"], {"flag": False}),
        (["--no-flag"], {"flag": False}),
        (["--targets", "a", "b"], {"targets": ["a", "b"]}),
        (["--targets", "[a, b]"], {"targets": ["a", "b"]}),
        (["--targets", "a", "--targets", "b"], {"targets": ["a", "b"]}),
        (["--targets", "[INST] hi [/INST]"], {"targets": ["[INST] hi [/INST]"]}),
        (["--targets", '{"a": 1}'], {"targets": ['{"a": 1}']}),
        (["--targets", ""], {"targets": [""]}),
        (["--targets", "null"], {"targets": None}),
        (["--report", "a", "b"], {"report": ["a", "b"]}),
        (["--report", "a"], {"report": "a"}),
        (["--name", "12"], {"name": "12"}),
        (["--name", "null"], {"name": None}),
        (["--options", "{a: 1}"], {"options": {"a": 1}}),
        (["--options.a", "1", "--options.b", "x"], {"options": {"k": 0, "a": 1, "b": "x"}}),
        (["--length", "null"], {"length": None}),
        (["--rate", "null"], {"rate": 0.1}),
    ],
)
def test_flags_override_the_file(tmp_path, flags, expected):
    parsed = parse(tmp_path, "rate: 0.5\nflag: true\ntargets: [z]\nname: y\noptions: {k: 0}\n", *flags)
    for name, value in expected.items():
        assert getattr(parsed, name) == value


def test_resolved_recipe_gives_the_same_objects(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rate: 1e-4\nname: 'no'\n")
    recipe = parse_recipe((Small,), ["--config", str(path), "--targets", "a", "b"])
    recipe.set("flag", True, place="the command itself")
    path.write_text(recipe.to_yaml("header"))
    again = parse_recipe((Small,), ["--config", str(path)])
    assert again.build()[0] == Small(name="no", rate=1e-4, targets=["a", "b"])
    assert "flag" not in yaml.safe_load(path.read_text())


# Faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate: 0.1\ncuont: 3\n", [":2: unknown key 'cuont': did you mean 'count'?"]),
        ("zzzzzz: 3\n", ["unknown key 'zzzzzz'", "--help-all"]),
        ("max_seq_length: 3\n", ["unknown key 'max_seq_length': write max_length"]),
        ("rate: 0.1\nname: a\nrate: 0.2\n", [":3: duplicate key 'rate', first written in line 1"]),
        ("options: {a: 1, a: 2}\n", ["duplicate key 'a'"]),
        ("rate: high\n", [':1: rate = "high" has the wrong type: expected a number']),
        ("count: 1.5\n", ["count = 1.5", "expected an integer"]),
        ("count: true\n", ["count = true", "expected an integer"]),
        ("flag: yes\n", ['flag = "yes"', "expected true or false"]),
        ("flag: 1\n", ["flag = 1", "expected true or false"]),
        ("name: 5\n", ["name = 5", "expected text or null"]),
        ("targets: q_proj\n", ['targets = "q_proj"', "expected a list of texts"]),
        ("targets: [1]\n", ["targets = [1]", "expected a list of texts"]),
        ("length: ten\n", ["expected an integer or null"]),
        ("rule: tow\n", ["rule = 'tow' is not one of: one, two, three. Did you mean 'two'?"]),
        ("- a\n- b\n", [":1: a recipe is a mapping"]),
        ("rate: [1\n", ["recipe.yaml:2"]),
    ],
)
def test_faults_name_place_key_value_and_remedy(tmp_path, text, words):
    (fault,) = faults(tmp_path, text)
    for word in words:
        assert word in fault


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratee", "1"], ["--ratee: unknown key 'ratee': did you mean 'rate'?"]),
        (["--rate", "high"], ['--rate: rate = "high" has the wrong type: expected a number']),
        (["--rate"], ["argument --rate: expected one argument"]),
        (["stray"], ["'stray' belongs to no flag"]),
        (["--count.x", "1"], ["count is not a mapping: expected an integer"]),
        (["--options.x"], ["--options.x: needs a value"]),
        (["--rule", "four"], ["is not one of: one, two, three"]),
        (["--config", "other"], ["--config: given twice"]),
    ],
)
def test_faults_of_flags(tmp_path, flags, words):
    (fault,) = faults(tmp_path, "", *flags)
    for word in words:
        assert word in fault


def test_all_faults_come_at_once(tmp_path):
    found = faults(tmp_path, "cuont: 3\nrate: high\nrate: 2\n", "--flagg")
    assert len(found) == 4
    with pytest.raises(RecipeError, match=r"^2 problems in the command line"):
        parse_recipe((Small, Other), ["--count", "101", "--size", "-1"]).build()


def test_not_a_text_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        parse_recipe((Small,), ["--config", str(path)])


def test_mapping_valued_key():
    assert check_mapping({"rate": 1e-4, "count": 2}, Small, "small") == ({"rate": 1e-4, "count": 2}, [])
    _, problems = check_mapping({"ratee": 1, "count": "x"}, Small, "small")
    assert len(problems) == 2
    assert "did you mean 'rate'?" in problems[0]


# Names


def test_shipped_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "llada-8b/sft/lora" in shipped_names("recipes")
    expected = find_yaml("llada-8b/sft/lora", "recipes")
    assert find_yaml("llada-8b/sft/lora.yaml", "recipes") == expected
    assert find_yaml("recipes/llada-8b/sft/lora.yaml", "recipes") == expected
    assert resolve_path("recipes/llada-8b") == str(expected.parent.parent)
    (tmp_path / "recipes" / "llada-8b").mkdir(parents=True)
    assert resolve_path("recipes/llada-8b") == "recipes/llada-8b", "the current directory comes first"
    assert resolve_path("GSAI-ML/LLaDA-8B-Base") == "GSAI-ML/LLaDA-8B-Base"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llada-8b/sft/lroa", ["llada-8b/sft/lora"]),
        ("lora", ["llada-8b/sft/lora", "dream-7b/sft/lora"]),
        ("qqqqqqqqq", ["Available: "]),
    ],
)
def test_unknown_recipe_lists_the_nearest(name, words):
    with pytest.raises(ValueError, match="neither a file") as error:
        find_yaml(name, "recipes")
    for word in words:
        assert word in str(error.value)


# The real keys


REAL = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nuse_cpu: true\n"


@pytest.mark.parametrize(
    ("verb", "text", "words"),
    [
        ("sft", "lora_r: 8\n", ["lora_r = 8 has no effect with use_peft: false", "set use_peft: true"]),
        ("sft", "load_in_4bit: true\n", ["load_in_4bit", "use_peft: true"]),
        ("sft", "use_peft: true\nbnb_4bit_quant_type: nf4\n", ["bnb_4bit_quant_type", "load_in_4bit: true"]),
        ("sft", "save_strategy: no\nsave_steps: 5\n", ["save_steps = 5 has no effect with save_strategy: no"]),
        ("sft", "eval_steps: 5\n", ["eval_steps = 5 has no effect with eval_strategy: "]),
        ("sft", "max_steps: 5\nnum_train_epochs: 2\n", ["num_train_epochs = 2 has no effect with max_steps: 5"]),
        ("sft", "hub_model_id: a/b\n", ["push_to_hub: true"]),
        ("sft", "model_init_kwargs: {dtype: float32}\n", ["model_init_kwargs cannot be set", "dtype"]),
        ("sft", "hub_token: secret\n", ["hub_token cannot be set", "HF_TOKEN"]),
        ("sft", "warmup_ratio: 0.1\n", ["warmup_steps with a value below 1"]),
        ("sft", "temperature: 0.5\n", ["'temperature' is a key of `dlm-tune generate`, `dlm-tune chat`"]),
        ("generate", "learning_rate: 1e-4\n", ["'learning_rate' is a key of `dlm-tune pretrain`, `dlm-tune sft`"]),
        ("sft", "lr_scheduler_type: cosin\n", ["lr_scheduler_type", "one of linear, cosine"]),
        ("sft", "optim: adamw\n", ["optim", "one of adamw_torch"]),
        ("sft", "dtype: float8\n", ["dtype = 'float8' is not one of: auto, bfloat16, float16, float32"]),
    ],
)
def test_keys_of_the_verbs(tmp_path, verb, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text((REAL if verb != "generate" else "model_name_or_path: m\nprompt: [x]\n") + text)
    with pytest.raises(RecipeError) as error:
        read_arguments(verb, ["--config", str(path)])
    assert len(error.value.faults) == 1
    for word in words:
        assert word in str(error.value)


def test_a_flag_may_idle_a_key_of_the_file_but_not_the_reverse(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(REAL + "num_train_epochs: 3\neval_strategy: steps\neval_steps: 10\n")
    recipe = read_arguments("sft", ["--config", str(path), "--max_steps", "2", "--eval_strategy", "no"])
    assert recipe.get("max_steps") == 2
    path.write_text(REAL + "save_strategy: no\n")
    with pytest.raises(RecipeError, match=r"--save_steps: save_steps = 5 has no effect"):
        read_arguments("sft", ["--config", str(path), "--save_steps", "5"])


def test_eval_and_inspect_take_a_training_recipe_but_no_idle_flags(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(REAL + "learning_rate: 1e-4\nuse_peft: true\nlora_r: 4\n")
    assert read_arguments("eval", ["--config", str(path), "--noise_seed", "3"]).get("noise_seed") == 3
    for verb in ("eval", "inspect"):
        with pytest.raises(RecipeError, match="--learning_rate: has no effect in `dlm-tune"):
            read_arguments(verb, ["--config", str(path), "--learning_rate", "1e-3"])


def test_faults_of_the_objects_come_together(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\nuse_cpu: true\neos_policy: one\nblock_length: 8\n")
    with pytest.raises(RecipeError) as error:
        read_arguments("sft", ["--config", str(path)]).build()
    assert "no training data" in str(error.value)
    assert "block_length=8 has no effect" in str(error.value)
