"""TensorBoard's event file: scalars, texts and images, written without TensorFlow and without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """A new event file. It begins with a session start at step 0, on which a TensorBoard that has read other files of
    the same folder drops what it has. Methods raise OSError; values are stored as fp32."""

    def __init__(self, path: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_pb2: Any = event_pb2  # their classes are made at run time
        self._summary: Any = vars(summary_pb2)["Summary"]
        self._text = text_pb
        self._writer = RecordWriter(open(path, "wb"))  # noqa: SIM115
        self._write(time.time(), 0, file_version="brain.Event:2")
        self._write(time.time(), 0, session_log=self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START))

    def scalars(self, moment: float, step: int, points: Mapping[str, float]) -> None:
        """moment: Unix time, here and below."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._write(moment, step, summary=self._summary(value=values))

    def text(self, moment: float, step: int, tag: str, text: str) -> None:
        """text: Markdown."""
        self._write(moment, step, summary=self._text(tag, text))

    def image(self, moment: float, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """size: width and height."""
        width, height = size
        encoded = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(moment, step, summary=self._summary(value=[self._summary.Value(tag=tag, image=encoded)]))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, moment: float, step: int, **content: Any) -> None:
        self._writer.write(self._event_pb2.Event(wall_time=moment, step=step, **content).SerializeToString())
