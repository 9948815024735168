"""Files that are replaced as a whole, and folders that can be written."""

import os
import tempfile
import threading
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step, so that no reader sees half of it; where that fails nothing of it stays.

    Raises:
        OSError: it cannot be written; what names a file names this one.
    """
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        if error.filename is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and see that it can be written before there is anything to write.

    Raises:
        OSError: it cannot be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
