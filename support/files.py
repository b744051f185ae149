"""Files that are whole or absent at every moment, whatever happens while they are written.

Nobody needs this to understand a run.
"""
import os
from pathlib import Path

PARTIAL = '.rewarm-partial'             # the end of a name, while its file is being written


def write_whole(path, *parts):
    """Write bytes so that the file is complete or absent at every moment, also in a power cut."""
    temporary = Path(f'{path}{PARTIAL}')
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, 'xb') as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)    # a full disk says no name
        raise
    finally:
        temporary.unlink(missing_ok=True)
