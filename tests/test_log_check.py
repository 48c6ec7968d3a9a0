"""Comparing a store with its log while somebody deletes records of it."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from pipeline.errors import OffsetOutOfRange
from pipeline.position import LogMark
from topology.log_check import follow_back


def test_records_deleted_between_two_looks() -> None:
    """What is deleted is not lost: no frame is taken back, whenever it goes."""
    meta = Mock(shard=0, seq=9, diffs=LogMark(next_offset=12, last_digest=b"d" * 32))
    replica, broker = Mock(meta=meta), Mock()
    broker.bounds = AsyncMock(side_effect=[(3, 14), (13, 14), (13, 14)])
    broker.read = AsyncMock(return_value=[])

    async def main() -> Any:
        await follow_back(broker, "diffs", replica, meta)

    with pytest.raises(OffsetOutOfRange, match="begins at offset 13, this store follows from 12"):
        asyncio.run(main())
    replica.take_back.assert_not_called()
