"""A small set of checkpoints that stands for the published one, and folders that hold it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trtseg.modelinstall import import_folder
from trtseg.models import PUBLISHED_FILES, ModelSet, PublishedFile

DATA = Path(__file__).parent / "data"

#: The published paths, with contents that take several reads (data) and one (index).
CONTENTS = {
    file.path: hashlib.shake_128(file.path.encode()).digest(
        150_001 if "data-" in file.path else 300
    )
    for file in PUBLISHED_FILES
}
FILES = tuple(
    PublishedFile(
        path,
        hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
        len(content),
    )
    for path, content in CONTENTS.items()
)
NAMES = [file.name for file in FILES]
CONFIGS = {net: f"{net}/architecture/{net}_model_config.cfg" for net in ("bdn", "cgm")}
SAMPLE = (DATA.parent.parent / "docs" / "sample_model_config.cfg").read_bytes()
#: Not allowed for a set.
BAD_NAMES = ["", ".", "..", "../own", "a/b", "/tmp/own", ".own", "-own", "own\n", "ö", "a" * 65]


def config_of(net: str) -> bytes:
    """A valid config that is the network's own."""
    return SAMPLE + f"# {net}\n".encode()


def put(folder: Path, *, flat: bool, configs: tuple[str, ...] = ()) -> Path:
    """Write CONTENTS, and configs of the named networks, in one of the two layouts."""
    entries = CONTENTS | {CONFIGS[net]: config_of(net) for net in configs}
    for path, content in entries.items():
        place = folder / (Path(path).name if flat else path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


def flip(path: Path, offset: int = -1, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def import_own(source: Path, name: str = "own", **options: object) -> ModelSet:
    return import_folder(
        source,
        unpublished=True,
        name=name,
        **options,  # type: ignore[arg-type]
    )
