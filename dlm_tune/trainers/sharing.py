"""Model cards beside everything that is saved, and pushing to the Hub while and after training."""

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import HubStrategy

from dlm_tune.hub import PushReport, push_to_hub, write_card
from dlm_tune.hub.facts import TRAINING_FILE
from dlm_tune.hub.privacy import is_hub_name
from dlm_tune.hub.push import claim_repository
from dlm_tune.trainers.saving import SavingTrainer
from dlm_tune.trainers.training_facts import training_facts

logger = logging.getLogger(__name__)


class SharingTrainer(SavingTrainer):
    """A SavingTrainer that describes what it saves, and pushes it by `dlm_tune.push_to_hub`.

    Of the arguments of transformers, `push_to_hub`, `hub_model_id`, `hub_private_repo` (private unless False),
    `hub_token`, `hub_revision` and `hub_strategy` ("end" or "every_save") are honoured. A run that pushes begins with
    an empty repository, or goes on with its own (`resume_from_checkpoint`).
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_FILE).write_text(json.dumps(training_facts(self), indent=2) + "\n", encoding="utf-8")
        write_card(folder, repo_id=self._card_name(), keep=Path(self.args.output_dir) / "README.md")

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write the card of `dlm_tune.hub.make_card` where weights lie; TRL asks for it at every checkpoint."""
        folder = Path(self.args.output_dir)
        has_weights = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if has_weights and self.is_world_process_zero():
            write_card(folder, repo_id=self._card_name())

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check, before anything is trained, that this run may push, and make the repository.

        Raises:
            ValueError: no token, a repository that holds files already, or an adapter of a base that only this
                machine has.
            OSError: the Hub cannot be reached.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        base = str(getattr(model.config, "_name_or_path", "") or "")
        if isinstance(model, PeftModel) and not is_hub_name(base):
            raise ValueError(
                f"push_to_hub=True: the adapter's base {base!r} is a folder of this machine, so nobody else could use "
                "it. Push the base first and train from its Hub name, or train without push_to_hub and push with "
                "`dlm-tune push --base_model USER/NAME`, or a merged model"
            )
        self.hub_model_id = claim_repository(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            token=token or self.args.hub_token,
            revision=self.args.hub_revision,
            private=self._is_private(private),
            overwrite=bool(self.args.resume_from_checkpoint),
        )
        self.push_in_progress = None

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        overwrite: bool = False,
        base_model: str | None = None,
        license: str | None = None,
    ) -> PushReport | None:
        """Save, and push weights, tokenizer and card of `output_dir`; see `dlm_tune.push_to_hub`.

        Args:
            commit_message: title of the commit.
            blocking: must be True: the call returns when everything is on the Hub.
            token: instead of `hub_token` of the arguments.
            revision: branch, instead of `hub_revision` of the arguments.
            private: of a new repository, instead of `hub_private_repo` of the arguments; True by default.
            overwrite: push into a repository that was not begun by this run and holds files.
            base_model: Hub name of the base, where the model was loaded from a folder.
            license: of the card.

        Returns:
            What was pushed, on the first process.

        Raises:
            ValueError: see `dlm_tune.push_to_hub`; `blocking=False`.
        """
        if not blocking:
            raise ValueError("blocking=False cannot be honoured: files could change while they travel. Remove it.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        return self.push_saved(
            commit_message,
            overwrite=overwrite,
            token=token,
            revision=revision,
            private=private,
            base_model=base_model,
            license=license,
        )

    def push_saved(
        self,
        commit_message: str | None = "End of training",
        folder: str | Path | None = None,
        *,
        overwrite: bool = False,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> PushReport | None:
        """Push a folder of this run as it is, by default `output_dir`, from the first process."""
        if not self.is_world_process_zero():
            return None
        is_own = self.hub_model_id is not None
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        return push_to_hub(
            folder or self.args.output_dir,
            name,
            private=self._is_private(private),
            revision=revision or self.args.hub_revision,
            overwrite=overwrite or is_own,
            token=token or self.args.hub_token,
            commit_message=commit_message,
            **options,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's weights; a failure is reported and does not end the training."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self.push_saved(f"Training in progress, step {self.state.global_step}", checkpoint_folder)
        except (ValueError, OSError) as error:
            logger.warning("%s was not pushed: %s. The next save tries again.", checkpoint_folder, error)

    def _card_name(self) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name)

    def _is_private(self, private: bool | None) -> bool:
        chosen = self.args.hub_private_repo if private is None else private
        return chosen is not False
