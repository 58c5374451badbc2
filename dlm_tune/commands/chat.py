"""`dlm-tune chat`: the terminal chat of `dlm_tune.generation.chat` on a checkpoint."""

from dlm_tune.commands.checkpoint import inference_device_map, load_checkpoint
from dlm_tune.generation.chat import run_chat
from dlm_tune.recipe import Recipe


def run_chat_command(recipe: Recipe) -> None:
    """Load the checkpoint and start the chat."""
    checkpoint, generation_config = recipe.build()
    model, tokenizer = load_checkpoint(
        checkpoint, adapter=checkpoint.adapter, device_map=inference_device_map(checkpoint.use_cpu)
    )
    run_chat(model, tokenizer, generation_config)
