"""WebDataset tars as ingest sources."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from .candidates import Candidate, JsonField, Piece, Source
from .captions import CAPTION_COLUMNS
from .errors import DataError, DataMissing
from .files import Stream, is_local
from .index import CAPTION_TYPE, IMAGE_TYPES, Group, group_members, image_type, split_key, why_no_image
from .remote import filesystem
from .retry import call
from .shard_list import format_shards
from .source_images import SOURCE_TYPES
from .tables import Columns
from .tars import ManyZeros, Member, TarInput, scan
from .units import counted

HEADER_BLOCK = 16 << 10
"""Bytes read at once of a local tar, whose contents are passed over."""


def tar_source(tars: list[str], columns: Columns) -> Source:
    seen = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(_groups_of, tars))
    source, images, captions = Source(), 0, 0
    kinds = Counter(kind for _, groups, _ in parts for group in groups for kind in group.members)
    chosen = _Chosen(tars, kinds, columns)
    for tar, (state, groups, damage) in zip(tars, parts, strict=True):
        seen.update(f"{tar} {state}\n".encode())
        stem = os.path.basename(tar).removesuffix(".tar")
        for group in groups:
            kind = chosen.image_of(group)
            if group.problem or kind is None:
                source.rejected.append((group.key, group.problem or chosen.missing(group)))
                continue
            images += 1
            pieces = {kind: Piece(tar, *place) for kind, place in group.members.items()}
            if chosen.source and chosen.source not in pieces:
                source.rejected.append((group.key, f"no source image: no .{chosen.source}"))
                continue
            text = chosen.caption if chosen.caption in pieces else None
            if text is None and (chosen.caption_only or "json" not in pieces):
                source.rejected.append((group.key, chosen.no_caption))
                continue
            captions += 1
            members = chosen.named(pieces, kind, text)
            place, fields = (pieces[text], ()) if text else (pieces["json"], chosen.fields)
            others = tuple(JsonField(pieces.get("json"), name) for name in chosen.others)
            found = Candidate(group.key, members, place, fields, None, others, f"{stem}/{group.key}")
            source.candidates.append(found)
        if damage:
            source.rejected.append((tar, damage))
            source.damaged.append(f"{tar}: {damage}")
    if not images:
        if source.damaged:
            raise DataError(f"{format_shards(tars)}: no images; {source.damaged[0]}")
        longer = [kind for kind in sorted(kinds) if kind.rpartition(".")[2] in IMAGE_TYPES and kind not in IMAGE_TYPES]
        if longer:
            besides = f" besides the source images, KEY.{chosen.source}" if chosen.source in IMAGE_TYPES else ""
            raise DataError(
                f"{format_shards(tars)}: no member is named KEY.jpg, .jpeg, .png or .webp{besides}, they are"
                f" {_counted(kinds)}; choose with --image-column {longer[0]} --caption-column EXTENSION"
            )
        raise DataError(
            f"{format_shards(tars)}: no images (.jpg, .jpeg, .png, .webp), only {_counted(kinds)}; check the path"
        )
    if not captions:
        raise DataError(
            f"{format_shards(tars)}: no captions; samples need a .txt, or a .json with one, and have {_counted(kinds)};"
            " name another extension or .json field with --caption-column"
        )
    source.state = seen.hexdigest()
    return source


class _Chosen:
    """The members that are the image and the caption of each sample."""

    def __init__(self, tars: list[str], kinds: Counter[str], columns: Columns) -> None:
        self.image = columns.image.lower().lstrip(".") if columns.image else None
        if self.image and kinds and self.image not in kinds:
            raise DataError(
                f"{format_shards(tars)}: no member ends in .{self.image}, they are {_counted(kinds)}; name one with"
                " --image-column"
            )
        wanted = columns.caption.lower().lstrip(".") if columns.caption else None
        self.caption: str | None = CAPTION_TYPE
        self.fields: tuple[str, ...] = CAPTION_COLUMNS
        self.caption_only = False
        self.no_caption = "no caption: neither .txt nor .json"
        if wanted and wanted in kinds and wanted != "json":
            self.caption, self.caption_only, self.no_caption = wanted, True, f"no caption: no .{wanted}"
        elif columns.caption:
            if kinds and "json" not in kinds:
                raise DataError(
                    f"{format_shards(tars)}: no member ends in .{wanted} and none in .json with such a field, they are"
                    f" {_counted(kinds)}; name one with --caption-column, or leave it out"
                )
            self.caption, self.fields = None, (columns.caption,)
            self.no_caption = f"no caption: no .json with {columns.caption}"

        self.source = columns.source.lower().lstrip(".") if columns.source else None
        if self.source and kinds and (self.source not in kinds or self.source.rpartition(".")[2] not in IMAGE_TYPES):
            raise DataError(
                f"{format_shards(tars)}: no images end in .{self.source}, members are {_counted(kinds)}; name the"
                " extension of the source images with --source-column"
            )
        self.others = columns.others
        """Fields of KEY.json with further captions."""
        there = next((name for name in self.others if name.lower().lstrip(".") in kinds), None)
        if there or (self.others and kinds and "json" not in kinds):
            name = there or self.others[0]
            why = "a member, which is kept as it is" if there else "no field of a .json: there are none"
            raise DataError(f"{format_shards(tars)}: --caption-column {name}: {why}; leave this option out")

    def image_of(self, group: Group) -> str | None:
        """Extension of the sample's image."""
        if self.image:
            return self.image if self.image in group.members else None
        return image_type({kind: place for kind, place in group.members.items() if kind != self.source})

    def missing(self, group: Group) -> str:
        return f"no image: no .{self.image}" if self.image else why_no_image(group)

    def named(self, pieces: dict[str, Piece], image: str, text: str | None) -> dict[str, Piece]:
        """A sample's members under the names that the trainer reads, without the caption, which is rewritten."""
        if self.source:
            kept = {kind: piece for kind, piece in pieces.items() if kind != self.source}
            renamed = {
                f"other.{kind}" if kind in SOURCE_TYPES and kind != image else kind: piece
                for kind, piece in kept.items()
            }
            pieces = {**renamed, f"source.{self.source.rpartition('.')[2]}": pieces[self.source]}
        plain = image.rpartition(".")[2]
        if image == plain and text in (None, CAPTION_TYPE):
            kept = {kind: piece for kind, piece in pieces.items() if kind != text}
        else:  # other members with the names of the image or caption are renamed
            taken = {*IMAGE_TYPES, CAPTION_TYPE}
            kept = {
                f"other.{kind}" if kind in taken else kind: piece
                for kind, piece in pieces.items()
                if kind not in (image, text)
            }
        return {plain: pieces[image], **{kind: piece for kind, piece in kept.items() if kind != plain}}


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f".{kind} ({count})" for kind, count in kinds.most_common(6)) or "nothing"


