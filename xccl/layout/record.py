"""Record descriptors: what the bytes of a structure in global memory mean.

Every structure is described once, as fields added in order; offsets come from one running sum, and the documentation's
tables and diagrams are generated from the same description. A module of this package declares a record, and next to
each field the constant with its offset, which kernels use:

    FIELD = Record("metadata field", "...")
    EVENT_ID = FIELD.add("event_id", 8, "the caller's number for the operation")
"""

from __future__ import annotations

from dataclasses import dataclass

#: Distance in bytes between hot words with different writers: two cache lines, since adjacent lines are prefetched in
#: pairs.
HOT_LINE_BYTES = 128


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Field:
    """One field of a record.

    Attributes:
        name: the field's name.
        offset_bytes: distance from the start of the record.
        size_bytes: length in bytes.
        doc: what the field holds, and who writes it.
    """

    name: str
    offset_bytes: int
    size_bytes: int
    doc: str


class Record:
    """A structure in memory, described field by field."""

    def __init__(self, name: str, doc: str) -> None:
        self.name = name
        self.doc = doc
        self._fields: list[Field] = []
        self.size_bytes = 0

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields in order of their offsets."""
        return tuple(self._fields)

    def add(self, name: str, size_bytes: int, doc: str, *, align: int = 8) -> int:
        """Append a field.

        Args:
            name: the field's name.
            size_bytes: its length.
            doc: what it holds.
            align: its offset is rounded up to a multiple of this.

        Returns:
            The field's offset in bytes.
        """
        offset_bytes = align_up(self.size_bytes, align)
        self._fields.append(Field(name, offset_bytes, size_bytes, doc))
        self.size_bytes = offset_bytes + size_bytes
        return offset_bytes

    def pad_to(self, alignment: int) -> int:
        """Round the record's size up to a multiple of `alignment`; the size."""
        self.size_bytes = align_up(self.size_bytes, alignment)
        return self.size_bytes

    def diagram(self) -> str:
        """An ASCII box, one row a field, gaps shown as padding."""
        rows: list[tuple[str, str]] = []
        at = 0
        for field in self._fields:
            if field.offset_bytes > at:
                rows.append((f"{at:>6}", f"(padding, {field.offset_bytes - at} bytes)"))
            rows.append((f"{field.offset_bytes:>6}", f"{field.name} ({field.size_bytes})"))
            at = field.offset_bytes + field.size_bytes
        if self.size_bytes > at:
            rows.append((f"{at:>6}", f"(padding, {self.size_bytes - at} bytes)"))
        width = max(len(text) for _, text in rows) + 2
        bar = " " * 7 + "+" + "-" * width + "+"
        lines = [bar]
        for offset, text in rows:
            lines += [f"{offset} | {text:<{width - 2}} |", bar]
        lines.append(f"{self.size_bytes:>6}")
        return "\n".join(lines)
