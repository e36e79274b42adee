"""Puts a folder into a repository on the Hugging Face Hub, as one commit."""

import sys
from pathlib import Path
from typing import Any

from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files, hub
from rynnvla_jax.storage.hub import HubError, Name

LISTED = "sha256.json"  # of an export: the files that it consists of


def check(text: str) -> None:
    """Raises HubError, before anything slow, for a name that cannot be pushed to, or without a login that may."""
    name = _target(text)
    hub.require()
    try:
        who = _api().whoami()
    except Exception as error:
        said = hub.reason(name, error) or f"{shorten(error)}; {hub.LOG_IN}"
        raise HubError(f"{name}: {said}") from error
    mine = [who.get("name"), *(organisation.get("name") for organisation in who.get("orgs", []))]
    owner = name.repository.partition("/")[0]
    if owner not in mine:
        raise HubError(
            f"{name}: you are logged in as {mine[0]}, who may not write for {owner}; {hub.LOG_IN} as {owner}"
        )


def push(folder: Path, text: str, private: bool = True) -> str:
    """The address of the commit that has the files of `folder`; a repository that does not exist is created.

    Files that an earlier export left and that this one has not are deleted. Where nothing differs there is no commit.
    `private`: of a new repository; one that exists stays as it is.

    Raises HubError; then the repository is as it was.
    """
    import huggingface_hub

    name, api = _target(text), _api()
    try:
        api.create_repo(name.repository, private=private, exist_ok=True)
        before = api.repo_info(name.repository).sha
        paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        gone = sorted(_earlier(name, before) - paths.keys())
        operations: list[Any] = [huggingface_hub.CommitOperationAdd(n, p) for n, p in paths.items()]
        operations += [huggingface_hub.CommitOperationDelete(n) for n in gone]
        message = f"Export of rynnvla_jax: {len(paths)} files"
        done = api.create_commit(name.repository, operations, commit_message=message, parent_commit=before)
    except HubError:
        raise
    except Exception as error:
        raise HubError(f"{name}: {hub.reason(name, error) or shorten(error)}") from error
    if done.oid == before:
        print(f"{name} has these files already; there is no new commit", file=sys.stderr)
    return str(done.commit_url)


def _target(text: str) -> Name:
    name = hub.parse(text)
    if name.path or name.revision or name.kind == "dataset":
        raise HubError(f"{text}: a model is pushed to the main branch of a whole repository; write hf://USER/NAME")
    return name.of("model")


def _earlier(name: Name, commit: str) -> set[str]:
    """The files of the export that a commit has; none where it has no export."""
    at = hub.at(str(name), commit)
    there = hub.contents(at)
    if LISTED not in there:
        return set()
    listed = files.read_json(hub.here(at, choose=lambda names: [LISTED], show=False) / LISTED)
    return there.keys() & set(listed) if isinstance(listed, dict) else set()


def _api() -> Any:
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    return huggingface_hub.HfApi(library_name="rynnvla_jax")
