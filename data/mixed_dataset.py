"""A dataset of several sources, whose shards follow each other in the order of the sources."""

from __future__ import annotations

from collections.abc import Sequence

from .caption_choice import KEY_TXT, CaptionChoice
from .errors import DataError
from .joined_headers import JoinedHeaders, part_of
from .shards import Dataset, open_dataset
from .spread import Broadcast, Gather


class MixedDataset(Dataset):
    """Random access to the samples of several datasets; `parts` are those, in order."""

    def __init__(self, names: Sequence[str], parts: Sequence[Dataset]) -> None:
        headers = JoinedHeaders([part.headers for part in parts])
        index_dir = parts[0].index_dir
        assert all(part.index_dir == index_dir for part in parts), "a recipe names one for all of its data"
        super().__init__([shard for part in parts for shard in part.shards], headers, index_dir=index_dir)
        self.names = list(names)
        self.parts = list(parts)
        self._starts = headers.starts

    def source(self, shard: int) -> int:
        return part_of(self._starts, shard)

    def choice(self, shard: int) -> CaptionChoice:
        part = self.source(shard)
        return self.parts[part].choice(shard - self._starts[part])

    def source_shards(self, shard: int) -> range:
        return range(*self._starts[(source := self.source(shard)) : source + 2])


def open_sources(
    sources: Sequence[tuple[str, str | list[str]]],
    rank: int = 0,
    gather: Gather = lambda value: [value],
    broadcast: Broadcast | None = None,
    captions: Sequence[CaptionChoice] | None = None,
    index_dir: str | None = None,
) -> MixedDataset:
    """Open the shards of named sources; see `open_dataset`. sources: name and shards of each. captions: of each; None:
    KEY.txt. index_dir: folder of the indexes of all. Raises DataError, with the name of the source, also when two of
    them have the same content."""
    choices = captions or [KEY_TXT] * len(sources)
    parts: list[Dataset] = []
    seen: dict[str, str] = {}
    for (name, shards), choice in zip(sources, choices, strict=True):
        try:
            parts.append(
                open_dataset(
                    shards, rank=rank, gather=gather, broadcast=broadcast, captions=choice, index_dir=index_dir
                )
            )
        except DataError as error:
            raise type(error)(f"data.sources, {name}: {error}") from error
        if (other := seen.setdefault(parts[-1].fingerprint, name)) != name:
            raise DataError(
                f"data.sources: {other} and {name} have the same content; name it once, with a higher weight"
            )
    return MixedDataset([name for name, _ in sources], parts)
