"""What every fit starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lightning.pictures import leave_blank


@pytest.fixture(autouse=True, scope="module")
def _blank_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        yield
