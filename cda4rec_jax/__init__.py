"""Cloud-device collaborative agents for sequential recommendation, in JAX."""

from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "cda4rec_jax/kernels is not a folder: it should be a symbolic link to ../kernels, but this checkout was made without "
        "symbolic links. Where the file system has them, run `git config core.symlinks true` and "
        "`git checkout -- cda4rec_jax/kernels`; elsewhere install the wheel."
    )
