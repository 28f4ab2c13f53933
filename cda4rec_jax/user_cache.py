"""Where compiled programs are kept between processes."""

import os
import stat
import tempfile
from pathlib import Path

from cda4rec_jax.errors import UserError


def cache_folder() -> Path:
    """``cda4rec_jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; for a user without a home, as in some containers, one for temporary files.

    Raises:
        UserError: there is no home, and the folder for temporary files could be written by somebody else: what is compiled is run.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "cda4rec_jax"
    try:
        return Path.home() / ".cache" / "cda4rec_jax"
    except RuntimeError:
        return _temporary()


def _temporary() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cda4rec_jax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"there is no home directory, and {folder} cannot be made ({error}): set XDG_CACHE_HOME") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"there is no home directory, and {folder} is not this user's alone: set XDG_CACHE_HOME to a folder that is"
        )
    return folder
