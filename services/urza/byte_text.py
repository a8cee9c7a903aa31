"""Text columns that are read as bytes, so that rotten text is a value to be judged rather than a driver's error."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Dialect, LargeBinary, String, type_coerce
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

ROTTEN: Final = "surrogateescape"
"""How bytes that are no text are carried in a ``str``, and told apart from every sound one."""


class as_bytes(FunctionElement[bytes]):  # noqa: N801 - reads as the SQL function that it is
    """The bytes of a text column."""

    type = LargeBinary()
    inherit_cache = True


@compiles(as_bytes, "sqlite")
def _sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **options)} AS BLOB)"


@compiles(as_bytes, "postgresql")
def _postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return f"convert_to({compiler.process(element.clauses, **options)}, 'UTF8')"


class ByteText(TypeDecorator[str]):
    """Text that sorts by its bytes on every database and can be read whatever became of it."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Give the column's type; PostgreSQL would sort by language."""
        collation = "C" if dialect.name == "postgresql" else None
        return dialect.type_descriptor(String(self.length, collation=collation))

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """Read the bytes."""
        return type_coerce(as_bytes(column), self)

    def process_result_value(self, value: Any, dialect: Dialect) -> str:  # noqa: ARG002 - SQLAlchemy's signature
        """Give text; bytes that are none, marked so."""
        return value.decode("utf-8", ROTTEN) if isinstance(value, bytes) else f"{value}"
