"""Pushing a checkpoint or adapter to the Hugging Face Hub, in one commit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dlm_tune.hub.card import metadata_of
from dlm_tune.hub.contents import Contents, collect, is_published
from dlm_tune.hub.privacy import is_hub_name, known_secrets, redact

_REMEDY = "--revision, or push over it with --overwrite (earlier commits stay in its history)"
_REMEDY_OF_A_RUN = "--hub_revision, or go on with the run that made it: --resume_from_checkpoint last"
_FIRST_FILES = (".gitattributes",)  # what the Hub itself puts into a new repository


@dataclass
class PushReport:
    """What was pushed, or would be.

    Attributes:
        repo_id: owner and name.
        url: of the commit; None after a dry run.
        sizes: bytes of each file in the repository.
        left_out: names in the folder that are not published.
        card: text of the model card.
        warnings: what the user should know.
    """

    repo_id: str
    url: str | None
    sizes: dict[str, int]
    left_out: list[str]
    card: str
    warnings: list[str]

    @property
    def metadata(self) -> str:
        """The card's YAML head."""
        return metadata_of(self.card)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> PushReport:
    """Push weights, tokenizer, configs, recipe and a model card, in one commit.

    One commit, so that the repository holds all of a model or nothing of it. Large files travel first; after a cut
    connection, the same call finds on the Hub what has arrived and sends the rest.

    Args:
        folder: a checkpoint or an adapter: the output_dir of a run, or a folder of `dlm-tune merge`.
        repo_id: USER/NAME, or NAME for the token's own user.
        private: of a repository that is created; an existing public one is refused unless False.
        revision: branch to push to, made from `main` where there is none.
        base_model: Hub name of the base, where the files name a local folder.
        license: of the card, as the Hub spells it; by default that of the base's card.
        overwrite: push into a repository that has files already.
        dry_run: check and report only; nothing is contacted.
        token: with the right to write; by default that of `hf auth login` or HF_TOKEN.
        commit_message: title of the commit.

    Raises:
        ValueError: the folder, or the repository, is not fit; each message says what to do.
        OSError: the Hub cannot be reached, or the connection was cut.
    """
    _check_name(repo_id)
    if base_model is not None and not is_hub_name(base_model):
        raise ValueError(f"base_model={base_model!r} is not the name of a repository of the Hub: USER/NAME")
    token = token or get_token()
    gather = partial(collect, folder, base_model=base_model, secrets=[token])
    contents = gather(repo_id, license=license)
    if dry_run:
        return _report(contents, repo_id, None)
    api, say = _connect(repo_id, token)
    if (full_name := _full_name(api, say, repo_id)) != repo_id:
        repo_id = full_name
        contents = gather(repo_id, license=license)
    files = _check_repository(api, say, repo_id, revision, private=private, overwrite=overwrite)
    if license is None and (license := _base_license(api, say, contents)):
        contents = gather(repo_id, license=license)
    say(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision is not None:
        say(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    message = commit_message or f"Push {'adapter' if contents.facts.is_adapter else 'model'} with dlm-tune"
    # operations are used up by a commit
    operations: list[Any] = [CommitOperationAdd(name, file) for name, file in contents.files.items()]
    stale = [name for name in files if is_published(name) and name not in contents.files]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = say(lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision))
    return _report(contents, repo_id, str(commit.commit_url))


def claim_repository(repo_id: str, *, token: str | None, revision: str | None, private: bool, overwrite: bool) -> str:
    """Make the repository that a run will push to, and return its full name.

    Raises:
        ValueError: no token, or a repository that holds files already and is not to be overwritten.
        OSError: the Hub cannot be reached.
    """
    _check_name(repo_id)
    api, say = _connect(repo_id, token)
    repo_id = _full_name(api, say, repo_id)
    _check_repository(api, say, repo_id, revision, private=private, overwrite=overwrite, remedy=_REMEDY_OF_A_RUN)
    say(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    return repo_id


def _connect(repo_id: str, token: str | None) -> tuple[HfApi, "_Explained"]:
    token = token or get_token()
    if not token:
        raise ValueError(
            f"pushing to {repo_id} needs a token of the Hugging Face Hub: make one with the right to write at "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )
    return HfApi(token=token), _Explained(repo_id, token)


def _full_name(api: HfApi, say: "_Explained", repo_id: str) -> str:
    """The name with its owner, by default the token's; a token that the Hub does not take is found here."""
    user = say(api.whoami)["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id={repo_id!r} is no name of the Hub: {error}. Use USER/NAME") from None


def _check_repository(
    api: HfApi,
    say: "_Explained",
    repo_id: str,
    revision: str | None,
    *,
    private: bool,
    overwrite: bool,
    remedy: str = _REMEDY,
) -> list[str]:
    try:
        info = say(lambda: api.model_info(repo_id), passes=RepositoryNotFoundError)
    except RepositoryNotFoundError:
        return []
    if private and info.private is False:
        raise ValueError(
            f"{repo_id} exists and is public, and pushes are private by default. Say --private false if everyone may "
            "see this, or choose another name"
        )
    try:
        files = say(lambda: api.list_repo_files(repo_id, revision=revision), passes=RevisionNotFoundError)
    except RevisionNotFoundError:  # a new branch: nothing is overwritten, but it begins with the files of main
        return [name for name in say(lambda: api.list_repo_files(repo_id)) if name not in _FIRST_FILES]
    files = [name for name in files if name not in _FIRST_FILES]
    if files and not overwrite:
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if files[5:] else "")
        raise ValueError(
            f"{repo_id}{f' at {revision}' if revision else ''} exists and holds {shown}. Choose another name "
            f"or {remedy}"
        )
    return files


def _base_license(api: HfApi, say: "_Explained", contents: Contents) -> str | None:
    """The licence of a base on the Hub, unless the card has one; an adapter's base must be there.

    Raises:
        ValueError: the base of an adapter is not on the Hub.
    """
    base = contents.facts.base_model
    if base is None or contents.facts.base_is_local:
        return None
    try:
        info = say(lambda: api.model_info(base), passes=RepositoryNotFoundError)
    except RepositoryNotFoundError:
        if contents.facts.is_adapter:
            raise ValueError(
                f"the adapter's base {base} is not on the Hub, or your token may not see it: without it nobody can "
                "use the adapter. Push the base first, or name the right one with --base_model USER/NAME"
            ) from None
        return None
    known = contents.card.data.to_dict().get("license")
    found = (info.card_data.to_dict() if info.card_data else {}).get("license")
    return None if known else found


def _report(contents: Contents, repo_id: str, url: str | None) -> PushReport:
    metadata = contents.card.data.to_dict()
    warnings = []
    if not metadata.get("license"):
        where = (
            " (that of the base's card is taken, if it has one)" if url is None and metadata.get("base_model") else ""
        )
        warnings.append(f"The card names no licence{where}: give one with --license, for example apache-2.0.")
    if contents.facts.base_is_local:
        warnings.append(
            f"The base {contents.facts.base_model} is a local folder: the card has no base_model. Name one of the "
            "Hub with --base_model USER/NAME."
        )
    if not contents.facts.training:
        warnings.append("The folder has no training.json: the card says nothing of the training.")
    return PushReport(repo_id, url, contents.sizes(), contents.left_out, str(contents.card), warnings)


class _Explained:
    """Calls of the Hub whose failures say what to do, without tokens in them."""

    def __init__(self, repo_id: str, token: str) -> None:
        self._repo_id, self._token = repo_id, token

    def __call__(self, call: Callable[[], Any], passes: type[Exception] | None = None) -> Any:
        try:
            return call()
        except OfflineModeIsEnabled:
            raise OSError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from None
        except HfHubHTTPError as error:
            if passes is not None and isinstance(error, passes):
                raise
            raise self._explain(error) from None
        except (HTTPError, OSError, RuntimeError) as error:  # uploads wrap their error in a RuntimeError
            if isinstance(error.__cause__, HfHubHTTPError):
                raise self._explain(error.__cause__) from None
            raise OSError(
                f"the connection to the Hub broke while pushing to {self._repo_id} ({self._clean(error)}). The "
                "repository is as it was; run the same command again: what has arrived is not sent again"
            ) from None

    def _explain(self, error: HfHubHTTPError) -> Exception:
        status = error.response.status_code if error.response is not None else 0
        repo_id = self._repo_id
        if status == 401:
            return ValueError(
                "the Hub does not accept the token (401): it is expired, revoked or mistyped. Make a new one at "
                "https://huggingface.co/settings/tokens and run `hf auth login`, or set HF_TOKEN"
            )
        if status == 403:
            return ValueError(
                f"the token may not write to {repo_id} (403): use one with the right to write, and a name below your "
                "own user or an organisation that you belong to"
            )
        if status == 404:
            return ValueError(
                f"the Hub does not know {repo_id}, or the token may not see it (404): {self._clean(error)}"
            )
        if status >= 500 or status == 429:
            return OSError(
                f"the Hub answered {status} while pushing to {repo_id}: run the same command again later; what has "
                "arrived is not sent again"
            )
        return ValueError(f"the Hub refused the push to {repo_id} ({status}): {self._clean(error)}")

    def _clean(self, error: Exception) -> str:
        text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]
        return redact(text or type(error).__name__, known_secrets(self._token))
