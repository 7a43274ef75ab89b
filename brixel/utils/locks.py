"""Locks of folders that one run at a time writes to."""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from brixel.errors import BrixelError

_LOG = logging.getLogger("brixel")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from file systems without locks, on some clusters


@contextlib.contextmanager
def only_run(
    own: Path, instead: str, *, others: Callable[[], Iterable[Path]] = tuple, others_s: float = 0
) -> Iterator[None]:
    """Lock the empty file ``own``. The system releases it when the process ends, also when it is killed.

    File systems without locks get a warning: filelock's own answer to them, a marker file, outlives a process that is
    killed on another machine. In a folder with the sticky bit, filelock refuses the file of another user.

    Args:
        own: The file, in the folder that is written to.
        instead: What to give where another run writes there, such as "another output folder".
        others: Locks of other runs; asked for and locked for a moment, once ``own`` is held, to see that none is alive.
        others_s: Seconds to wait for each of them.

    Raises:
        BrixelError: Another run holds one of the locks.
    """
    folder = own.parent
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(own, timeout=0, fallback_to_soft=False))
            for path in others():
                with FileLock(path, timeout=others_s, fallback_to_soft=False):
                    pass
        except Timeout as error:
            raise BrixelError(f"another run writes to {folder}: wait until it ends, or give {instead}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("the file system of %s has no locks: make sure that no other run writes there", folder)
        yield
