"""The files of a Hugging Face model folder: read, or what is wrong with them explained."""

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cda4rec_jax.errors import UserError

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
POOLING = "1_Pooling/config.json"  # where sentence-transformers says how token states become one vector


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder holds the three files that an encoder is read from."""
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}: expected a folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}")
    if missing := [name for name in (CONFIG, TOKENIZER, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(
            f"model folder {folder} lacks {', '.join(missing)}: copy all files of the model there, such as those of "
            "sentence-transformers/all-MiniLM-L6-v2"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): copy the model's file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, expected an object: copy the model's file again")
    return value


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the weights, by name. Raises UserError where the file is damaged."""
    safetensors = _text_extra("safetensors.numpy")
    file = folder / WEIGHTS
    try:
        return safetensors.load_file(file)
    except Exception as error:  # safetensors has its own for damage, and lets those of Python through for types it does not know
        raise UserError(f"cannot read {file} ({error}): copy the model's file again, and not a pointer to it") from error


def read_tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of the folder. Raises UserError where the file is damaged."""
    tokenizers = _text_extra("tokenizers")
    file = folder / TOKENIZER
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"cannot read {file} ({error}): copy the model's file again") from error


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of the file of weights."""
    with (folder / WEIGHTS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text_extra(module: str) -> ModuleType:
    """A module of an optional dependency."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"a sentence encoder needs the package {package}, which is not installed: pip install 'cda4rec_jax[text]'"
        ) from error
