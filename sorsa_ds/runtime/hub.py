"""Asking the Hugging Face hub, once and with a limit, before anything waits for it.

The hub's own client tries again for half a minute where there is no network, and says in the end only that it could not
find the files.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Kind = Literal["model", "dataset"]

SECONDS = 5.0
"""How long the hub may take to answer, looking up its address included."""

_PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a hub that is busy, which its client asks again."""


def can_be_read(kind: Kind, name: str, file: str, revision: str | None = None, needed: bool = False) -> bool:
    """Whether the hub gives a repository to this user now; False where the hub cannot be reached.

    Args:
        name: the repository's name, as `owner/name`.
        file: one of its files.
        revision: branch, tag or commit; None: the main branch.
        needed: whether a repository without that file is refused.

    Raises:
        ValueError: the hub was reached and refuses: there is no such repository, revision or file, or access to it has
            to be asked for. The message says how.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    try:
        _within(SECONDS, lambda: _ask(kind, name, file, revision))
    except (OfflineModeIsEnabled, httpx.TransportError, TimeoutError):
        return False
    except EntryNotFoundError as error:
        if needed:
            raise ValueError(f"{name} on the hub has no {file}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is open only to those who have asked: ask on {_page(kind, name)}, then log in (hf auth login, or "
            f"the environment variable HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} on the hub has no branch, tag or commit {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no {kind} {name!r} on the hub, or it is private: check the name, or log in (hf auth login)"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} cannot be a name on the hub: {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in _PASSING:
            raise ValueError(f"the hub does not give {name}: {error}") from error
    return True


def fetched(name: str, revision: str | None, download: Callable[[bool], str], say: Callable[[str], None]) -> Path:
    """What `download` gives of a model: from the hub, or from Hugging Face's cache where the hub cannot be reached.

    Args:
        download: takes whether only the cache may be asked, and returns a path.
        say: is told where the copy in the cache has to do.

    Raises:
        ValueError: the hub refuses, or it cannot be reached and the cache has no copy.
    """
    online = can_be_read("model", name, "config.json", revision)
    try:
        path = Path(download(not online))
    except Exception as error:  # the hub's client, the network and the disk fail in many ways
        raise ValueError(f"the hub does not give {name}: {error}" if online else unreachable("the model")) from error
    if not online:
        say(f"The hub is not asked or cannot be reached: {name} is taken from Hugging Face's cache, {path}")
    return path


def check_logged_in() -> None:
    """Stop where the hub does not know this user, so that nothing could be published.

    Raises:
        ValueError: there is no token, the hub refuses it, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if (token := get_token()) is None:
        raise ValueError("you are not logged in to the hub: hf auth login, or set HF_TOKEN")
    try:
        _within(SECONDS, lambda: HfApi(token=token).whoami())
    except (OfflineModeIsEnabled, httpx.TransportError, TimeoutError) as error:
        raise ValueError(f"the hub ({constants.ENDPOINT}) cannot be reached") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in _PASSING:
            raise ValueError(f"the hub does not accept your token: {error}; log in anew (hf auth login)") from error


def has_copy_of_data(name: str) -> bool:
    """Whether `datasets` has a data set of the hub in its cache, some configuration of it at least."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    # It keeps `Owner/SomeName` as Owner___some_name.
    return any(_letters(folder.name) == _letters(name.replace("/", "___")) for folder in cache.glob("*___*"))


def unreachable(what: str) -> str:
    """What to say where the hub cannot be reached and there is no copy in the cache, as the second half of a sentence.

    Args:
        what: the setting or option that may name a folder instead.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return f"HF_HUB_OFFLINE is set and Hugging Face's cache has no copy of it: unset it, or give a folder as {what}"
    return (
        f"the hub ({constants.ENDPOINT}) cannot be reached, and Hugging Face's cache has no copy of it: mend the "
        f"network (HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror), or give a folder as {what}"
    )


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _page(kind: Kind, name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{name}"


def _ask(kind: Kind, name: str, file: str, revision: str | None) -> None:
    """One HEAD request for a file, which the hub answers as it would answer the download."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(name, file, repo_type=kind, revision=revision)
    answer = get_session().head(url, headers=build_hf_headers(), timeout=SECONDS, follow_redirects=False)
    hf_raise_for_status(answer)


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Do something that may hang, such as looking up an address, and raise what it raises.

    Raises:
        TimeoutError: the action has not ended in time; its thread is left behind.
    """
    raised: list[Any] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if raised:
        raise raised[0]
