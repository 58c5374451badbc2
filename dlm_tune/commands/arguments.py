"""Which dataclasses make up the keys of each verb. Importing this module is cheap; `verb_classes` is not."""

from dataclasses import dataclass, field, fields

DTYPES = ["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line, as `dlm-tune --help` shows it."""

    summary: str
    example: str


VERBS = {
    "pretrain": Verb("train on plain text, or continue pretraining", "--config quickstart/pretrain/base"),
    "sft": Verb("fine-tune on prompts with answers or on chats", "--config llada-8b/sft/lora"),
    "generate": Verb("complete prompts", "--model_name_or_path CHECKPOINT --prompt 'past of carry: '"),
    "chat": Verb("talk to a model and watch it denoise", "--model_name_or_path GSAI-ML/LLaDA-8B-Instruct"),
    "eval": Verb("held-out likelihood, exact match, benchmark tasks", "--config RECIPE --adapter OUTPUT_DIR"),
    "inspect": Verb("show a batch as the loss sees it", "--config llada-8b/sft/lora"),
    "merge": Verb("make one checkpoint of adapter and base", "--adapter OUTPUT_DIR --output_dir OUT"),
    "push": Verb(
        "share a checkpoint or adapter on the Hub", "--model_name_or_path OUTPUT_DIR --hub_model_id USER/NAME"
    ),
    "convert": Verb(
        "make a diffusion checkpoint of a causal one", "--model_name_or_path Qwen/Qwen3-0.6B-Base --output_dir OUT"
    ),
    "report": Verb("curves of a run, or of several, as a page and a picture", "outputs/my-run"),
    "env": Verb("versions, devices, and what is missing", ""),
}


@dataclass
class RunArguments:
    """Keys of `pretrain` and `sft` that belong to the run as a whole."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into an output_dir that is not empty; its checkpoint-* folders are removed first."},
    )
    evaluate_before: bool = field(
        default=True,
        metadata={"help": "Evaluate before the first step too, where there is evaluation data, for the comparison."},
    )


@dataclass
class CheckpointArguments:
    """Keys of `generate` and `chat` that say which model is loaded and how."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint: a folder, a Hub name, or an adapter's folder (its base is loaded too)."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter to put on the model."})
    dtype: str | None = field(
        default=None, metadata={"help": "Weights' type; null is float32 on CPU, bfloat16 on GPU.", "choices": DTYPES}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the weights to 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the weights to 8 bits (bitsandbytes)."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})

    def __post_init__(self) -> None:
        faults = []
        if not self.model_name_or_path:
            faults.append("model_name_or_path is missing: a folder, a Hub name, or the output_dir of a training run.")
        if self.load_in_4bit and self.load_in_8bit:
            faults.append("load_in_4bit and load_in_8bit are both true: choose one.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass
class GenerateArguments:
    """Keys of `generate`: the prompts and where the answers go."""

    prompt: list[str] | None = field(default=None, metadata={"help": "A prompt; may be given several times."})
    prompts_file: str | None = field(
        default=None, metadata={"help": "Prompts: .txt, one a line, or .jsonl with `prompt` (text or messages)."}
    )
    negative_prompt: str | None = field(
        default=None,
        metadata={"help": "Text to steer away from with guidance_scale, instead of from answers without a prompt."},
    )
    output_file: str | None = field(default=None, metadata={"help": "Write answers here too, as JSON lines."})
    batch_size: int = field(default=8, metadata={"help": "Prompts that are denoised together."})
    chat_template: str = field(
        default="auto",
        metadata={
            "help": "Wrap text prompts as a user's turn: auto does so for instruct checkpoints.",
            "choices": ["auto", "always", "never"],
        },
    )

    def __post_init__(self) -> None:
        faults = []
        if not self.prompt and not self.prompts_file:
            faults.append("no prompt: give --prompt 'TEXT' (several times if you like) or --prompts_file FILE.")
        if self.batch_size < 1:
            faults.append(f"batch_size={self.batch_size} must be at least 1; the default is 8.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass
class EvalArguments:
    """Keys of `eval`: what is measured, beside the held-out likelihood of a recipe's evaluation data."""

    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter to put on the model."})
    generate: bool = field(
        default=False, metadata={"help": "Also complete the evaluation prompts: exact match and character error rate."}
    )
    generation: dict | None = field(
        default=None,
        metadata={"help": "Sampler options for `generate: true` and `tasks`, e.g. --generation.steps 24."},
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "With `generate: true`, complete only the first so many prompts."}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "lm-evaluation-harness tasks, e.g. gsm8k (needs the extra `eval`)."}
    )
    tasks_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    tasks_limit: int | None = field(default=None, metadata={"help": "Only the first so many examples of each task."})
    tasks_num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples in the prompts of the tasks; null is each task's own number."}
    )
    tasks_chat_template: bool = field(
        default=False, metadata={"help": "Put the prompts of the tasks through the chat template."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Write all figures here as JSON."})


@dataclass
class InspectArguments:
    """Keys of `inspect`."""

    estimate: bool = field(
        default=False,
        metadata={"help": "Instead of a batch: counts per step, loss to expect, memory; no weights are loaded."},
    )
    rows: int = field(default=4, metadata={"help": "Rows of the batch to show."})
    token_weights: bool = field(default=False, metadata={"help": "Print the weight of each masked token too."})
    color: str = field(
        default="auto",
        metadata={
            "help": "Colours, or markers alone; auto is colours on a terminal unless NO_COLOR is set.",
            "choices": ["auto", "always", "never"],
        },
    )

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1; the default is 4.")


@dataclass
class MergeArguments:
    """Keys of `merge`."""

    adapter: str | None = field(default=None, metadata={"help": "Adapter: a run's output_dir, or a Hub name."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its base: a folder or a Hub name; null is the one that the adapter names."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of model_name_or_path on the Hub."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the merged checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a checkpoint that is in output_dir."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the written weights; null is the base's.", "choices": DTYPES[1:]}
    )
    layout: str = field(
        default="original",
        metadata={
            "help": "original: weights named as in the authors' files; hf: as transformers' modules.",
            "choices": ["original", "hf"],
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weights file; as much memory is needed."})
    base_quantization: str | None = field(
        default=None,
        metadata={
            "help": "4bit: merge into the rounded weights that QLoRA trained on; null: into those of the files.",
            "choices": ["4bit"],
        },
    )

    def __post_init__(self) -> None:
        faults = []
        if not self.adapter:
            faults.append("adapter is missing: the folder of a saved adapter, such as the output_dir of a LoRA run.")
        if not self.output_dir:
            faults.append("output_dir is missing: the folder for the merged checkpoint.")
        if self.model_revision and not self.model_name_or_path:
            faults.append("model_revision has no effect without model_name_or_path: the adapter names its own base.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass
class PushArguments:
    """Keys of `push`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the checkpoint or adapter: a run's output_dir, or a merged model."}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository: USER/NAME, or NAME for yourself."})
    private: bool = field(default=True, metadata={"help": "false: the new repository is for everyone to see."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made where there is none."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name of what was trained, where the folder only knows a local path."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the card, e.g. apache-2.0; by default that of the base's card."}
    )
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})
    overwrite: bool = field(default=False, metadata={"help": "Push into a repository that has files already."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show files, sizes and the card's head; nothing is contacted."}
    )

    def __post_init__(self) -> None:
        faults = []
        if not self.model_name_or_path:
            faults.append("model_name_or_path is missing: the folder to push, such as the output_dir of a run.")
        if not self.hub_model_id:
            faults.append("hub_model_id is missing: the name on the Hub, USER/NAME.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass
class ConvertArguments:
    """Keys of `convert`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal checkpoint: a folder or a Hub name; an SMDM model's weights file."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the diffusion checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a checkpoint that is in output_dir."})
    mask_token: str | None = field(
        default=None,
        metadata={"help": "Text of the mask token, new or reserved; null is the tokenizer's own, else <|mask|>."},
    )
    mask_embedding: str = field(
        default="mean",
        metadata={"help": "Its first embedding: mean of all rows, or the token whose row is copied."},
    )
    logits_shift: bool = field(
        default=True,
        metadata={"help": "Position i is predicted from i - 1, as the source does it; false: in place, as LLaDA."},
    )
    source: str = field(
        default="hf",
        metadata={
            "help": "hf: a causal decoder in transformers' layout; smdm: a masked-diffusion model of ML-GSAI/SMDM.",
            "choices": ["hf", "smdm"],
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "With source: smdm, the tokenizer, which is not beside the weights."}
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "With source: smdm, e.g. Diff_LLaMA_1028M; null is the one of the weights' sizes."},
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "With source: smdm, for sizes that are none of the published ones."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the written weights; null is the source's.", "choices": DTYPES[1:]}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weights file."})

    def __post_init__(self) -> None:
        faults = []
        if not self.model_name_or_path:
            faults.append("model_name_or_path is missing: the checkpoint to convert, such as Qwen/Qwen3-0.6B-Base.")
        if not self.output_dir:
            faults.append("output_dir is missing: the folder for the diffusion checkpoint.")
        if self.source == "smdm" and not self.tokenizer_name_or_path:
            faults.append(
                "tokenizer_name_or_path is missing: SMDM's models come without one; the authors use "
                "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T."
            )
        if faults:
            raise ValueError("\n".join(faults))


def verb_classes(verb: str) -> tuple[type, ...]:
    """Dataclasses whose fields are the keys of a verb. Imports trl, and with it torch, for the training verbs."""
    if verb in ("report", "env"):
        return ()
    if verb == "merge":
        return (MergeArguments,)
    if verb == "push":
        return (PushArguments,)
    if verb == "convert":
        return (ConvertArguments,)
    if verb in ("generate", "chat"):
        from dlm_tune.generation import DiffusionGenerationConfig

        prompts = (GenerateArguments,) if verb == "generate" else ()
        return (CheckpointArguments, *prompts, DiffusionGenerationConfig)
    from trl import ModelConfig

    from dlm_tune.data import DatasetArguments
    from dlm_tune.trainers import DiffusionConfig

    own: tuple[type, ...] = {"eval": (EvalArguments,), "inspect": (InspectArguments,)}.get(verb, ())
    return (*own, RunArguments, ModelConfig, DatasetArguments, DiffusionConfig)


def verbs_of_key(key: str, excluded: str) -> list[str]:
    """The other verbs that know a key."""
    return [
        verb
        for verb in VERBS
        if verb != excluded and any(key == known.name for owner in verb_classes(verb) for known in fields(owner))
    ]
