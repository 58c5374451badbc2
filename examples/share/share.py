"""`make share`: an adapter is merged, pushed, and loaded by its name in a fresh process; the Hub is on this machine.

    python examples/share/share.py                                    # the quickstart's adapter; trained if missing
    python examples/share/share.py --adapter outputs/my-run --prompt "..."

Every step is a command that works with huggingface.co as well: leave out the server and log in with `hf auth login`.
The completions of the model that came back are compared with those of the adapter on its base.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.hub_server import HubServer  # noqa: E402  (the server is that of the tests)

QUICKSTART = Path("outputs/quickstart/adapter")
PROMPTS = ["past of carry: ", "past of stop: ", "plural of box: "]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=QUICKSTART, help="folder of an adapter")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/share"))
    parser.add_argument("--prompt", action="append", help="to complete; may be given several times")
    parser.add_argument("--canvas", type=int, default=18, help="tokens to generate; the quickstart's answers have 18")
    return parser.parse_args()


def run(*command: str, **environment: str) -> None:
    """Run `dlm-tune` in a fresh process, and say so."""
    print("\n$ dlm-tune", *command, flush=True)
    subprocess.run([sys.executable, "-m", "dlm_tune", *command], check=True, env=os.environ | environment)


def complete(model: str, output_file: Path, arguments: argparse.Namespace, **environment: str) -> list[str]:
    """The greedy completions of the prompts."""
    prompts = [part for prompt in arguments.prompt or PROMPTS for part in ("--prompt", prompt)]
    canvas = str(arguments.canvas)
    sampler = ["--max_new_tokens", canvas, "--block_length", canvas, "--steps", canvas]
    run(
        "generate", "--model_name_or_path", model, *prompts, *sampler, "--output_file", str(output_file), **environment
    )
    return [json.loads(line)["completion"] for line in output_file.read_text().splitlines()]


def main() -> None:
    arguments = parse_arguments()
    os.chdir(ROOT)
    if arguments.adapter == QUICKSTART and not (QUICKSTART / "adapter_config.json").is_file():
        print(f"There is no {QUICKSTART} yet: training it, which takes minutes")
        subprocess.run([sys.executable, "examples/quickstart/run.py"], check=True)
    merged = arguments.output_dir / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    expected = complete(str(arguments.adapter), arguments.output_dir / "adapter.jsonl", arguments)
    run("merge", "--adapter", str(arguments.adapter), "--output_dir", str(merged))
    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        environment = hub.environment(home)
        push = ["push", "--model_name_or_path", str(merged), "--hub_model_id", "user/inflection"]
        run(*push, "--license", "apache-2.0", "--dry_run", **environment)
        run(*push, "--license", "apache-2.0", **environment)
        shared = complete("user/inflection", arguments.output_dir / "shared.jsonl", arguments, **environment)
    if shared != expected:
        sys.exit(f"The model that came back answers {shared}, the adapter on its base {expected}.")
    print(f"\nThe model that came back gives the same {len(shared)} answers as the adapter on its base.")


if __name__ == "__main__":
    main()
