"""Where a teacher's files are: a folder, or a repository of the Hugging Face hub by name and revision."""

import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision

from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid

# What of a repository is fetched: weights that cannot hold code, and what says how to use them.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
CODE = "*.py"
# ``organisation/name``, as the hub has it.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def as_teacher(source: str | Path | TeacherConfig) -> TeacherConfig:
    """A teacher given by its path or name alone as one with every default."""
    return source if isinstance(source, TeacherConfig) else TeacherConfig(path=str(source))


def is_hub_name(path: str) -> bool:
    """Whether the path names a repository: it looks like one and no folder is there."""
    return HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def folder_of(source: str | Path | TeacherConfig) -> str:
    """The local folder with the teacher's files, fetched where they are not here yet.

    Raises:
        ConfigInvalid: the hub has no such repository or revision, wants a token, or cannot be reached.
    """
    teacher = as_teacher(source)
    if not is_hub_name(teacher.path):
        return teacher.path
    return _fetched(teacher.path, teacher.revision, code=teacher.trust_remote_code)


def pinned(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher with the commit that its revision is now, so that every worker has the same; folders as they are."""
    if not is_hub_name(teacher.path):
        return teacher
    return teacher.model_copy(update={"revision": Path(folder_of(teacher)).name})


@lru_cache(maxsize=8)
def _fetched(name: str, revision: str | None, *, code: bool) -> str:
    where = f"teacher.path: {name}" + (f" at revision {revision}" if revision else "")
    wanted = [*FILES, CODE] if code else list(FILES)
    try:
        return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except GatedRepoError:
        reason = "the hub wants you to accept its terms: do so on its page and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "there is no such folder here and no such repository on the hub (or it is private: set HF_TOKEN)"
    except NoSuchRevision:
        reason = "the hub has no such revision (teacher.revision)"
    except LocalEntryNotFoundError:
        reason = "is not on this machine, and the hub cannot be reached; give the path of a folder, or go online once"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be fetched from the hub: {str(error).splitlines()[0]}"
    raise ConfigInvalid(f"{where}: {reason}") from None
