"""The command line: `dlm-tune VERB [--config RECIPE] [--key value ...]`.

Only the standard library is imported here; each verb imports what it needs.
"""

import logging
import os
import sys
import traceback
import warnings
from difflib import get_close_matches

from dlm_tune import __version__
from dlm_tune.commands.arguments import VERBS

USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` by default.

    Returns:
        Exit code: 0, 2 after an error that the user can mend (one `error:` block on stderr), 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"dlm-tune {__version__}")
        return 0
    verb, *arguments = arguments
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return _fail(f"unknown command '{verb}': choose one of {', '.join(VERBS)}.{hint}")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_libraries()
    try:
        run_verb(verb, arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if debug:
            traceback.print_exc()
        elif not _is_for_user(error):
            raise
        return _fail(str(error), error)
    return 0


def run_verb(verb: str, arguments: list[str]) -> None:
    """Import and run a verb, print its help, or hand it over to `accelerate launch`."""
    if {"-h", "--help", "--help-all", "--help_all"} & set(arguments):
        from dlm_tune.commands.help import verb_help

        print(verb_help(verb, show_all=bool({"--help-all", "--help_all"} & set(arguments))))
        return
    if verb == "report":
        from dlm_tune.commands.report import run_report

        run_report(arguments)
        return
    if verb == "env":
        from dlm_tune.commands.environment import run_environment

        run_environment(arguments)
        return
    from dlm_tune.commands.launch import launch, take_launch_arguments

    launch_arguments, arguments = take_launch_arguments(verb, arguments)
    from dlm_tune.commands.run import read_arguments, run

    recipe = read_arguments(verb, arguments)
    if launch_arguments is not None:
        launch(verb, arguments, launch_arguments)
    run(verb, recipe)


def overview() -> str:
    """Text of `dlm-tune --help`."""
    lines = [
        f"dlm-tune {__version__}: fine-tune and align diffusion language models",
        "",
        "usage: dlm-tune COMMAND [--config RECIPE] [--key value ...]",
        "",
        "commands:",
        *(f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()),
        "",
        "examples:",
        *(f"  dlm-tune {name} {verb.example}".rstrip() for name, verb in VERBS.items()),
        "",
        "A RECIPE is a YAML file or the name of one that ships, such as llada-8b/sft/lora; flags override its keys.",
        "  dlm-tune COMMAND --help        the keys of a command that matter most",
        "  dlm-tune COMMAND --help-all    all of its keys",
        "  --accelerate_config NAME       run on several processes: single_gpu, multi_gpu, zero3, fsdp2, ...",
        "  --debug                        show the traceback of an error",
    ]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Silence what a user of the command line can do nothing about."""
    # transformers renames an argument that trl still sets
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # our own error names file and line
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)
    # bitsandbytes and deepspeed report at import what they would use if it were there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _is_for_user(error: Exception) -> bool:
    """Whether the message alone tells the user what to do; otherwise the traceback is needed."""
    if isinstance(error, RuntimeError):
        return "out of memory" in str(error).lower()
    if isinstance(error, ImportError):
        return "install" in str(error)
    return not isinstance(error, TypeError)


def _fail(message: str, error: Exception | None = None) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank and type(error).__name__ == "RecipeError":  # the same on every process
        return USAGE_ERROR
    if isinstance(error, RuntimeError):
        message = message.splitlines()[0] + (
            "\nLower per_device_train_batch_size (and raise gradient_accumulation_steps), lower max_length, set "
            "gradient_checkpointing: true, or load the model with load_in_4bit: true."
        )
    process = f" on process {rank}" if rank else ""
    print(f"error{process}: {message}", file=sys.stderr)
    return USAGE_ERROR
