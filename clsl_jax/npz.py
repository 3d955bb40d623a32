"""`.npz` files: written whole or not at all, and read without trusting them."""

import io
import os
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from clsl_jax import atomic
from clsl_jax.errors import InputError


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz`; a reader sees the old file or the new one, never a part.

    The bytes are a function of the arrays alone.

    Raises:
      InputError: the place cannot be written to.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    try:
        with atomic.replacing(path) as partial, open(partial, "wb") as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): name another place."
        ) from None


def read(path: str, names: Sequence[str], *, made_by: str) -> dict[str, np.ndarray]:
    """Returns the named arrays of an `.npz`; whatever else is in the file is not touched.

    Pickles are never loaded, so that a file from somebody else cannot run anything.

    Args:
      path: of the file.
      names: arrays that must be there.
      made_by: what writes such files, for the message.

    Raises:
      InputError: no such file, not an `.npz`, damaged, an array missing or holding Python objects.
    """
    hint = f"expected an .npz made by {made_by}"
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file; {hint}.")
    try:
        is_archive = zipfile.is_zipfile(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if not is_archive:
        raise InputError(f"{path} is not an .npz file, or it was cut off; {hint}.")
    # A file that was tampered with fails in many ways in zipfile, zlib and NumPy's header parser.
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            found = {name: archive[name] for name in names if name not in missing}
            present = ", ".join(sorted(archive.files)) or "nothing"
    except Exception as error:
        raise InputError(f"{path} is damaged or of a foreign kind ({error}); {hint}.") from None
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)} (it holds {present}); {hint}.")
    return found
