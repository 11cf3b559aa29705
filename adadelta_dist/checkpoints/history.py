"""The checkpoints of a run: a folder of folders, of which the newest is wanted."""

from os import PathLike
from pathlib import Path

from .folder import MANIFEST, SUMS, discard, is_incomplete, read_manifest, temporary_name


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of `save_checkpoint` in a folder, the oldest first.

    A folder counts if its manifest can be read and its checksums are there; what else there is,
    or may not be looked into, is passed over. Whether its files are intact is seen when it is
    loaded.
    """
    found = []
    for path in folder.iterdir():
        if is_incomplete(path.name):
            continue
        try:
            is_complete = (path / MANIFEST).is_file() and (path / SUMS).is_file()
            manifest = read_manifest(path) if is_complete else None
        except (OSError, ValueError):  # a folder that may not be read, such as lost+found
            continue
        if manifest is not None:
            found.append((str(manifest["saved_at"]), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none. Not collective.

    Saves that died or are still going on do not count.

    Args:
        folder: where checkpoints were saved, each a folder in it.

    Raises:
        OSError: it cannot be read.
    """
    return next(reversed(checkpoints_in(Path(folder))), None)


def prune(newest: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, and what saves that died have left.

    Args:
        newest: the checkpoint that was just saved, beside the others. It stays, though the
            clock may say that it is older.
        keep: at least 1. Links to checkpoints do not count.
    """
    folder = newest.parent
    others = [p for p in checkpoints_in(folder) if p != newest and not p.is_symlink()]
    for path in others[: max(len(others) - keep + 1, 0)]:
        # A name of its own first: a checkpoint disappears as a whole, too.
        path.rename(temporary_name(path.with_name(f"{path.name}-removed")))
    for path in folder.iterdir():
        if is_incomplete(path.name):
            discard(path)
