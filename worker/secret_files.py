"""Settings in files, as docker and Kubernetes mount secrets."""

from __future__ import annotations

import os

#: The most bytes of a file.
_MOST_BYTES = 1 << 20


def read_secret_files(directory: str, names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The contents of some files in a directory, and a warning for each that is ignored.

    `names` has the key of each content by the file's name in lower case. Blanks around a content are removed. What is
    not a file of the directory, or a link to one, is ignored. Raises OSError, and ValueError for a file that is too
    large or not UTF-8; its text may contain the secret.
    """
    home = os.path.realpath(directory)
    texts, warnings = {}, []
    for entry in os.listdir(directory):
        name = names.get(entry.lower())
        if name is None:
            continue
        path = os.path.realpath(os.path.join(directory, entry))
        if not os.path.isfile(path) or os.path.commonpath((home, path)) != home:
            warnings.append(f"{entry} in the secrets directory is not a file of that directory and is ignored")
            continue
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("the file is too large")
        texts[name] = content.decode().strip()
    return texts, warnings