def _groups_of(tar: str) -> tuple[str, list[Group], str | None]:
    """State of a tar, its samples, and any damage; the last sample before the damage is marked as well."""
    try:
        return call(lambda: _scanned(tar), tar)
    except DataMissing:
        raise DataError(f"{tar}: no such tar; check the path") from None


def _scanned(tar: str) -> tuple[str, list[Group], str | None]:
    members: list[Member] = []
    damage = None
    fs, path = filesystem(tar)
    state = fs.ukey(path)
    local = is_local(tar)  # only locally is seeking from header to header cheaper than reading everything
    try:
        with Stream(tar, HEADER_BLOCK if local else None) as file:
            for member in scan(TarInput(file), read_all=not local):
                members.append(member)
    except ManyZeros as error:
        groups = group_members(members)
        if len(groups) > 1 and set(groups[-1].members) != set(groups[-2].members):
            groups[-1] = groups[-1]._replace(problem="the tar may be cut off within it")
        return state, groups, f"after {counted(len(groups), 'sample')} at {error}"
    except tarfile.TarError as error:
        damage = str(error)
    groups = group_members(members)
    if damage is None:
        return state, groups, None
    last = next((split[0] for split in map(split_key, (m.name for m in reversed(members))) if split), None)
    groups = [group._replace(problem="the tar is damaged here") if group.key == last else group for group in groups]
    whole = sum(not group.problem for group in groups)
    return state, groups, f"the tar is damaged after {counted(whole, 'sample')}: {damage}"
